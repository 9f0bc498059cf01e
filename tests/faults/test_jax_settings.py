"""No setting of JAX's that a caller makes has a part in what an engine computes."""

import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled_programs import compiled
from flax import nnx
from helpers import PROMPTS, bits, one_jit, spelling_model

from layerscope_jax import Engine, OffloadConfig, Request
from layerscope_jax.runtime.sampling import Sampling, sample
from layerscope_jax.support import jax_settings
from layerscope_jax.support.jax_settings import OURS, own_settings, random_key

pytestmark = pytest.mark.usefixtures("quick_compiles")


def mesh(auto=False):
    kind = jax.sharding.AxisType.Auto if auto else jax.sharding.AxisType.Explicit
    return jax.make_mesh((2,), ("x",), axis_types=(kind,))


@contextmanager
def old_mesh():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*with mesh", DeprecationWarning)  # from 0.10 on
        with mesh(auto=True):
            yield


SETTINGS = {
    "rbg": ("jax_default_prng_impl", "rbg"),
    "not partitionable": ("jax_threefry_partitionable", False),
    "seeds offset": ("jax_random_seed_offset", 7),
    "gumbel": ("jax_high_dynamic_range_gumbel", True),
    "no jit": ("jax_disable_jit", True),
    "x64": ("jax_enable_x64", True),
    "nans": ("jax_debug_nans", True),
    "infs": ("jax_debug_infs", True),
    "guard": ("jax_transfer_guard", "disallow"),
    "strict guard": ("jax_transfer_guard", "disallow_explicit"),
    "precision": ("jax_default_matmul_precision", "bfloat16"),
    "high precision": ("jax_default_matmul_precision", "highest"),
    "ranks": ("jax_numpy_rank_promotion", "allow"),
    "types": ("jax_numpy_dtype_promotion", "standard"),
}


@contextmanager
def for_the_process(name, value):
    guards = (
        [name]
        if name != "jax_transfer_guard"
        else [name, *(f"{name}_{way}" for way in ("host_to_device", "device_to_device", "device_to_host"))]
    )
    before = {each: getattr(jax.config, each) for each in guards}
    try:
        jax.config.update(name, value)
        yield
    finally:
        for each, was in before.items():
            jax.config.update(each, was if was is not None or "guard" not in each else "allow")


WITHIN = {
    "x64": lambda: jax.enable_x64(True),
    "no jit": lambda: jax.disable_jit(),
    "nans": lambda: jax.debug_nans(True),
    "guard": lambda: jax.transfer_guard("disallow"),
    "strict guard": lambda: jax.transfer_guard("disallow_explicit"),
    "precision": lambda: jax.default_matmul_precision("bfloat16"),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "device": lambda: jax.default_device(jax.devices()[1]),
    "mesh": lambda: jax.set_mesh(mesh()),
    "auto mesh": lambda: jax.set_mesh(mesh(auto=True)),
    "old mesh": old_mesh,
    "abstract mesh": lambda: jax.sharding.use_abstract_mesh(mesh().abstract_mesh),
}

CONTEXTS = {f"with {name}": make for name, make in WITHIN.items()} | {
    name: lambda setting=setting: for_the_process(*setting) for name, setting in SETTINGS.items()
}


def config_of(kind):
    budget = 9 * spelling_model().bank.expert_bytes
    return (
        OffloadConfig() if kind in ("resident", "whole") else OffloadConfig(policy=kind, device_budget=budget)
    )


