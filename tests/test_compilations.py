"""How many programs an engine compiles: few, and none again."""

from contextlib import contextmanager

import pytest
from helpers import PROMPTS, compiled, random_model, spelling_model

from layerscope_jax import Engine, OffloadConfig, layerwise
from layerscope_jax.experts.executors import DeviceExperts, grouped_ffn
from layerscope_jax.experts.grouping import GROUP_SIZES


@pytest.fixture(scope="module")
def model():
    return spelling_model()


@contextmanager
def compiling():
    """What comes out counts the programs compiled within."""
    before, counted = len(compiled), []
    yield counted
    counted.append(len(compiled) - before)


@pytest.mark.parametrize("policy", ["host-only", "resident", "whole"])
def test_generating_again_compiles_nothing(model, policy):
    config = {
        "host-only": OffloadConfig(device_budget=0, policy="host-only"),
        "resident": OffloadConfig(numerics="exact"),
        "whole": OffloadConfig(),
    }[policy]
    with Engine(model, config) as engine:
        first = engine.generate(PROMPTS, max_new_tokens=10)
        with compiling() as counted:
            assert engine.generate(PROMPTS, max_new_tokens=10).tokens == first.tokens
    assert counted == [0]


@pytest.mark.parametrize(
    "config", [OffloadConfig(device_budget=0, policy="host-only"), OffloadConfig()], ids=["layers", "whole"]
)
def test_another_engine_of_the_model_compiles_nothing(model, config):
    with Engine(model, config) as engine:
        engine.generate(PROMPTS, max_new_tokens=3)
    with compiling() as counted, Engine(model, config) as engine:
        engine.generate(PROMPTS, max_new_tokens=3)
    assert counted == [0]


def test_a_long_decode_compiles_few_programs(monkeypatch):
    """On an accelerator, however experts arrive: one for each row bucket, dispatch size and phase."""
    monkeypatch.setattr(layerwise, "device_experts", lambda device, cpu: DeviceExperts(device))
    model = random_model(num_layers=2, hidden_size=24, head_dim=6, seed=9)  # a shape of its own
    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")
    prefill_buckets, decode_buckets = 5, 1  # 2 to 32 rows for 2 x 16 tokens, and 2 for 2
    bound = (prefill_buckets + decode_buckets) * len(GROUP_SIZES)
    others = 3 * 2 + 6  # embed, attend and finish in two phases; empty buffers
    before = grouped_ffn._cache_size()
    with Engine(model, config) as engine:
        with compiling() as counted:
            result = engine.generate([[1, 2, 3], list(range(16))], max_new_tokens=41)
        assert [len(tokens) for tokens in result.tokens] == [41, 41]
        assert 0 < grouped_ffn._cache_size() - before <= bound
        assert counted[0] <= bound + others
        for first in range(5):
            engine.generate([[first], list(range(first, 12))], max_new_tokens=30)
        assert grouped_ffn._cache_size() - before <= bound
