"""Bound on the hit rate: the highest that any replacement policy can reach."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from layerscope_jax.scheduling.plan import ExpertId


def belady_hit_rate(counts: np.ndarray, slots: int, resident: Iterable[ExpertId] = ()) -> float:
    """Returns the highest hit rate that any replacement policy can reach without prefetching.

    Evicts the expert that is needed again farthest in the future (Belady, "A study of replacement algorithms
    for a virtual-storage computer", IBM Systems Journal 5(2), 1966). A whole layer is requested at a time,
    and a requested expert need not be kept: after each layer, of the resident and the requested experts those
    stay whose next use comes soonest.

    Args:
        counts: [S, L, E] tokens routed to each expert.
        slots: number of experts that the budget holds.
        resident: experts on the device at the beginning.

    Returns:
        Fraction of active experts that are resident when their layer is planned; 1 without active experts.

    >>> counts = np.array([[[1, 0, 0]], [[0, 1, 1]], [[1, 0, 1]]])  # one layer, three steps
    >>> belady_hit_rate(counts, slots=1), belady_hit_rate(counts, slots=2)
    (0.2, 0.4)
    """
    steps, layers, experts = counts.shape
    never = steps * layers
    # The turn of each expert's next use, from every step on.
    turn = np.arange(never).reshape(steps, layers, 1)
    uses = np.concatenate([np.where(counts > 0, turn, never), np.full((1, layers, experts), never)])
    following = np.minimum.accumulate(uses[::-1])[::-1]
    kept: dict[tuple[int, int], int] = {}
    farthest: list[
        tuple[int, tuple[int, int]]
    ] = []  # heap; entries that `kept` disagrees with are out of date

    def keep(expert: tuple[int, int], use: int) -> None:
        if use < never:
            kept[expert] = use
            heapq.heappush(farthest, (-use, expert))

    def shrink() -> None:
        while len(kept) > slots:
            use, expert = heapq.heappop(farthest)
            if kept.get(expert) == -use:
                del kept[expert]

    for layer, expert in set(resident):
        keep((layer, expert), int(following[0, layer, expert]))
    shrink()
    hits = asked = 0
    for step, layer in np.ndindex(steps, layers):
        for expert in np.flatnonzero(counts[step, layer]).tolist():
            asked += 1
            hits += kept.pop((layer, expert), None) is not None
            keep((layer, expert), int(following[step + 1, layer, expert]))
        shrink()
    return hits / asked if asked else 1.0
