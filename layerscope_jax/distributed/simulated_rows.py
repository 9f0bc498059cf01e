"""Rows of simulated jobs: how long they are, how long they are expected to be, and shards of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from layerscope_jax.distributed.shards import shards_of
from layerscope_jax.distributed.simulated import Fleet


def drawn_tokens(rows: int, mean: float, spread: float, most: int, seed: int = 0) -> list[int]:
    """Returns lengths of rows, drawn from a log-normal distribution.

    Args:
        rows: how many.
        mean: of the lengths, before they are cut off.
        spread: standard deviation of their logarithms; 0 for equal lengths.
        most: of a length.
        seed: of the draws.

    >>> drawn_tokens(3, 100, 0.0, 1000)
    [100, 100, 100]
    """
    draws, middle = random.Random(seed), math.log(mean) - spread**2 / 2
    return [max(1, min(most, round(draws.lognormvariate(middle, spread)))) for _ in range(rows)]


def expected(tokens: Sequence[int], error: float, seed: int = 0) -> list[int]:
    """Returns lengths as they are expected: off by a factor drawn from a log-normal distribution."""
    draws = random.Random(seed)
    return [max(1, round(length * draws.lognormvariate(0.0, error))) for length in tokens]


def as_they_come(rows: int, workers: int) -> list[tuple[int, ...]]:
    """Returns one shard for each worker, of as many rows each, in the order in which they come.

    >>> as_they_come(5, 2)
    [(0, 1, 2), (3, 4)]
    """
    size = -(-rows // workers)
    return [tuple(range(start, min(rows, start + size))) for start in range(0, rows, size)]


def by_length(fleet: Fleet, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the shards that a real job on a fleet would have."""
    return shards_of(lengths, fleet.nodes, fleet.slots)
