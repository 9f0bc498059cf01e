"""Which rows go to which expert: from a router's choices to a few products of bounded shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from layerscope_jax.models.experts import block_rows
from layerscope_jax.support.njit import njit
from layerscope_jax.support.units import next_power

MIN_ROWS, MAX_ROWS = 2, 128
"""Row buckets are the powers of two between them. XLA's CPU product is slow with one row; past 128 rows an
expert's weights are read often enough per row, and more buckets would only mean more programs."""

GROUP_SIZES = (16, 4, 1)
"""Experts in one dispatch. The largest hides the cost of dispatching; each is a program of its own to
compile, for each row bucket, so they are few."""

TILES = 16
"""Tiles in one dispatch, always: one program serves every routing. Few enough that the last dispatch is not
mostly padding where few experts are computed."""


@dataclass(frozen=True)
class Group:
    """Experts with equal row buckets, computed in one dispatch.

    Attributes:
        experts: N numbers within the layer; padding repeats the first.
        slots: [N, M] int32 output rows `token * K + choice`; padding is T * K, a row that nobody reads.
        rows: real rows among the N * M.
    """

    experts: tuple[int, ...]
    slots: np.ndarray
    rows: int


@njit(cache=True)
def by_expert(chosen, active, choices):
    """Compiled: on so few numbers a dozen calls of NumPy cost many times what they do.

    Args:
        chosen: [A] experts, int32.
        active: [T] bool.
        choices: K, A = T * K.

    Returns:
        order: as of `Assignments`.
        bounds: [2, E] its starts and ends, up to the last expert that was chosen.
        demand: [2, n] experts that have tokens, in order, and how many.
    """
    last = 0
    for slot in range(len(chosen)):
        if active[slot // choices] and chosen[slot] > last:
            last = chosen[slot]
    counts = np.zeros(last + 1, np.int64)
    for slot in range(len(chosen)):
        if active[slot // choices]:
            counts[chosen[slot]] += 1
    bounds, demand, size = np.zeros((2, last + 1), np.int64), np.empty((2, last + 1), np.int64), 0
    for expert in range(last + 1):
        bounds[0, expert] = 0 if expert == 0 else bounds[1, expert - 1]
        bounds[1, expert] = bounds[0, expert] + counts[expert]
        if counts[expert]:
            demand[0, size], demand[1, size] = expert, counts[expert]
            size += 1
    order, places = np.empty(bounds[1, last], np.int32), bounds[0].copy()
    for slot in range(len(chosen)):
        if active[slot // choices]:
            order[places[chosen[slot]]] = slot
            places[chosen[slot]] += 1
    return order, bounds, demand[:, :size]


class Assignments:
    """A layer's tokens sorted by expert.

    Args:
        experts: [T, K] chosen experts.
        active: [T] bool; rows of padding and of finished requests are no demand. None for all.

    Attributes:
        choices: K.
        total: T * K.
        demand: expert -> tokens, of those that have any, in order.
        assigned: A, number of rows of all these experts.
        order: [A] int32 output rows `token * K + choice`, expert after expert, in token order; of a part's
            experts some of them.
        starts, ends: [E] where each expert's begin and end in `order`.

    >>> assignments = Assignments(np.array([[3, 1], [3, 0]]))
    >>> assignments.demand
    {0: 1, 1: 1, 3: 2}
    >>> assignments.slots(3)
    array([0, 2], dtype=int32)
    """

    def __init__(self, experts: np.ndarray, active: np.ndarray | None = None):
        self.choices = experts.shape[1]
        self.total = experts.size
        chosen = experts.reshape(-1).astype(np.int32, copy=False)
        if active is None:
            active = np.ones(len(experts), np.bool_)
        self.order, (self.starts, self.ends), (demanded, tokens) = by_expert(chosen, active, self.choices)
        self.demand = dict(zip(demanded.tolist(), tokens.tolist(), strict=True))
        self.assigned = len(self.order)

    def slots(self, expert: int) -> np.ndarray:
        """Output rows of an expert, in token order."""
        return self.order[self.starts[expert] : self.ends[expert]]

    def part(self, experts: range) -> Assignments:
        """Returns the assignments of some experts that follow each other, numbered from 0.

        >>> Assignments(np.array([[3, 1], [3, 0]])).part(range(2, 4)).demand
        {1: 2}
        """
        part = copy.copy(self)
        part.starts = self.starts[experts.start : experts.stop]
        part.ends = self.ends[experts.start : experts.stop]
        part.demand = {e - experts.start: n for e, n in self.demand.items() if e in experts}
        part.assigned = sum(part.demand.values())
        return part

    def groups(self, experts: Iterable[int]) -> list[Group]:
        """Parts `experts` into dispatches.

        An expert's rows are cut into full pieces of `MAX_ROWS` and one remainder in the smallest bucket that
        holds it. This depends on nothing but its own token count, so its results have the same bits whatever
        else is computed, wherever it is.
        """
        pieces: dict[int, list[tuple[int, np.ndarray]]] = {}
        for expert in experts:
            slots = self.slots(expert)
            for start in range(0, len(slots), MAX_ROWS):
                piece = slots[start : start + MAX_ROWS]
                pieces.setdefault(row_bucket(len(piece)), []).append((expert, piece))
        return [
            self._group(bucket, size, part)
            for bucket, cut in sorted(pieces.items())
            for size, part in dispatches(cut)
        ]

    def tiles(self, experts: Sequence[int], slots: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
        """Parts the rows of `experts` into tiles, an expert of more rows than a tile into several.

        How an expert's rows are cut depends on nothing but their number and the tile's.

        Args:
            experts: numbers within the layer, one or more.
            slots: where each of them is kept.
            shape: (N, M), tiles of a dispatch and rows of a tile, as of `tile_shape`.

        Returns:
            [dispatches, N, M + 1] int32: output rows of each tile, padding T * K, and then its slot. What the
            last dispatch lacks are tiles of the last slot with padding alone.
        """
        count, size = shape
        index = np.array(experts)
        kept, firsts, lasts = pieces(np.array(slots), self.starts[index], self.ends[index], size)
        ranks = firsts[:, None] + np.arange(size)
        there = ranks < lasts[:, None]
        places = np.full((-(-len(kept) // count) * count, size + 1), self.total, np.int32)
        places[: len(kept), :-1][there] = self.order[ranks[there]]
        places[: len(kept), -1] = kept
        places[len(kept) :, -1] = kept[-1]
        return places.reshape(-1, count, size + 1)

    def _group(self, bucket: int, size: int, pieces: list[tuple[int, np.ndarray]]) -> Group:
        slots = np.full((size, bucket), self.total, np.int32)
        for index, (_, piece) in enumerate(pieces):
            slots[index, : len(piece)] = piece
        chosen = [expert for expert, _ in pieces]
        chosen += chosen[:1] * (size - len(chosen))
        return Group(tuple(chosen), slots, sum(len(piece) for _, piece in pieces))


def tile_shape(total: int, num_experts: int) -> tuple[int, int]:
    """Tiles of a dispatch, and rows of a tile, which depend on the number of rows in a step alone.

    Args:
        total: T * K.
        num_experts: E, over which these rows are spread.

    >>> tile_shape(total=4096 * 8, num_experts=64), tile_shape(total=16 * 8, num_experts=64)
    ((16, 128), (16, 2))
    >>> tile_shape(total=4, num_experts=8)
    (4, 2)
    """
    rows = block_rows(total, num_experts, MAX_ROWS)
    return min(TILES, total, (total + num_experts * (rows - 1)) // rows), rows


def pieces(
    whose: np.ndarray, firsts: np.ndarray, lasts: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same experts with at most so many rows each, an expert of more several times.

    >>> whose, firsts, lasts = pieces(np.array([[1], [2]]), np.array([0, 5]), np.array([5, 7]), 2)
    >>> whose.tolist(), firsts.tolist(), lasts.tolist()
    ([[1], [1], [1], [2]], [0, 2, 4, 5], [2, 4, 5, 7])
    """
    counts = -(-(lasts - firsts) // most)
    index = np.repeat(np.arange(len(firsts)), counts)
    firsts = firsts[index] + most * (np.arange(len(index)) - (np.cumsum(counts) - counts)[index])
    return whose[index], firsts, np.minimum(firsts + most, lasts[index])


def possible_groups(tokens: int, choices: int, num_experts: int) -> list[tuple[int, int]]:
    """Shapes (row bucket, experts) of all dispatches that `Assignments.groups` can give: at most 21.

    Args:
        tokens: T, at most so many.
        choices: K.
        num_experts: E.

    >>> possible_groups(tokens=2, choices=2, num_experts=8)
    [(2, 1), (2, 4)]
    """
    result = []
    for bucket in [row_bucket(1 << power) for power in range(1, MAX_ROWS.bit_length())]:
        rows = 1 if bucket == MIN_ROWS else bucket // 2 + 1  # the fewest that it is taken for
        for size in reversed(GROUP_SIZES):
            pieces = filled(size)
            # Of full pieces an expert may have several, of all others one.
            enough = pieces <= num_experts or bucket == MAX_ROWS
            if enough and rows <= tokens and pieces * rows <= tokens * choices:
                result.append((bucket, size))
    return result


def row_bucket(tokens: int) -> int:
    """The smallest bucket that holds `tokens` rows.

    >>> [row_bucket(n) for n in (1, 2, 3, 100)]
    [2, 2, 4, 128]
    """
    return max(MIN_ROWS, next_power(tokens))


def filled(size: int) -> int:
    """The fewest pieces that make a dispatch of `size`."""
    return (3 * size + 3) // 4


def dispatches(pieces: list) -> list[tuple[int, list]]:
    """Cuts a list into (size, part): each size is filled at least to three quarters.

    >>> [(size, len(part)) for size, part in dispatches(list(range(29)))]
    [(16, 16), (16, 13)]
    >>> [(size, len(part)) for size, part in dispatches(list(range(9)))]
    [(4, 4), (4, 4), (1, 1)]
    """
    parts = []
    while pieces:
        size = next(size for size in GROUP_SIZES if len(pieces) >= filled(size))
        parts.append((size, pieces[:size]))
        pieces = pieces[size:]
    return parts
