"""Experts that are mapped from a checkpoint's files give the tokens of experts in memory."""

import numpy as np
import pytest
from helpers import TINY, random_decoder
from sharded import moved

from layerscope_jax import Engine, ModelConfig, OffloadConfig, load, save

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[3, 5, 7], [11]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped") / "model"
    config = ModelConfig(**vars(TINY) | {"qk_norm": "all", "head_dim": 8, "stop_token_ids": (0,)})
    save(random_decoder(config), folder)
    return moved(folder, 8)


@pytest.mark.parametrize("policy", ["lru", "host-only"])
def test_tokens_are_those_of_experts_in_memory(folder, policy):
    tokens = []
    for mmap in (True, False):
        model = load(folder, mmap=mmap)
        config = OffloadConfig(device_budget=model.bank.expert_bytes * 8, policy=policy)
        with Engine(model, config) as engine:
            result = engine.generate(PROMPTS, max_new_tokens=5, stop_token_ids=[])
            assert (result.stats.bytes_moved > 0) == (policy == "lru")
            held = engine.runner.host_experts._weights
            for expert, weights in held.items():
                assert isinstance(weights.arrays.gate, np.ndarray) == mmap
                assert weights.arrays.gate is model.bank[expert].gate or not mmap
        tokens.append(result.token_ids)
    assert tokens[0] == tokens[1]
