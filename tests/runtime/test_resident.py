"""Everything resident on a CPU: decode steps in one jitted function say what layers by themselves say."""

from functools import cache

import jax.numpy as jnp
import pytest
from helpers import random_model

from layerscope_jax import Engine, OffloadConfig, Request
from layerscope_jax.runtime.resident import ResidentOnCpu

pytestmark = pytest.mark.usefixtures("quick_compiles")  # bits are the business of test_exactness.py

SHAPES = {"float32": {}, "bfloat16": {"hidden_size": 64, "moe_intermediate_size": 96, "head_dim": 32}}


@cache
def model(name="float32"):
    return random_model(dtype=jnp.dtype(name), num_layers=2, **SHAPES[name])


def watch(*layer):
    """A tap, with which decode steps go by layers too."""


def requests():
    """Some end before the others, and others join; the last two are sampled."""
    sizes = [(3, 7), (1, 2), (7, 5), (2, 8), (4, 1), (12, 4)]
    return [
        Request(
            prompt=[(7 * n + row) % 61 for n in range(size)],
            max_new_tokens=count,
            stop_token_ids=(),
            temperature=0.9 if row > 3 else 0.0,
            top_k=20,
            seed=5,
        )
        for row, (size, count) in enumerate(sizes)
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_it_gives_the_tokens_of_layers_and_counts_their_experts(name):
    found, counted = [], []
    for by_layers in (True, False):
        with Engine(model(name), OffloadConfig(max_num_seqs=4)) as engine:
            assert engine.runner.mode == "decode"
            engine.runner.tap = watch if by_layers else None
            found.append(engine.generate(requests()))
            meter, stats = engine.runner.account.meter, engine.runner.device_experts.stats
            work = stats.experts, stats.tokens, stats.rows
            counted.append((meter.layers, meter.experts, meter.tokens, *work))
    assert counted[0] == counted[1]
    layers, fast = found
    assert fast.token_ids == layers.token_ids
    assert fast.stats.hit_rate == fast.stats.token_hit_rate == 1
    assert fast.stats.kernels == layers.stats.kernels
    assert fast.stats.padding == 0
    # A prefill has a dispatch a layer, a decode step one in all.
    assert fast.stats.dispatches < layers.stats.dispatches


def test_plans_and_a_tap_go_by_layers():
    layers = model().config.num_layers
    with Engine(model(), OffloadConfig(max_num_seqs=4)) as engine:
        assert isinstance(engine.runner, ResidentOnCpu)
        plain = engine.generate(requests())
        planned = engine.generate(requests(), record_plans=True)
        assert planned.token_ids == plain.token_ids
        assert not plain.plans
        steps = {plan.step for plan in planned.plans}
        assert len(planned.plans) == len(steps) * layers
        seen = []
        engine.runner.tap = lambda layer, *others: seen.append(layer)
        assert engine.generate(requests()).token_ids == plain.token_ids
        assert seen[:layers] == list(range(layers))


def test_a_closed_engine_says_so_in_the_middle_of_an_answer():
    engine = Engine(model(), OffloadConfig(host_threads=3))
    answer = engine.stream([[1, 2, 3]], max_new_tokens=9, stop_token_ids=())
    for _ in range(3):
        next(answer)
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        list(answer)
