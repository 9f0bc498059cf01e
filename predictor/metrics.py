"""Metrics of a forecast of experts: functions of its probabilities and of the true experts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BINS = 10


def places(ranking: jax.Array, experts: jax.Array) -> jax.Array:
    """Returns the place [..., K] of each true expert in a ranking, 0 for the likeliest; ties by number.

    Args:
        ranking: [..., E] scores; larger is likelier.
        experts: [..., K] the true experts.

    >>> places(jnp.array([0.1, 0.5, 0.5, 0.9]), jnp.array([3, 2])).tolist()
    [0, 2]
    """
    mine = jnp.take_along_axis(ranking, experts, -1)[..., None]
    others = ranking[..., None, :]
    number = jax.lax.broadcasted_iota(experts.dtype, others.shape, others.ndim - 1)
    return ((others > mine) | ((others == mine) & (number < experts[..., None]))).sum(-1)


def exact_recall(place: jax.Array) -> jax.Array:
    """Returns the share [...] of the K true experts among the K likeliest, from places [..., K].

    >>> exact_recall(jnp.array([0, 2])).item()
    0.5
    """
    return (place < place.shape[-1]).mean(-1)


@jax.jit
def ranked_recall(ranking: jax.Array, experts: jax.Array) -> jax.Array:
    """Returns the exact recall [...] of a ranking [..., E] for the true experts [..., K]."""
    return exact_recall(places(ranking, experts))


def relaxed_recall(place: jax.Array) -> jax.Array:
    """Returns the paper's metric: the share of the 2K/3 (rounded up) likeliest that are true experts.

    For DeepSeek, it compares the four likeliest with the true six. It is mostly far above the exact recall,
    because the least certain experts do not count.

    >>> place = jnp.array([0, 1, 2, 3, 40, 50])
    >>> relaxed_recall(place).item(), round(exact_recall(place).item(), 2)
    (1.0, 0.67)
    """
    few = -(-2 * place.shape[-1] // 3)
    return (place < few).sum(-1) / few


def reliability(probabilities: jax.Array, truth: jax.Array) -> jax.Array:
    """Returns, for each tenth of 0..1, [..., 10, 3]: number of probabilities, their sum, number that came
    true.

    >>> bins = reliability(jnp.array([0.9375, 1.0, 0.25]), jnp.array([1.0, 0.0, 0.0]))
    >>> bins[2].tolist(), bins[9].tolist()
    ([1.0, 0.25, 0.0], [2.0, 1.9375, 1.0])
    """
    bins = jnp.clip((probabilities * BINS).astype(jnp.int32), 0, BINS - 1)
    sums = []
    for index in range(BINS):
        inside = (bins == index).astype(jnp.float32)
        sums.append(
            jnp.stack([inside.sum(-1), (inside * probabilities).sum(-1), (inside * truth).sum(-1)], -1)
        )
    return jnp.stack(sums, -2)


def calibration_error(bins: np.ndarray) -> float:
    """Returns the expected calibration error of `reliability` sums [10, 3]: mean |probability - frequency|.

    >>> calibration_error(np.array([[2, 0.2, 0.0], [2, 1.8, 1.0]]))
    0.25
    """
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / max(bins[:, 0].sum(), 1e-30))


def log_absence(probabilities: jax.Array) -> jax.Array:
    """Returns the log probability that an expert is not chosen, finite even if it surely is."""
    return jnp.log1p(-jnp.minimum(probabilities, 1 - 1e-6))


def batch_sum(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns sums [G, E] of values [N, E] over the rows of each of G batches.

    Args:
        rows: [G, M] rows of each batch, padded with -1.

    >>> batch_sum(jnp.array([[0.5], [0.25], [1.0]]), jnp.array([[0, 1], [2, -1]])).tolist()
    [[0.75], [1.0]]
    """
    return jnp.where((rows >= 0)[..., None], values[rows], 0.0).sum(1)


class BatchSums(NamedTuple):
    """Sums of each expert in G batches, by `batch_sum`.

    Attributes:
        expected: [G, E] sum of probabilities: the tokens that the forecast expects.
        absent: [G, E] sum of `log_absence`: log probability that no token chooses it.
        counts: [G, E] number of tokens that chose it.
    """

    expected: np.ndarray
    absent: np.ndarray
    counts: np.ndarray


class BatchScores(NamedTuple):
    """Scores of G batches, each [G].

    Attributes:
        foreseen: experts that more likely than not have a token, by the forecast.
        present: experts that had a token.
        both: experts that are foreseen and present.
        error: absolute difference of expected and true tokens, mean over experts.
        tokens: true tokens, mean over experts.
    """

    foreseen: np.ndarray
    present: np.ndarray
    both: np.ndarray
    error: np.ndarray
    tokens: np.ndarray


def batch_scores(sums: BatchSums) -> BatchScores:
    """Returns the predicted presence of experts in batches, and the error of their expected tokens.

    >>> sums = BatchSums(np.array([[1.5, 0.25]]), np.log(np.array([[0.25, 0.75]])), np.array([[1.0, 1.0]]))
    >>> [values.tolist() for values in batch_scores(sums)]
    [[1], [2], [1], [0.625], [1.0]]
    """
    expected, absent, counts = sums
    foreseen, present = absent <= np.log(0.5), counts > 0
    return BatchScores(
        foreseen.sum(-1),
        present.sum(-1),
        (foreseen & present).sum(-1),
        np.abs(expected - counts).mean(-1),
        counts.mean(-1),
    )


def prefetch(sums: BatchSums) -> tuple[np.ndarray, np.ndarray]:
    """Returns waste and coverage [G, E] of prefetching the m experts with most expected tokens, m = 1..E.

    Waste is the share of the m that no token chose; coverage is the share of (token, expert) pairs they
    serve.

    >>> sums = BatchSums(np.array([[3.0, 0.1, 1.0]]), np.zeros((1, 3)), np.array([[3.0, 1.0, 0.0]]))
    >>> [share.round(2).tolist() for share in prefetch(sums)]
    [[[0.0, 0.5, 0.33]], [[0.75, 0.75, 1.0]]]
    """
    order = np.argsort(-sums.expected, -1, kind="stable")
    counts = np.take_along_axis(sums.counts, order, -1)
    fetched = np.arange(1, counts.shape[-1] + 1)
    covered = np.cumsum(counts, -1)
    return np.cumsum(counts == 0, -1) / fetched, covered / np.maximum(covered[:, -1:], 1e-30)


def batch_recall(covered: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the recall [G] of a batch's set of experts, each weighed by its tokens.

    As many experts as had a token are prefetched, those with most expected tokens; the recall is the share of
    the (token, expert) pairs that they serve. In a batch of one token it is the exact top-k recall.

    Args:
        covered: [G, E] coverage, by `prefetch`.
        counts: [G, E] number of tokens that chose each expert; at least one for each batch.

    >>> covered, counts = np.array([[0.75, 0.75, 1.0]]), np.array([[3.0, 1.0, 0.0]])
    >>> batch_recall(covered, counts).tolist()
    [0.75]
    """
    present = (counts > 0).sum(-1, keepdims=True)
    return np.take_along_axis(covered, present - 1, -1)[:, 0]
