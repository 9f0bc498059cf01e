"""Tuning: tried when it errs, kept only if it is better, bounded in memory, and never a change of tokens."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import random_model
from synthetic import CHOICES, EXPERTS, LAYERS, SMALL, untrained, write_trace

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.identity import ModelIdentity
from predictor.dataset import for_training, load_rows
from predictor.llapor import LLaPor
from predictor.online import Online
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.step import first_params, stacks
from predictor.train import batch_of
from predictor.tuning import Tuner, TuningConfig, part

CONFIG = TuningConfig(window=512, threshold=0.1, steps=24, batch=64, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def optax_rules():
    """Optax mixes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("tuning") / "trace", documents=60, tokens=32)


def stream(trace, shuffled=False):
    """The training rows as NumPy arrays, in order."""
    rows = load_rows(trace, for_training)
    found = jax.tree.map(np.asarray, batch_of(rows, np.arange(len(rows))))
    if shuffled:  # nothing says any more who chooses what
        rng = np.random.default_rng(0)
        names = ("experts", "following")
        random = {name: rng.integers(0, EXPERTS, (len(rows), LAYERS, CHOICES)) for name in names}
        found = replace(found, **random)
    return found


def tuner(trace, **changes):
    return Tuner(untrained(trace), Routers.load(trace.folder), replace(CONFIG, **changes))


def test_it_learns_what_it_sees_and_looks_back(trace):
    found = tuner(trace)
    before = found.llapor
    assert found.feed(stream(trace))
    tried = [look for look in found.looks if look.tried]
    assert tried
    assert all(look.accepted == (look.after > look.before) for look in tried)
    assert any(look.accepted for look in tried)
    first, last = found.looks[0].error, np.mean([look.error for look in list(found.looks)[-4:]])
    assert last < first - 0.05
    assert found.llapor is not before  # what was given stays as it is
    np.testing.assert_array_equal(
        jax.tree.leaves(before.network)[0], jax.tree.leaves(untrained(trace).network)[0]
    )


def test_what_is_not_better_is_rolled_back(trace, monkeypatch):
    found = tuner(trace)
    before = found.llapor
    worse = jax.tree.map(lambda leaf: -leaf, before.network)
    monkeypatch.setattr(found, "_tuned", lambda rows: worse)
    monkeypatch.setattr(found, "_recall", lambda network, rows, horizon=None: 0.5 - 0.4 * (network is worse))
    assert not found.feed(part(stream(trace), slice(512)))
    assert found.llapor is before
    assert any(look.tried for look in found.looks)
    assert not any(look.accepted for look in found.looks)


def test_under_the_threshold_nothing_is_tried(trace):
    found = tuner(trace, threshold=1.0)
    assert not found.feed(stream(trace))
    assert not any(look.tried for look in found.looks)


def test_the_window_is_bounded(trace):
    found = tuner(trace, threshold=1.0, window=256)
    for start in range(0, 1000, 50):  # blocks of any size
        found.feed(part(stream(trace), slice(start, start + 50)))
    kept = sum(len(block.has_next) for block in found._blocks)
    assert 256 <= kept < 256 + 64
    assert [look.rows for look in found.looks] == sorted({look.rows for look in found.looks})
    assert len(found.looks) == 1000 // 64


def test_what_was_tuned_can_be_kept(trace, tmp_path):
    found = tuner(trace)
    found.feed(stream(trace))
    found.llapor.save(tmp_path / "tuned")
    read = LLaPor.load(tmp_path / "tuned")
    one, other = (jax.tree.leaves(llapor.network) for llapor in (found.llapor, read))
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 10, "steps": 0}, "window must be 256 or more, got 10; steps must be 1 or more, got 0"),
        ({"threshold": 2.0}, r"threshold must lie in 0\.\.1, got 2\.0"),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TuningConfig(**changes)


def llapor_of(model):
    identity = ModelIdentity.of(model)
    layers, width = identity.num_layers, identity.hidden_size
    eye = np.broadcast_to(np.eye(width, dtype=np.float32), (layers, width, width)).copy()
    basis = Basis(
        np.zeros((layers, width), np.float32), eye, np.ones((layers, width), np.float32), np.ones(layers)
    )
    found = stacks(identity, width, 2, SMALL)
    return LLaPor(identity, 2, basis, found, first_params(identity, found, 2, 0))


def test_an_engine_teaches_it_and_gives_the_same_tokens():
    model = random_model()
    prompts = [list(range(3, 40)), list(range(11, 30)), [7] * 25]
    with Engine(model, OffloadConfig(numerics="exact")) as engine:
        oracle = engine.generate(prompts, max_new_tokens=24).tokens
    online = Online(llapor_of(model), replace(CONFIG, window=256, threshold=0.0, steps=4))
    with pytest.raises(ValueError, match="no engine has used this predictor"):
        online.finish()
    budget = model.bank.total_bytes // 2
    config = OffloadConfig(device_budget=budget, policy="fate", numerics="exact", predictor=online)
    with Engine(model, config) as engine:
        for _ in range(5):
            # It keeps up however slow the machine is: steps that it has no time for are left out.
            found = engine.generate(prompts, max_new_tokens=24, on_token=lambda event: online.finish())
            assert found.tokens == oracle
        bound = engine.runner.forecasts.inputs(0)[0]
    tuned = online.finish()
    assert any(look.tried for look in online.tuner.looks)
    accepted = any(look.accepted for look in online.tuner.looks)
    assert accepted == (tuned is not online._first)
    if accepted:  # the engine forecasts with what was learned
        wanted = tuned.params(Routers.of(model))[0].network
        for mine, theirs in zip(jax.tree.leaves(bound.network), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_predictor_of_another_model_is_refused():
    llapor = llapor_of(random_model())
    other = random_model(seed=5)
    for predictor in (llapor, Online(llapor)):
        config = OffloadConfig(device_budget=other.bank.total_bytes // 2, policy="fate", predictor=predictor)
        with pytest.raises(ValueError, match="this predictor belongs to another model: routers"):
            Engine(other, config)