KINDS = ["resident", "whole", "fate"]
UNDER_ALL = ("with x64", "with device", "with mesh", "strict guard")
"""Settings that change what each kind of engine does; under the others the kinds take turns."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def engine(kind):
    with one_jit(kind == "whole"), Engine(spelling_model(), config_of(kind)) as engine:
        yield engine


REQUESTS = [
    Request(prompt=prompt, max_new_tokens=4, temperature=heat, seed=3)
    for prompt, heat in zip(PROMPTS, (0.0, 1.0, 1.5, 0.0), strict=True)
]


def what_it_gives(engine):
    """Tokens of a call and a stream, and all logits."""
    step, logits = engine.runner.step, []

    def tapped(*inputs):
        found = step(*inputs)
        logits.append(bits(found[1]))
        return found

    engine.runner.step = tapped
    try:
        tokens = engine.generate(REQUESTS).token_ids
        streamed = [[] for _ in REQUESTS]
        for event in engine.stream(REQUESTS):
            streamed[event.request].append(event.token_id)
    finally:
        engine.runner.step = step
    assert streamed == tokens
    return tokens, logits


@pytest.fixture(scope="module")
def expected(engine):
    return what_it_gives(engine)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for turn, name in enumerate(CONTEXTS)
        for kind in (KINDS if name in UNDER_ALL else [KINDS[turn % len(KINDS)]])
    ],
    indirect=["kind"],
)
def test_tokens_and_bits_are_the_same(engine, expected, name):
    with CONTEXTS[name]():
        within = [getattr(jax.config, setting) for setting in OURS]
        tokens, logits = what_it_gives(engine)
        assert [getattr(jax.config, setting) for setting in OURS] == within  # the caller's are left alone
    assert tokens == expected[0]
    for found, right in zip(logits, expected[1], strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("name", ["with x64", "strict guard", "with device", "with abstract mesh"])
def test_an_engine_may_be_made_under_them(kind, expected, name):
    """And used under them, and afterwards."""
    with one_jit(kind == "whole"):
        with CONTEXTS[name]():
            engine = Engine(spelling_model(), config_of(kind))
            assert engine.generate(REQUESTS).token_ids == expected[0]
        with engine:
            assert engine.generate(REQUESTS).token_ids == expected[0]


def test_a_stream_leaves_the_callers_settings_alone(engine):
    """Between two tokens they are the caller's, whoever asks for the next one."""
    with jax.enable_x64(True), jax.default_device(jax.devices()[1]):
        stream = engine.stream(REQUESTS)
        for _ in range(3):
            next(stream)
            assert jax.config.jax_enable_x64
            assert jax.config.jax_default_device == jax.devices()[1]
        stream.close()
        assert jax.config.jax_enable_x64
    assert not jax.config.jax_enable_x64


def test_nothing_is_compiled_anew_under_them(engine, expected):
    before = len(compiled)
    with jax.enable_x64(True), jax.default_matmul_precision("bfloat16"), jax.debug_nans(True):
        engine.generate(REQUESTS)
    assert len(compiled) == before


def test_settings_as_they_should_be_are_left_alone():
    inner = own_settings()
    with inner:
        assert own_settings() is inner  # there is nothing to do


def test_initial_weights_and_dropout_are_of_our_own_kind_of_keys():
    """Those that training begins with: the same as ever."""
    with CONTEXTS["rbg"]():
        keys = random_key(5), nnx.Rngs(random_key(5)).params()
        numbers = [np.asarray(jax.random.normal(key, (4,))) for key in keys]
    expected = [np.asarray(jax.random.normal(key, (4,))) for key in (jax.random.key(5), nnx.Rngs(5).params())]
    np.testing.assert_array_equal(numbers, expected)


@pytest.mark.parametrize("folder", ["layerscope_jax", "predictor"])
def test_whoever_makes_a_key_names_its_kind(folder):
    made = re.compile(r"random\.(key|PRNGKey)\((?!seed, impl=)")
    for file in (Path(jax_settings.__file__).parents[2] / folder).rglob("*.py"):
        code = "\n".join(line.partition("#")[0] for line in file.read_text().splitlines())
        assert not made.search(code), file


@pytest.mark.parametrize("name", ["rbg", "seeds offset", "gumbel"])
def test_a_draw_is_a_function_of_seed_and_position(name):
    logits = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32)
    positions = np.arange(64, dtype=np.int32)
    ones = np.ones(64, np.float32)
    sampling = Sampling(np.arange(64, dtype=np.uint32), ones, np.zeros(64, np.int32), ones)
    expected = np.asarray(jax.jit(sample)(logits, positions, sampling))
    with CONTEXTS[name]():
        np.testing.assert_array_equal(jax.jit(sample)(logits, positions, sampling), expected)
