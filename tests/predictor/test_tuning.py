"""Tuning: tried when it errs, kept only if it is better, bounded in memory, and never a change of tokens."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import random_model
from synthetic import llapor_of, untrained, write_trace

from layerscope_jax import Engine, OffloadConfig, Request
from predictor.dataset import for_training, load_rows
from predictor.llapor import LLaPor
from predictor.online import Online
from predictor.routers import Routers
from predictor.train import batch_of
from predictor.tuning import CHECK_EVERY, Tuner, TuningConfig, part

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = TuningConfig(window=1024, threshold=0.1, steps=24, batch=64, learning_rate=1e-2)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("tuning") / "trace", documents=60, tokens=32)


def stream(trace):
    """The training rows as NumPy arrays, in order."""
    rows = load_rows(trace, for_training)
    return jax.tree.map(np.asarray, batch_of(rows, np.arange(len(rows))))


def tuner(trace, **changes):
    return Tuner(untrained(trace), Routers.load(trace.folder), replace(CONFIG, **changes))


def scripted(trace, monkeypatch, recalls, **changes):
    """A tuner whose tunings come to nothing, but for the recall that `recalls(network, block)` says.

    `block` counts from 0. The first network is "first", tuned ones are "tuned 1", "tuned 2" and so on.
    """
    found = tuner(trace, **changes)
    found.llapor = found._first = replace(found.llapor, network="first")
    rates = []

    def tuned(rows):
        rates.append(found._rate)
        return f"tuned {len(rates)}"

    def score(network, block):
        return np.array([[100 * recalls(network, int(block.hidden[0, 0, 0]))], [100.0]])

    monkeypatch.setattr(found, "_tuned", tuned)
    monkeypatch.setattr(found, "_score", score)
    return found, rates


def feed(found, trace, blocks):
    """Feeds blocks that say their number, and gives (blocks seen, look) of every try until now."""
    rows = part(stream(trace), slice(CHECK_EVERY))
    for number in range(found._seen // CHECK_EVERY, found._seen // CHECK_EVERY + blocks):
        found.feed(replace(rows, hidden=np.full_like(rows.hidden, number)))
    return [(look.rows // CHECK_EVERY, look) for look in found.looks if look.tried]


def test_what_it_sees_is_learned_and_can_be_kept(trace, tmp_path):
    found = tuner(trace)
    before = found.llapor
    assert found.feed(stream(trace))
    tried = [look for look in found.looks if look.tried]
    assert any(look.accepted for look in tried)
    assert all(look.accepted == (look.gain > 2 * look.noise) for look in tried)
    first, last = found.looks[0].error, np.mean([look.error for look in list(found.looks)[-4:]])
    assert last < first - 0.05
    found.llapor.save(tmp_path / "tuned")
    kept = LLaPor.load(tmp_path / "tuned")
    # What is kept is rounded to 127 steps to either side of zero; what was given stays as it is.
    for one, other, steps in ((found.llapor, kept, 127), (before, untrained(trace), np.inf)):
        for mine, theirs in zip(jax.tree.leaves(one.network), jax.tree.leaves(other.network), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=0.51 / steps * np.abs(mine).max())


def test_what_is_not_better_is_rolled_back_and_tried_ever_more_rarely(trace, monkeypatch):
    found, rates = scripted(trace, monkeypatch, lambda network, block: 0.5 - 0.1 * (network != "first"))
    before = found.llapor
    tried = feed(found, trace, 100)
    assert found.llapor is before
    assert [block for block, _ in tried] == [8, 16, 32, 64, 96]  # the window's half is full with the eighth
    assert [rate / CONFIG.learning_rate for rate in rates] == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]
    assert not any(look.accepted or look.returned for _, look in tried)
    assert all(look.gain == pytest.approx(-0.1) for _, look in tried)


def test_a_gain_within_the_noise_is_not_kept(trace, monkeypatch):
    def recalls(network, block):  # 0.01 more on the mean, with a standard error of 0.01
        return 0.5 + (0.01 + 0.01 * 3**0.5 * (-1) ** block) * (network != "first")

    for margin, kept in ((0.5, True), (2.0, False)):
        found, _ = scripted(trace, monkeypatch, recalls, margin=margin)
        (_, look), *_ = feed(found, trace, 8)
        assert (look.gain, look.noise) == (pytest.approx(0.01), pytest.approx(0.01))
        assert look.accepted == kept == (found.llapor.network == "tuned 1")


def test_after_a_gain_it_goes_on_at_the_full_rate(trace, monkeypatch):
    found, rates = scripted(trace, monkeypatch, lambda network, block: 0.5 + 0.1 * (network != "first"))
    tried = feed(found, trace, 13)
    # The second one is no better than the first one, which it began with.
    assert [(block, look.accepted) for block, look in tried] == [(8, True), (12, False)]
    assert rates == [CONFIG.learning_rate] * 2
    assert found.llapor.network == "tuned 1"


def test_the_one_that_serves_better_is_in_use(trace, monkeypatch):
    """The first as soon as its traffic returns, though the tuned one errs less than the threshold then; and
    the tuned one, without learning again, when the traffic changes again. Not for a single block."""

    def recalls(network, block):
        if block < 10 or block in (13, 17, 18):
            return 0.5 if network == "first" else 0.7
        return 0.97 if network == "first" else 0.92

    found, _ = scripted(trace, monkeypatch, recalls)
    before = found.llapor
    feed(found, trace, 9)
    assert found.llapor.network == "tuned 1"
    feed(found, trace, 7)
    assert [look.rows // CHECK_EVERY for look in found.looks if look.returned] == [12]
    assert found.llapor is before
    feed(found, trace, 3)
    assert [look.rows // CHECK_EVERY for look in found.looks if look.resumed] == [19]
    assert found.llapor.network == "tuned 1"
    assert sum(look.accepted for look in found.looks) == 1


def test_of_equals_none_takes_over(trace, monkeypatch):
    """Of two that differ by noise alone, the one in use stays; a small lead counts once it is certain."""

    def recalls(network, block):
        if block < 10:
            return 0.5 if network == "first" else 0.7
        lead = 0.004 * (-1) ** block if block < 30 else 0.004 + 0.001 * (-1) ** block
        return 0.95 + lead * (network == "first")

    found, _ = scripted(trace, monkeypatch, recalls)
    feed(found, trace, 30)
    assert not any(look.returned or look.resumed for look in found.looks)
    feed(found, trace, 6)
    assert sum(look.returned for look in found.looks) == 1


def test_the_window_is_bounded_and_under_the_threshold_nothing_is_tried(trace):
    found = tuner(trace, threshold=1.0)
    rows = stream(trace)
    for start in range(0, 1200, 50):  # rows come in any number
        found.feed(part(rows, slice(start, start + 50)))
    assert found.llapor is found._first
    assert not any(look.tried for look in found.looks)
    kept = np.concatenate([block.hidden for block in found._blocks])
    np.testing.assert_array_equal(kept, rows.hidden[1152 - 1024 : 1152])
    assert [look.rows for look in found.looks] == list(range(64, 1200, 64))
    errors = [look.error for look in found.looks]
    assert found.looks[-1].recent_error == pytest.approx(np.mean(errors[-4:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 10, "steps": 0}, "window must be 1024 or more, got 10; steps must be 1 or more, got 0"),
        ({"threshold": 2.0}, r"threshold must be in 0\.\.1, got 2\.0"),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0"),
        ({"margin": -1.0}, r"margin must be 0 or more, got -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TuningConfig(**changes)


def test_an_engine_teaches_it_and_gives_the_same_tokens():
    model = random_model()
    prompts = [list(range(3, 40)), list(range(11, 30)), [7] * 25]
    with Engine(model) as engine:
        oracle = engine.generate(prompts, max_new_tokens=16).token_ids
    online = Online(llapor_of(model), replace(CONFIG, threshold=0.0, steps=4))
    with pytest.raises(ValueError, match="no engine has used this predictor"):
        online.finish()
    budget = model.bank.total_bytes // 2
    config = OffloadConfig(device_budget=budget, policy="fate", predictor=online)
    with Engine(model, config) as engine:
        for _ in range(5):
            # It keeps up however slow the machine is: steps that it has no time for are left out.
            found = engine.generate(prompts, max_new_tokens=16, on_token=lambda event: online.finish())
            assert found.token_ids == oracle
        bound = engine.runner.forecasts.inputs(0)[0]
    tuned = online.finish()
    assert any(look.tried for look in online.tuner.looks)
    if tuned is not online._first:  # the engine forecasts with what was learned
        wanted = tuned.params(Routers.of(model))[0].network
        for mine, theirs in zip(jax.tree.leaves(bound.network), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_next_tokens_are_those_of_the_same_requests(monkeypatch):
    """Not of a newcomer in a freed slot, nor of the next chunk of a prompt."""
    model, linked = random_model(), []
    online = Online(llapor_of(model))
    monkeypatch.setattr(
        online, "_learn", lambda learner, seen, rows, follows: linked.append((len(rows), follows))
    )
    config = OffloadConfig(
        device_budget=model.bank.total_bytes // 2,
        policy="fate",
        predictor=online,
        prefill_chunk_size=16,
        max_num_seqs=2,
    )
    requests = [Request(prompt=[3] * size, max_new_tokens=new) for size, new in ((2, 6), (2, 3), (33, 3))]
    with Engine(model, config) as engine:
        # It keeps up: else steps are left out.
        step = engine.runner.step
        monkeypatch.setattr(engine.runner, "step", lambda *inputs: online.finish() and step(*inputs))
        engine.generate(requests)
        online.finish()
    prefill = [(2, False), (2, False)]  # each of the first two is all that a step of 16 tokens has room for
    decode = [(2, False), (2, True)]  # then one has ended
    chunks = [(16, False), (16, False), (1, False)]
    assert linked == prefill + decode + chunks + [(2, False), (2, True), (1, False)]


def test_a_predictor_of_another_model_is_refused():
    llapor = llapor_of(random_model())
    other = random_model(seed=5)
    for predictor in (llapor, Online(llapor)):
        config = OffloadConfig(device_budget=other.bank.total_bytes // 2, policy="fate", predictor=predictor)
        with pytest.raises(ValueError, match="this predictor belongs to another model: routers"):
            Engine(other, config)
