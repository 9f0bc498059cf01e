"""Devices of two processes share a model's experts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import quick_compiling

from layerscope_jax import Engine, OffloadConfig, load

pytestmark = pytest.mark.usefixtures("quick_compiles")

ONE = Path(__file__).with_name("one_of_two.py")


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def both(prompt, policy):
    """Runs two processes to their ends; returns what each has printed."""
    address, paths = free_address(), os.pathsep.join([str(ONE.parents[2]), *sys.path])
    started = [
        subprocess.Popen(
            [sys.executable, str(ONE), address, str(number), prompt, policy],
            env=os.environ | quick_compiling.ENVIRONMENT | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def test_two_processes_give_the_tokens_of_one():
    found = both("Call me Ishmael.", "lru")
    with Engine(load("shipped"), OffloadConfig(numerics="exact")) as engine:
        alone = engine.generate(["Call me Ishmael.", "def main():"], max_new_tokens=6)
    for number, process in enumerate(found):
        assert process["tokens"] == alone.token_ids
        assert process["held"] == 32
        assert process["exchanged"] > 0
        assert process["hits"] > 0
        submit, stream, other_prompt = process["refused"]
        for text in (submit, stream):
            assert "must all make the same calls of generate" in text
        assert "the prompts of a call must be the same in all 2 processes" in other_prompt
        assert f"this one, {number}, was given another prompt 0 (here" in other_prompt
    assert found[0]["own"] + found[1]["own"] == [[0, 16], [16, 32], [32, 48], [48, 64]]


@pytest.mark.parametrize("what", ["submit", "stream"])
def test_one_process_may_do_both(what):
    with Engine(load("shipped").over(2), OffloadConfig(policy="host-only", device_budget=0)) as engine:
        handle = getattr(engine, what)
        if what == "submit":
            assert len(handle("Call me", max_new_tokens=2).result().token_ids) == 2
        else:
            assert len(list(handle(["Call me"], max_new_tokens=2))) == 2
