"""Other systems, other CPUs, and numba told to compile for others: right, if slower, or said in words."""

import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import quick_compiling
from helpers import in_time, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.formats import format_named
from layerscope_jax.kernels import host_kernels, registry
from layerscope_jax.kernels.host_kernels import AMX, LOOPS, PAIRS, kernel_of
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.support import machine, target

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).parents[2]
FLOAT32, BFLOAT16 = (np.dtype(jnp.dtype(name)) for name in ("float32", "bfloat16"))

GENERATE = """
import sys, warnings
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
{before}
import json
from helpers import random_model
from layerscope_jax import Engine, OffloadConfig
found = []
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for name in {names}:
        model = random_model(num_layers=2, hidden_size=64, moe_intermediate_size=32, dtype=jnp.dtype(name))
        with Engine(model{form}, OffloadConfig({config})) as engine:
            result = engine.generate([[1, 2, 3], [9] * 30], max_new_tokens=4)
        found.append([result.token_ids, result.stats.kernels])
print(json.dumps([found, [str(one.message) for one in said if one.category is RuntimeWarning]]))
"""


def generated(names, config="", before="", form="", **environment):
    """Tokens and kernels of small models in a process that is told of another machine; and its warnings."""
    code = GENERATE.format(names=names, config=config, before=before, form=form)
    known = (
        os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        | quick_compiling.ENVIRONMENT
        | environment
    )
    done = in_time(
        lambda: subprocess.run([sys.executable, "-c", code], env=known, capture_output=True, text=True), 600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def expected(name, config, form=None):
    model = random_model(num_layers=2, hidden_size=64, moe_intermediate_size=32, dtype=jnp.dtype(name))
    with Engine(model.with_format(format_named(form)) if form else model, config) as engine:
        return engine.generate([[1, 2, 3], [9] * 30], max_new_tokens=4).token_ids


ON_HOST = OffloadConfig(device_budget=0, policy="host-only")


FEWER_BITS = """
from layerscope_jax.formats import format_named
from layerscope_jax.kernels import wide_codes
from layerscope_jax.kernels.inside import Inside
Inside.is_possible = lambda *_: False
assert not wide_codes.able()
"""


def test_for_any_cpu_loops_are_compiled():
    """In bfloat16, which asks most of LLVM there, of packed weights, whose kernel has all of a plain one.

    Attention and dense products by XLA, to compile less.
    """
    config, form = "device_budget=0, policy='host-only'", ".with_format(format_named('int4'))"
    found, said = generated(["bfloat16"], config, FEWER_BITS, form, NUMBA_CPU_NAME="generic")
    assert said == []
    assert found == [[expected("bfloat16", ON_HOST, "int4"), {"loops": 1.0, "xla": 0.0}]]


def test_where_nothing_can_be_compiled_xla_computes():
    found, said = generated(["float32"], NUMBA_DISABLE_JIT="1")
    assert found == [[expected("float32", OffloadConfig()), {"xla": 1}]]
    (message,) = said
    assert "NUMBA_DISABLE_JIT is set" in message


ELSEWHERE = """
import builtins, ctypes, os, pathlib, platform
import numba, optax, flax.nnx, tokenizers, safetensors

def refuse(*_):
    raise TypeError("not on this system")

whole = pathlib.Path.read_text
def read_text(self, *others, **named):
    if str(self).startswith("/proc/"):
        raise FileNotFoundError(str(self))
    return whole(self, *others, **named)

platform.system, platform.machine = lambda: "Windows", lambda: "ARM64"
ctypes.CDLL = refuse
jax.ffi.include_dir = lambda: "/nowhere"
pathlib.Path.read_text = read_text
for name in ("sysconf", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
"""


def test_on_other_systems_it_computes_layer_by_layer():
    """Without semaphores of Linux, /proc, sysconf, XLA's header: what of that can be made up."""
    before = ELSEWHERE + "from layerscope_jax.support import machine\n"
    before += "machine.describe(jax.devices()[0]), machine.free_bytes(), machine.cpu_name()\n"
    ((tokens, kernels),), said = generated(["float32"], before=before)
    assert said == []
    assert kernels == {"loops": 1, "xla": 0}  # which numba compiles anywhere; programs do not call them there
    assert tokens == expected("float32", OffloadConfig())


@pytest.mark.parametrize("system", ["Darwin", "Windows", "FreeBSD"])
def test_what_only_linux_has_is_asked_of_linux_alone(monkeypatch, system):
    """Semaphores within an array, and leave to use the tiles of AMX."""
    monkeypatch.setattr(platform, "system", lambda: system)
    assert not Inside.is_possible(FLOAT32)
    assert not host_kernels.amx.available.__wrapped__()


def test_memory_that_is_not_told_is_not_known(monkeypatch):
    monkeypatch.setattr(machine, "_field", lambda file, name: None)
    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError("unrecognized name")))
    assert machine.memory_bytes() is None
    assert machine.free_bytes() == machine.UNKNOWN_BYTES // 2


