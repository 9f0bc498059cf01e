"""Shards: rows of similar length that a worker completes together."""

from __future__ import annotations

from collections.abc import Sequence

from layerscope_jax.generation.requests import Request

SHARES = 8
"""Shards for each worker, if there are rows enough: the last one to end is late by an eighth of its time."""

MOST_BATCHES = 8
"""Rows of a shard at most, in batches of `max_num_seqs`: what it is given in one message."""


def expected_tokens(request: Request, prompt_tokens: int) -> int:
    """Returns the tokens that a request may take, of its prompt and of all its samples.

    >>> expected_tokens(Request(prompt="a", max_new_tokens=5), 3)
    8
    """
    return prompt_tokens + request.n * request.max_new_tokens


def shards_of(tokens: Sequence[int], workers: int, max_num_seqs: int) -> list[tuple[int, ...]]:
    """Returns all rows in shards, the longest rows first.

    Rows of similar length share a shard because the caches of a batch are as long as its longest row. The
    longest begin, as in Graham's rule for makespans: what is left for the end is short. A shard fills a batch
    at least, unless a worker would then have none.

    Args:
        tokens: expected tokens of each row.
        workers: number of workers.
        max_num_seqs: rows that a worker runs at once.

    Returns:
        The numbers of the rows of each shard.

    >>> shards_of([5, 90, 7, 80, 6, 8], workers=2, max_num_seqs=2)
    [(1, 3), (5, 2), (4, 0)]
    """
    order = sorted(range(len(tokens)), key=lambda row: (-tokens[row], row))
    least = min(max_num_seqs, -(-len(tokens) // workers))
    share = sum(tokens) / (workers * SHARES)
    shards: list[tuple[int, ...]] = []
    rows: list[int] = []
    taken = 0
    for row in order:
        rows.append(row)
        taken += tokens[row]
        if len(rows) >= least and (taken >= share or len(rows) >= MOST_BATCHES * max_num_seqs):
            shards.append(tuple(rows))
            rows, taken = [], 0
    return [*shards, tuple(rows)] if rows else shards
