"""Rows of caches: put into others, and given more room. Of a cache it knows that rows lead in each array."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np


@functools.partial(jax.jit, donate_argnames="caches")
def put_rows(caches: Any, rows: jax.Array, newcomers: Any) -> Any:
    """Writes what newcomers have cached over the beginning of the rows that become theirs.

    What an earlier request left behind them lies after every position that the new one attends to, until the
    new one has written there itself.

    Args:
        caches: a tree of arrays of B rows, donated.
        rows: [N] int32; B or more for padding, which is dropped.
        newcomers: the same tree, its arrays of N rows and along no other axis longer.
    """

    def put(held: jax.Array, new: jax.Array) -> jax.Array:
        beginning = tuple([slice(None, size) for size in new.shape[1:]])
        return held.at[(rows, *beginning)].set(new, mode="drop")

    return jax.tree.map(put, caches, newcomers)


def grown(caches: Any, roomier: Any) -> Any:
    """Moves all rows of `caches` to the first of `roomier`, empty caches of more rows or positions, donated.

    While it does so both are in memory.
    """
    rows = jax.tree.leaves(caches)[0].shape[0]
    return put_rows(roomier, np.arange(rows, dtype=np.int32), caches)
