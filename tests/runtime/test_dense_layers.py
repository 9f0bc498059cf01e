"""Decoder layers without experts between the others: every way to run a model gives the same bits."""

from functools import cache

import jax
import numpy as np
import pytest
from compiled_programs import compiled
from exact_cases import agree, prompts, run
from helpers import PROFILE, one_jit, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.models.cache import new_caches
from layerscope_jax.runtime.layerwise import LayerByLayer

pytestmark = pytest.mark.usefixtures("quick_compiles")  # test_exactness.py optimises such a layer

SHAPE = {"num_layers": 6, "dense_layers": (0, 2, 3, 5), "intermediate_size": 40, "num_experts": 6}
STEPS = 3
BATCHES = [prompts(np.random.default_rng(3), 61, 5, 1, 9)]


@cache
def model():
    return random_model(seed=4, **SHAPE)


@cache
def resident():
    with Engine(model()) as engine:
        assert engine.runner.mode == "decode"
        return run(engine, BATCHES, STEPS)


@pytest.mark.parametrize(
    ("policy", "slots"), [("lru", 7), ("auto", 4), ("host-only", 0), ("presched", 7), ("resident", 12)]
)
def test_every_policy_gives_the_bits_of_everything_resident(policy, slots):
    bank = model().bank
    config = OffloadConfig(
        device_budget=slots * bank.expert_bytes,
        policy=policy,
        profile=PROFILE,
    )
    with Engine(model(), config) as engine:
        if policy == "resident":
            engine.runner.tap = lambda *of_layer: None  # with which decode steps too go layer by layer
        assert isinstance(engine.runner, LayerByLayer)
        agree(run(engine, BATCHES, STEPS), resident())
        assert engine.runner.forecasts.name == ("gate" if policy == "auto" else None)


def test_plans_statistics_and_taps_number_moe_layers():
    bank, seen = model().bank, []
    assert [len(experts) for experts in bank.layers] == [6, 6]
    config = OffloadConfig(device_budget=7 * bank.expert_bytes, policy="lru", predictor="previous-token")
    with Engine(model(), config) as engine:
        engine.runner.tap = lambda layer, inputs, chosen, weights: seen.append(layer)
        assert engine.runner.geometry.num_layers == 2
        result = engine.generate(BATCHES[0], max_new_tokens=STEPS, stop_token_ids=(), record_plans=True)
        assert result.token_ids == resident()[0][0]
    assert seen == [0, 1] * STEPS
    assert [plan.layer for plan in result.plans] == seen
    assert 0 <= result.stats.hit_rate <= 1


def test_a_warm_engine_compiles_nothing_more():
    with Engine(model(), OffloadConfig(device_budget="1KiB", policy="host-only")) as engine:
        engine.warmup(prompt_tokens=9, max_num_seqs=3, new_tokens=STEPS)
        before = len(compiled)
        result = engine.generate(BATCHES[0], max_new_tokens=STEPS)
        assert len(compiled) == before
    assert result.token_ids == resident()[0][0]


def test_the_whole_model_in_one_program_gives_the_same_tokens():
    with one_jit(), Engine(model(), OffloadConfig(numerics="fast")) as engine:
        assert engine.runner.mode == "whole"
        tokens, logits = run(engine, BATCHES, STEPS)
    expected_tokens, expected = resident()
    assert tokens == expected_tokens
    for here, there in zip(logits, expected, strict=True):
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-4)


def test_with_fewer_caches_a_step_goes_no_further_than_they_reach():
    held, seen = model(), []
    with Engine(held, OffloadConfig(policy="host-only")) as engine:
        engine.runner.tap = lambda layer, *others: seen.append(layer)
        for layers, expected in ((0, []), (1, []), (2, [0]), (4, [0]), (5, [0, 1]), (6, [0, 1])):
            caches = new_caches(held.config, 2, 8, held.bank.dtype, held.device, layers)
            tokens, positions = np.ones((2, 1), np.int32), np.zeros((2, 1), np.int32)
            *_, caches = engine.runner.step(tokens, positions, np.zeros(2, np.int32), caches, None)
            assert (seen, len(caches)) == (expected, layers)
            seen.clear()
            assert all(array.shape[0] == 2 for array in jax.tree.leaves(caches))
