"""Devices of two processes share a model's experts."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import quick_compiling
from safetensors.numpy import load_file, save_file

from layerscope_jax import Engine, OffloadConfig, load

pytestmark = pytest.mark.usefixtures("quick_compiles")

ONE = Path(__file__).with_name("one_of_two.py")


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def both(policies, checkpoint, other):
    """Runs two processes to their ends; returns what each has printed."""
    address, paths = free_address(), os.pathsep.join([str(ONE.parents[2]), *sys.path])
    started = [
        subprocess.Popen(
            [sys.executable, str(ONE), address, str(number), policy, str(checkpoint), str(other)],
            env=os.environ | quick_compiling.ENVIRONMENT | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, policy in enumerate(policies)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def other_weights(checkpoint, folder):
    """Makes a checkpoint that differs from another one in one number."""
    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("norm.weight"))
    tensors[name][0] += 1
    save_file(tensors, file)
    return folder


def test_two_processes_give_the_tokens_of_one(tiny, tmp_path):
    found = both(["lru", "presched"], tiny, other_weights(tiny, tmp_path / "other"))
    with Engine(load(tiny), OffloadConfig(numerics="exact")) as engine:
        alone = engine.generate(["Call me Ishmael.", "def main():"], max_new_tokens=6)
        drawn = [
            engine.generate([prompt], max_new_tokens=6, temperature=1.0, seed=seed).token_ids[0]
            for prompt, seed in zip(["Call me Ishmael.", "def main():"], found[0]["drawn"][1], strict=True)
        ]
    for number, process in enumerate(found):
        assert process["tokens"] == alone.token_ids
        assert process["drawn"] == [drawn, found[0]["drawn"][1]]
        assert process["held"] == 4
        assert process["exchanged"] > 0
        refused = process["refused"]
        assert refused.keys() == {
            "weights",
            "budget",
            "submit",
            "stream",
            "on_token",
            "other prompt",
            "other size",
            "call",
        }
        for name in ("submit", "stream", "on_token"):
            assert "must all make the same calls of generate" in refused[name]
        assert "the model and the settings of an engine must be the same in all 2" in refused["weights"]
        assert f"this one, {number}, was given another checkpoint (here" in refused["weights"]
        for name in ("other prompt", "other size"):
            assert "the prompts of a call must be the same in all 2 processes" in refused[name]
        assert f"this one, {number}, was given another prompt 0 (here" in refused["other prompt"]
        assert ("the engine, in process 0: " in refused["budget"]) == (number == 1)
        assert ("the call, in process 1: " in refused["call"]) == (number == 0)
        assert "chat template" in refused["call"]
    assert found[0]["hits"] > 0
    assert found[0]["own"] + found[1]["own"] == [[0, 2], [2, 4], [4, 6], [6, 8]]


@pytest.mark.parametrize("what", ["submit", "stream"])
def test_one_process_may_do_both(what):
    with Engine(load("shipped").over(2), OffloadConfig(policy="host-only", device_budget=0)) as engine:
        handle = getattr(engine, what)
        if what == "submit":
            assert len(handle("Call me", max_new_tokens=2).result().token_ids) == 2
        else:
            assert len(list(handle(["Call me"], max_new_tokens=2))) == 2
