"""Measures of forecasts, against counts by hand and by plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from predictor import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_places_are_those_of_a_stable_sort(rng):
    ranking = rng.integers(0, 4, (50, 9)).astype(np.float32)  # many are equal
    experts = np.argsort(rng.random((50, 9)), 1)[:, :3]
    order = np.argsort(-ranking, 1, kind="stable")
    expected = [[row.tolist().index(one) for one in true] for row, true in zip(order, experts, strict=True)]
    assert metrics.places(jnp.asarray(ranking), jnp.asarray(experts)).tolist() == expected


def test_recall_of_a_case_by_hand():
    # Six are true; the forecast has places 0, 1 and 2 right, then one wrong, then one right at place 4.
    place = jnp.array([0, 1, 2, 4, 6, 63])
    assert metrics.exact_recall(place).item() == pytest.approx(4 / 6)  # 0, 1, 2 and 4 of six
    assert metrics.relaxed_recall(place).item() == 3 / 4  # the four likeliest: three are true


@pytest.mark.parametrize(("choices", "few"), [(1, 1), (2, 2), (3, 2), (4, 3), (6, 4), (8, 6)])
def test_relaxed_recall_asks_two_thirds(choices, few):
    """One place too far for all but the first `few - 1`."""
    place = jnp.array([*range(few - 1), *range(few, choices + 1)])
    assert metrics.relaxed_recall(place).item() == pytest.approx((few - 1) / few)


def test_reliability_counts_every_probability_once(rng):
    probabilities = rng.random((40, 6)).astype(np.float32)
    probabilities[0] = [0.0, 1.0, 0.1, 0.95, 0.5, 0.9]
    truth = (rng.random((40, 6)) < 0.3).astype(np.float32)
    bins = np.asarray(metrics.reliability(jnp.asarray(probabilities), jnp.asarray(truth)).sum(0))
    assert bins[:, 0].sum() == 240
    np.testing.assert_allclose(bins.sum(0), [240, probabilities.sum(), truth.sum()], rtol=1e-5)
    inside = (probabilities >= 0.3) & (probabilities < 0.4)
    np.testing.assert_allclose(
        bins[3], [inside.sum(), probabilities[inside].sum(), truth[inside].sum()], rtol=1e-5
    )


def test_calibration_error_by_hand():
    # Two at 0.1 of which none came true, two at 0.9 of which one did: (2 * 0.1 + 2 * 0.4) / 4.
    probabilities, truth = jnp.array([0.15, 0.05, 0.9, 0.9]), jnp.array([0.0, 0.0, 1.0, 0.0])
    bins = np.asarray(metrics.reliability(probabilities, truth))
    assert metrics.calibration_error(bins) == pytest.approx(0.25)


def batch(probabilities, truth, rows):
    values = (probabilities, metrics.log_absence(probabilities), truth)
    return metrics.BatchSums(*(np.asarray(metrics.batch_sum(value, rows)) for value in values))


def test_presence_and_counts_by_hand():
    probabilities = jnp.array([[0.3, 0.9, 0.0], [0.3, 0.9, 0.1], [1.0, 1.0, 1.0]])
    truth = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    scores = metrics.batch_scores(batch(probabilities, truth, jnp.array([[0, 1], [0, -1]])))
    # 1 - 0.7 * 0.7 = 0.51: the first is foreseen in the batch of two, though in neither row alone.
    assert scores.foreseen.tolist() == [2, 1]
    assert scores.present.tolist() == [3, 2]
    assert scores.both.tolist() == [2, 1]
    np.testing.assert_allclose(scores.error, [(0.4 + 0.2 + 0.9) / 3, (0.7 + 0.1 + 0.0) / 3], rtol=1e-5)
    np.testing.assert_allclose(scores.tokens, [4 / 3, 2 / 3], rtol=1e-6)


def test_prefetch_by_hand():
    expected = np.array([[0.5, 2.0, 1.0, 0.1]])
    counts = np.array([[0.0, 3.0, 0.0, 1.0]])
    wasted, covered = metrics.prefetch(metrics.BatchSums(expected, np.zeros_like(expected), counts))
    np.testing.assert_allclose(wasted, [[0, 1 / 2, 2 / 3, 2 / 4]])
    np.testing.assert_allclose(covered, [[3 / 4, 3 / 4, 3 / 4, 1]])
    # Two had a token; of the two with most expected tokens one did, with three of the four.
    np.testing.assert_allclose(metrics.batch_recall(covered, counts), [3 / 4])
