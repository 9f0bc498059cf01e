"""A predictor that learns along: its failures are told, its thread ends, and engines share it."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import quick_compiling
from helpers import in_time, random_model
from synthetic import llapor_of
from test_device_bytes import PROMPTS, config

from layerscope_jax import Engine
from predictor.online import BACKLOG, LearningError, Online

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def online(model):
    return Online(llapor_of(model))


def engine_of(model, online):
    return Engine(model, config(model.bank.total_bytes * 3 // 4, online))


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("layerscope-tuning")]


def fails(*_):
    raise FloatingPointError("injected")


def test_a_failure_is_told_and_tokens_stay_right(model, online, monkeypatch):
    with Engine(model, config(None, None)) as engine:
        oracle = engine.generate(PROMPTS, max_new_tokens=5).token_ids
    monkeypatch.setattr(online, "_learn", fails)
    with engine_of(model, online) as engine:
        assert engine.generate(PROMPTS, max_new_tokens=5).token_ids == oracle
        online._wait()
        with pytest.warns(
            RuntimeWarning, match=r"llapor-online.*online tuning has stopped: FloatingPointError: injected"
        ):
            assert engine.generate(PROMPTS, max_new_tokens=5).token_ids == oracle
        engine.generate(PROMPTS, max_new_tokens=2)  # told once
        assert online._work == []
        with pytest.raises(LearningError, match="injected; forecasts keep their parameters") as raised:
            online.finish()
        assert isinstance(raised.value.__cause__, FloatingPointError)
    assert threads() == []


def test_closing_an_engine_tells_of_a_failure_that_nobody_knows(model, online, monkeypatch):
    monkeypatch.setattr(online, "_learn", fails)
    engine = engine_of(model, online)
    engine.generate(PROMPTS, max_new_tokens=3)
    with pytest.raises(LearningError, match="injected"):
        engine.close()
    assert threads() == []
    engine.close()
    with pytest.raises(ValueError, match="the engine was closed"):
        engine.generate(PROMPTS, max_new_tokens=3)


def test_a_failure_hides_no_error_of_the_block(model, online, monkeypatch):
    monkeypatch.setattr(online, "_learn", fails)

    def block():
        with online, engine_of(model, online) as engine:
            engine.generate(PROMPTS, max_new_tokens=3)
            online._wait()
            online.take_failure()
            raise KeyError("the block's own")

    with pytest.raises(KeyError, match="the block's own"):
        block()


def test_the_thread_ends_with_the_last_engine_and_begins_anew(model, online):
    first, second = engine_of(model, online), engine_of(model, online)
    first.generate(PROMPTS, max_new_tokens=3)
    assert len(threads()) == 1
    first.close()
    second.generate(PROMPTS, max_new_tokens=3)
    assert len(threads()) == 1
    second.close()
    assert threads() == []
    seen = online.finish()
    with engine_of(model, online) as third:
        third.generate(PROMPTS, max_new_tokens=3)
        assert len(threads()) == 1
    assert seen.model == online.finish().model
    assert threads() == []


def test_what_was_seen_is_learned_before_the_thread_ends(model, online, monkeypatch):
    gate, learned = threading.Event(), []

    def learn(learner, seen, rows, follows):
        gate.wait()
        learned.append(len(rows))

    monkeypatch.setattr(online, "_learn", learn)
    engine = engine_of(model, online)
    engine.generate(PROMPTS, max_new_tokens=8)  # it has no time for more than a few
    assert learned == []
    gate.set()
    in_time(engine.close)
    assert len(learned) == BACKLOG


def test_two_engines_at_once_do_not_mix_their_steps(model, online, monkeypatch):
    """A layer of one falls between two layers of the other: each step is whole, and of one engine."""
    learned = []

    def learn(learner, seen, rows, follows):
        learned.append({inputs.shape[0] for inputs, _, _ in seen})

    monkeypatch.setattr(online, "_learn", learn)
    engines = [engine_of(model, online) for _ in range(2)]
    learners = [engine.runner.forecasts._learner for engine in engines]
    assert learners[0] is not learners[1]
    assert learners[0].params is not learners[1].params
    for layer in range(3):
        for learner, rows in zip(learners, (1, 2), strict=True):
            inputs, weights = np.zeros((rows, 32), np.float32), np.ones((rows, 2), np.float32)
            active = np.ones(rows, bool)
            learner.observe(layer, inputs, np.zeros((rows, 2), int), weights, active, "decode")
    online._wait()
    assert learned == [{1}, {2}]
    for engine in engines:
        engine.close()


def test_what_is_learned_reaches_every_engine(model, online, monkeypatch):
    with engine_of(model, online) as first, engine_of(model, online) as second:
        before = [engine.runner.forecasts.inputs(0)[0] for engine in (first, second)]
        monkeypatch.setattr(online.tuner, "feed", lambda rows: True)
        first.generate(PROMPTS, max_new_tokens=4)
        online.finish()
        after = [engine.runner.forecasts.inputs(0)[0] for engine in (first, second)]
    assert all(one is not other for one, other in zip(before, after, strict=True))


def test_closing_it_leaves_engines_at_work(model, online):
    with engine_of(model, online) as engine:
        with online:
            tokens = engine.generate(PROMPTS, max_new_tokens=4).token_ids
        assert threads() == []
        assert engine.generate(PROMPTS, max_new_tokens=4).token_ids == tokens
        assert threads() == []


def test_an_engine_that_cannot_be_made_leaves_no_learner(model, online):
    with pytest.raises(ValueError, match="device_budget must hold"):
        Engine(model, config(1, online))
    assert list(online._learners) == []


def test_a_program_that_closes_nothing_ends_well():
    """With the thread at work when the interpreter ends."""
    program = """
        import sys
        sys.path[:0] = ["tests", "tests/predictor"]
        from helpers import random_model
        from quick_compiling import compile_quickly
        from synthetic import llapor_of
        from test_device_bytes import PROMPTS, config
        from layerscope_jax import Engine
        from predictor.online import Online
        compile_quickly(True)  # in the way of this process, which has compiled much of it
        model = random_model()
        online = Online(llapor_of(model))
        engine = Engine(model, config(model.bank.total_bytes * 3 // 4, online))
        engine.generate(PROMPTS, max_new_tokens=2)
        print(bool(online._work), flush=True)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | quick_compiling.ENVIRONMENT,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "Traceback" not in done.stderr
