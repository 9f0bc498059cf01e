"""A kernel from outside of the package is used where it suits, named, and equal to the reference."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROFILE, bits, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.kernels import registry
from layerscope_jax.kernels.host_kernels import kernel_of

pytestmark = pytest.mark.usefixtures("quick_compiles")

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
ON_HOST = OffloadConfig(device_budget=0, policy="host-only")


@pytest.fixture(scope="module")
def example():
    """The example as a module, and its kernel forgotten afterwards."""
    sys.path.insert(0, str(EXTEND))
    try:
        module = __import__("kernel")
        registry.register_kernel(module.KERNEL)
        yield module
        registry.unregister_kernel(module.KERNEL)
    finally:
        sys.path.remove(str(EXTEND))


@pytest.fixture
def fallbacks(monkeypatch):
    monkeypatch.setattr(registry, "_fallbacks", {})
    registry.choose.cache_clear()
    yield
    registry.choose.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_the_reference_and_a_row_is_its_own(example, dtype):
    rng, fmt = np.random.default_rng(0), sys.modules["format"].FLOAT8
    expert = fmt.pack(
        *(rng.standard_normal(shape).astype(np.float32) / 6 for shape in [(20, 24)] * 2 + [(24, 20)])
    )
    x = rng.standard_normal((9, 24)).astype(jnp.dtype(dtype))
    outputs = np.full((9, 24), np.nan, x.dtype)
    example.run(x, expert, outputs)
    expected = np.asarray(fmt.ffn(jnp.asarray(x), fmt.Expert(*map(jnp.asarray, expert))), np.float32)
    error = np.abs(outputs.astype(np.float32) - expected).max() / np.abs(expected).max()
    assert error < {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    alone = np.empty((1, 24), x.dtype)
    example.run(x[4:5], expert, alone)
    np.testing.assert_array_equal(bits(alone), bits(outputs[4:5]))


def test_it_computes_and_is_named_and_every_policy_has_its_bits(example):
    model = random_model().with_format(sys.modules["format"].FLOAT8)
    found = []
    for config in (
        OffloadConfig(profile=PROFILE),
        ON_HOST,
        OffloadConfig(device_budget=10 * model.bank.expert_bytes, policy="lru"),
    ):
        with Engine(model, config) as engine:
            result = engine.generate([[5, 20, 7], [17] * 20], max_new_tokens=4)
        assert result.stats.kernels == {"float8-lookup": 1, "xla": 0}
        assert result.stats.kernel_fallbacks == registry.fallbacks()
        found.append(result.token_ids)
    assert found[0] == found[1] == found[2]


def test_where_it_cannot_be_had_the_reference_computes_with_one_warning(example, fallbacks, monkeypatch):
    monkeypatch.setattr(example.config, "DISABLE_JIT", 1)
    model = random_model(num_layers=1).with_format(sys.modules["format"].FLOAT8)
    found = []
    with pytest.warns(RuntimeWarning, match="float8-lookup needs numba's compiler") as said:
        found += [stats_of(model), stats_of(model)]
    assert len(said) == 1
    for stats in found:
        assert stats.kernels == {"xla": 1}
        assert stats.kernel_fallbacks == (
            "float8-lookup needs numba's compiler, and NUMBA_DISABLE_JIT is set",
        )


def stats_of(model):
    with Engine(model, ON_HOST) as engine:
        return engine.generate([[1, 2, 3]], max_new_tokens=2).stats


def test_other_formats_are_left_alone(example):
    assert kernel_of(random_model().bank.format, np.dtype(np.float32), 24, 20).name == "loops"


def test_what_is_no_kernel_is_refused(example):
    with pytest.raises(ValueError, match="a kernel named 'float8-lookup' for experts exists already"):
        registry.register_kernel(registry.Kernel("float8-lookup", "experts", example.suits, print))
    with pytest.raises(ValueError, match=r"must be one of experts, .*, sums, got 'norms'"):
        registry.register_kernel(registry.Kernel("mine", "norms", example.suits, print))
    with pytest.raises(ValueError, match="must be text other than 'xla'"):
        registry.register_kernel(registry.Kernel("xla", "experts", example.suits, print))
    with pytest.raises(ValueError, match="register_kernel takes a Kernel"):
        registry.register_kernel(example.run)


def test_the_example_runs(example, capsys):
    example.main()
    assert "format float8_e4m3, kernels {'float8-lookup': 1.0" in capsys.readouterr().out