def kernel_for(dtype, *sizes):
    return kernel_of(format_named(dtype.name), dtype, *sizes)


@pytest.fixture
def afresh(monkeypatch):
    """What was found out of numba is found out again."""
    monkeypatch.setattr(registry, "_fallbacks", {})
    once = (target.features, target.of_host, target.refusal, host_kernels.not_compiled, registry.choose)
    for one in once:
        one.cache_clear()
    yield
    for one in once:
        one.cache_clear()


def test_instructions_are_those_that_numba_may_use(afresh, monkeypatch):
    host = target.of_host()
    assert target.features() == host
    for settings, expected in [
        ({"CPU_FEATURES": ""}, frozenset()),
        ({"CPU_FEATURES": "+sse2,-avx,+" + min(target.lacking())}, {"sse2"} & host),
        ({"ENABLE_AVX": 0}, {name for name in host if not name.startswith("avx")}),
    ]:
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(target.config, name, value)
            target.features.cache_clear()
            assert target.features() == expected


def test_instructions_that_this_cpu_lacks_are_refused(afresh, monkeypatch):
    lacking = min(target.lacking())
    monkeypatch.setattr(target.config, "CPU_FEATURES", f"+sse2,+nosuch,+{lacking}")
    with pytest.warns(RuntimeWarning, match=f"NUMBA_CPU_FEATURES names {lacking}, which this CPU lacks"):
        assert kernel_for(FLOAT32, 64, 64) is None


@pytest.mark.parametrize(
    ("name", "features", "refused"), [("other", "", True), ("other", None, False), ("generic", "", False)]
)
def test_another_cpu_is_taken_only_with_what_this_one_lacks(afresh, monkeypatch, name, features, refused):
    """With no list of its own numba gives LLVM one of all that this CPU has and has not."""
    monkeypatch.setattr(target.config, "CPU_NAME", name)
    monkeypatch.setattr(target.config, "CPU_FEATURES", features)
    assert ("NUMBA_CPU_NAME names other" in (target.refusal() or "")) == refused


class Broken:
    """A kernel that LLVM cannot compile."""

    def compile(self, signature):
        raise RuntimeError("LLVM gave up")


@pytest.fixture
def broken(afresh, monkeypatch):
    """Kernels that cannot be compiled, by their names."""
    whole = host_kernels.not_compiled.__wrapped__

    def breaks(*names):
        def compiled(kernel, *of):
            return whole(kernel._replace(run=Broken()) if kernel.name in names else kernel, *of)

        monkeypatch.setattr(host_kernels, "not_compiled", compiled)
        registry.choose.cache_clear()

    return breaks


def test_what_fails_to_compile_is_left_to_xla_with_one_warning(broken):
    tokens = expected("float32", ON_HOST)
    broken("loops", "pairs", "amx")
    model = random_model(num_layers=2, hidden_size=64, moe_intermediate_size=32, dtype=jnp.float32)
    with (
        pytest.warns(RuntimeWarning, match="RuntimeError: LLVM gave up") as said,
        Engine(model, ON_HOST) as engine,
    ):
        result = engine.generate([[1, 2, 3], [9] * 30], max_new_tokens=4)
    assert len(said) == 1
    assert (result.token_ids, result.stats.kernels) == (tokens, {"xla": 1})
    assert result.stats.kernel_fallbacks == ("RuntimeError: LLVM gave up",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_for(BFLOAT16, 64, 64) is None  # and says nothing more


def test_the_next_kernel_takes_over(broken, monkeypatch):
    monkeypatch.setattr(host_kernels.amx, "suit", lambda *_: True)
    broken("amx", "pairs")
    with pytest.warns(RuntimeWarning, match="gave up"):
        assert kernel_for(BFLOAT16, 64, 64) is LOOPS
    assert {kernel.name for kernel in (AMX, PAIRS, LOOPS)} == {"amx", "pairs", "loops"}
