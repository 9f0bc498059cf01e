"""Forks, traced functions and callbacks: right, or refused in words; no hang, and nothing spoilt."""

import os
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROMPTS, in_time, one_jit, spelling_model

from layerscope_jax import Engine, OffloadConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module", params=["resident", "whole", "lru"])
def engine(request):
    model = spelling_model()
    config = OffloadConfig()
    if request.param == "lru":
        config = OffloadConfig(policy="lru", device_budget=9 * model.bank.expert_bytes)
    with one_jit(request.param == "whole"), Engine(model, config) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine):
    return engine.generate(PROMPTS[:1], max_new_tokens=3).token_ids


def in_a_fork(call):
    """What `call` gives or raises in a fork of this process, as text; fails instead of hanging."""
    here, there = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = f"gave {call()!r}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        try:
            os.write(there, said.encode())
        finally:
            os._exit(0)
    os.close(there)

    def read():
        with os.fdopen(here) as pipe:
            return pipe.read()

    try:
        return in_time(read, 30)
    finally:
        os.kill(child, 9)  # one that hangs, too
        os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:.*os.fork.*")
@pytest.mark.parametrize("call", ["generate", "stream", "warmup", "held"])
def test_an_engine_is_not_used_in_a_fork(engine, expected, call):
    held = engine.stream(PROMPTS[:1], max_new_tokens=3)
    next(held)
    calls = {
        "generate": lambda: engine.generate(PROMPTS[:1], max_new_tokens=3),
        "stream": lambda: list(engine.stream(PROMPTS[:1], max_new_tokens=3)),
        "warmup": lambda: engine.warmup(max_num_seqs=1, prompt_tokens=3),
        "held": lambda: next(held),
    }
    said = in_a_fork(calls[call])
    assert said.startswith("ValueError: this Engine was made in another process")
    assert 'multiprocessing.get_context("spawn")' in said
    assert engine.generate(PROMPTS[:1], max_new_tokens=3).token_ids == expected


@pytest.mark.filterwarnings("ignore:.*os.fork.*")
def test_an_engine_is_not_made_in_a_fork_of_a_process_that_has_one(engine):
    said = in_a_fork(lambda: Engine(spelling_model(), OffloadConfig(policy="host-only")))
    assert said.startswith("ValueError: this process (")
    assert "is a fork of one" in said


@pytest.mark.filterwarnings("ignore:.*os.fork.*")
def test_closing_and_forgetting_an_engine_in_a_fork_hang_nobody(engine, expected):
    def close():
        engine.close()
        getattr(engine, "_close", int)()  # as when it is forgotten, or Python exits
        return "closed"

    assert in_a_fork(close) == "gave 'closed'"
    assert engine.generate(PROMPTS[:1], max_new_tokens=3).token_ids == expected


def traced(way, call):
    """Calls within a function that JAX traces."""

    def function(x):
        call(x)
        return 2 * x

    x = jnp.ones(3)
    {
        "jit": lambda: jax.jit(function)(x),
        "vmap": lambda: jax.vmap(function)(x),
        "grad": lambda: jax.grad(lambda y: function(y).sum())(x),
        "scan": lambda: jax.lax.scan(lambda carry, y: (carry, function(y)), 0.0, x),
        "eval_shape": lambda: jax.eval_shape(function, x),
        "checkpoint": lambda: jax.checkpoint(function)(x),
    }[way]()


@pytest.mark.parametrize("way", ["jit", "vmap", "grad", "scan", "eval_shape", "checkpoint"])
def test_traced_functions_are_no_place_for_an_engine(engine, expected, way):
    held = engine.stream(PROMPTS[:1], max_new_tokens=3)
    calls = [
        lambda x: engine.generate(PROMPTS[:1], max_new_tokens=3),
        lambda x: engine.generate([x], max_new_tokens=3),
        lambda x: engine.stream(PROMPTS[:1], max_new_tokens=3),
        lambda x: next(held),
        lambda x: engine.warmup(max_num_seqs=1, prompt_tokens=3),
        lambda x: Engine(spelling_model()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="in a function that JAX traces"):
            traced(way, call)
        assert engine.generate(PROMPTS[:1], max_new_tokens=3).token_ids == expected
    assert engine.generate(PROMPTS[:1], max_new_tokens=3).token_ids == expected
    assert not isinstance(engine.runner.account.meter, jax.core.Tracer)


@pytest.mark.parametrize("callback", ["pure", "io", "debug"])
def test_callbacks_give_the_right_tokens(engine, expected, callback):
    """Of programs that compute on the same device, while one of them waits."""
    found = []

    def call(x):
        try:
            found.append(engine.generate(PROMPTS[:1], max_new_tokens=3).token_ids)
        except Exception:
            found.append(traceback.format_exc())
        return np.float32(1)

    shape = jax.ShapeDtypeStruct((), jnp.float32)

    def function(x):
        if callback == "pure":
            return x + jax.pure_callback(call, shape, x)
        if callback == "io":
            return x + jax.experimental.io_callback(call, shape, x)
        jax.debug.callback(call, x)
        return x

    def run():
        jax.block_until_ready(jax.jit(function)(jnp.float32(1)))
        jax.effects_barrier()

    in_time(run, 60)
    assert found == [expected]
    assert engine.generate(PROMPTS[:1], max_new_tokens=3).token_ids == expected
