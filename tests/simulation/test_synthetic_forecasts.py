"""Forecasts of a given recall: the truth, popularity, and between them in proportion."""

import numpy as np
import pytest

from layerscope_jax.simulation.synthetic_forecasts import forecast_of_recall

S, L, E, W = 40, 3, 500, 4


@pytest.fixture
def counts():
    """Of 32 choices, among so many experts that chance is hardly ever right."""
    return np.random.default_rng(1).multinomial(32, np.full(E, 1 / E), (S, L))


def ahead(counts, distance):
    """[S, L, E] the truth so many layers after each, zeros past the end."""
    flat = counts.reshape(S * L, E)
    return np.concatenate([flat[distance:], np.zeros((distance, E), int)]).reshape(S, L, E)


def test_recall_one_is_the_truth(counts):
    found = forecast_of_recall(counts, 1.0, W, seed=0)
    assert (found.shape, found.dtype) == ((S, L, W, E), np.float32)
    for distance in range(1, W + 1):
        np.testing.assert_array_equal(found[:, :, distance - 1], ahead(counts, distance))


@pytest.mark.parametrize("recall", [0.2, 0.5, 0.9])
def test_as_much_is_right_as_was_asked(counts, recall):
    found = forecast_of_recall(counts, recall, W, seed=0)
    for distance in range(1, W + 1):
        true = ahead(counts, distance)
        np.testing.assert_array_equal(found[:, :, distance - 1].sum(-1), true.sum(-1))  # no token is lost
        chance = 32 / E  # at most, for what is not right on purpose
        kept = np.minimum(found[:, :, distance - 1], true).sum() / true.sum()
        spread = 4 * np.sqrt(recall * (1 - recall) / true.sum())
        assert recall - spread < kept < recall + (1 - recall) * chance + spread


def test_recall_zero_is_popularity_alone():
    rng = np.random.default_rng(2)
    popular = rng.dirichlet(np.full(8, 0.5), 2)  # [L, E]
    counts = np.stack([rng.multinomial(16, row, 400) for row in popular], 1)
    found = forecast_of_recall(counts, 0.0, 1, seed=0)[:-1, :, 0]
    true = counts.mean(0) / 16
    np.testing.assert_allclose(found[:, 0].mean(0) / 16, true[1], atol=0.03)
    np.testing.assert_allclose(found[:, 1].mean(0) / 16, true[0], atol=0.03)
    # It knows nothing of the step that comes.
    coming = counts[:-1, 1] - counts[:-1, 1].mean(0)
    assert abs(((found[:, 0] - found[:, 0].mean(0)) * coming).mean()) < 0.1


def test_the_seed_alone_decides(counts):
    first, again, other = (forecast_of_recall(counts, 0.5, 2, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_look_ahead_past_the_end_is_zeros():
    counts = np.ones((1, 2, 3), int)
    found = forecast_of_recall(counts, 1.0, 4, seed=0)
    assert found.shape == (1, 2, 4, 3)
    assert found.sum() == 3  # the first layer's of the second


@pytest.mark.parametrize(("recall", "look_ahead"), [(-0.1, 1), (1.1, 1), (float("nan"), 1), (0.5, 0)])
def test_what_is_out_of_range_is_refused(counts, recall, look_ahead):
    with pytest.raises(ValueError, match="must"):
        forecast_of_recall(counts, recall, look_ahead, seed=0)
