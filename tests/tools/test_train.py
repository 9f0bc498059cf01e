"""Training: it learns, it resumes to the same weights, it refuses another run's folder; the baselines."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import once

from tools.shipped_model import train as module
from tools.shipped_model.baselines import Bigram
from tools.shipped_model.data import PackedTokens
from tools.shipped_model.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("quick_compiles")

PERIOD = 7


@pytest.fixture
def run(tmp_path):
    """A tiny run on text that repeats itself; a model that learns anything predicts it."""
    tokens = tmp_path / "tokens"
    for split in ("train", "heldout"):
        (tokens / split).mkdir(parents=True)
        np.save(tokens / split / "counting.npy", (np.arange(2000) % PERIOD).astype(np.uint16))
    (tokens / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(i): i for i in range(16)}}}))
    return TrainConfig(
        tokens=tokens,
        out=tmp_path / "run",
        layers=1,
        experts=4,
        top_k=2,
        hidden=16,
        moe_intermediate_size=8,
        heads=2,
        steps=6,
        rows=4,
        length=16,
        learning_rate=0.02,
        save_every=3,
        evaluate_every=100,
    )


def log(config):
    return [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]


# Optax computes with Python scalars and integers, which strict promotion refuses.
@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_it_learns_and_a_stopped_run_goes_on_to_the_same_weights(run, monkeypatch):
    run = replace(run, steps=120, save_every=60, evaluate_every=1000)
    monkeypatch.setattr(module, "make_steps", once(module.make_steps))  # all its runs take the same steps
    whole = train(replace(run, out=run.out / "whole"))
    stopped = replace(run, out=run.out / "stopped")
    train(replace(stopped, steps=60, decay=0.0))
    resumed = train(stopped)
    assert [row["step"] for row in log(stopped) if "heldout" in row] == [60, 120]
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    rows = [row for row in log(stopped) if "loss" in row]
    assert rows[-1]["loss"] < 0.2 < 1.5 < rows[0]["loss"]
    assert log(stopped)[-1]["heldout"]["counting"] < 0.2


def test_another_run_is_refused(run, monkeypatch):
    """Also where the other one was cut off before its first step."""

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "make_steps", dies)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    with pytest.raises(ValueError, match=r"holds another run \(hidden: 16 then, 32 now\); use its settings"):
        train(replace(run, hidden=32))


def test_batches_depend_on_seed_and_step_alone(run):
    tokens = PackedTokens.open(run.tokens / "train")
    first = tokens.batch(4, 9, seed=1, step=5)
    assert first.shape == (4, 9)
    np.testing.assert_array_equal(first, tokens.batch(4, 9, seed=1, step=5))
    assert not np.array_equal(first, tokens.batch(4, 9, seed=1, step=6))
    assert not np.array_equal(first, tokens.batch(4, 9, seed=2, step=5))


def test_no_tokens(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected token arrays \(\*\.npy\) in .*found none; make them with"
    ):
        PackedTokens.open(tmp_path)


def test_bigram_probabilities_sum_to_one():
    tokens = np.random.default_rng(0).integers(0, 5, 200)
    bigram = Bigram([tokens], vocab_size=6)
    for first in range(6):  # 5 never occurs
        total = sum(np.exp(-bigram.loss(np.array([first, second]))[1]) for second in range(6))
        assert total == pytest.approx(1.0)
    assert bigram.unigram.sum() == pytest.approx(1.0)


def test_bigram_beats_unigram_on_text_with_order():
    text = np.arange(500) % PERIOD
    unigram, bigram = Bigram([text], vocab_size=16).loss(text)
    assert unigram == pytest.approx(np.log(PERIOD), abs=0.1)
    assert bigram < 0.1
