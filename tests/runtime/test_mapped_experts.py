"""Experts that are mapped from a checkpoint's files give the tokens of experts in memory."""

import os
import shutil

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


@pytest.mark.parametrize("policy", ["resident", "host-only"])
@pytest.mark.parametrize("how", ["changed", "cut off"])
def test_a_file_that_is_written_to_under_a_running_engine_gives_no_wrong_token(folder, policy, how, tmp_path):
    """Between two calls; within a step, a file that gets shorter may end the process."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    model = load(copy, mmap=True)
    budget = None if policy == "resident" else 0
    [file, *_] = [file for file in copy.glob("*.safetensors") if file in model.mapped._opened]

    def write():
        if how == "cut off":
            os.truncate(file, file.stat().st_size - 64)
        else:
            with file.open("r+b") as opened:
                opened.seek(-1, os.SEEK_END)
                opened.write(b"\x01")

    with Engine(model, OffloadConfig(device_budget=budget, policy=policy)) as engine:
        engine.generate(PROMPTS, max_new_tokens=3, stop_token_ids=[])
        write()
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"{file.name} was changed while a model was using it"):
                engine.generate(PROMPTS, max_new_tokens=3, stop_token_ids=[])
        assert engine.runner._settled


def test_a_step_in_which_a_file_is_written_to_gives_nothing(folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    model, given = load(copy, mmap=True), []
    file = next(iter(model.mapped._opened))
    with Engine(model) as engine:
        decode = engine.runner.decode

        def written_to(*inputs):
            found = decode(*inputs)
            if len(given) == 3:  # the prefill has given one, and two steps one each
                os.utime(file)
            return found

        engine.runner.decode = written_to
        stream = engine.stream([[3, 5, 7]], max_new_tokens=9, stop_token_ids=[])
        with pytest.raises(ValueError, match="was changed while a model was using it"):
            given.extend(stream)
        del engine.runner.decode
        assert len(given) == 3
