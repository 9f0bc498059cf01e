"""Slots: rows of the running batch, with their caches, last tokens and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from layerscope_jax.generation.prefixes import Prefixes
from layerscope_jax.generation.scheduler import batch_rows
from layerscope_jax.models.cache import grow, put_rows, take_rows
from layerscope_jax.models.rotary import PAD_POSITION

IDLE_ROWS = 4
"""Slots that stay when an idle engine gets a request: a step takes longer with each, in use or not."""


class Slots:
    """Rows of the running batch, which requests use in turn; their number and length grow with new requests.

    All caches have one length, so that a decode step is one program. The cost: a request that may become much
    longer than the others makes every row as long, in memory and in what XLA's attention reads.

    Args:
        new_caches: `(rows, length)` -> empty caches.
        prefixes: notes what the rows hold, so that later prompts may begin with it; None to compute every
            prompt whole.

    Attributes:
        caches: one for each decoder layer, with B rows; donated by each step.
        length: positions of each row.
        tokens: [B, 1] int32, the last token of each row.
        positions: [B, 1] int32, position of that token; `PAD_POSITION` in free rows.
    """

    def __init__(self, new_caches: Callable[[int, int], Any], prefixes: Prefixes | None = None):
        self._new_caches, self.prefixes = new_caches, prefixes
        self.caches: Any = None
        self.length = 0
        self.tokens = np.zeros((0, 1), np.int32)
        self.positions = np.zeros((0, 1), np.int32)

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def fit(self, rows: int, length: int) -> None:
        """Grows the caches to at least this many rows and positions."""
        if rows <= self.rows and length <= self.length:
            return
        more = max(0, rows - self.rows)
        length = max(length, self.length)
        if self.caches is None:
            self.caches = self._new_caches(more, length)
        else:
            self.caches = grow(self.caches, self.rows + more, length)
        self.length = length
        if self.prefixes is not None:
            self.prefixes.fit(length, any(None in cache.position_axes() for cache in self.caches))
        self.tokens = np.pad(self.tokens, ((0, more), (0, 0)))
        self.positions = np.pad(self.positions, ((0, more), (0, 0)), constant_values=PAD_POSITION)

    def shrink(self, requests: int) -> None:
        """Keeps the most recently used rows, enough for so many requests and a few more; all must be free."""
        rows = batch_rows(max(IDLE_ROWS, requests))
        if self.prefixes is None or rows >= self.rows:
            return
        self.caches = take_rows(self.caches, np.array(self.prefixes.keep(rows, self.rows), np.int32))
        self.tokens, self.positions = self.tokens[:rows].copy(), self.positions[:rows].copy()

    def take(self, rows: Sequence[int | None], width: int) -> Any:
        """Returns caches of `width` rows, each a copy of the row that is given for it; None for zeros."""
        at = np.full(width, self.rows, np.int32)
        for number, row in enumerate(rows):
            if row is not None:
                at[number] = row
                if self.prefixes is not None:
                    self.prefixes.use(row)
        return take_rows(self.caches, at)

    def put(self, rows: Sequence[int], sources: Sequence[int], caches: Any, width: int) -> None:
        """Copies the caches of new requests into the rows that they take.

        Args:
            rows: rows of the new requests.
            sources: row of `caches` that each of them gets; several may get the same one.
            caches: caches of the prompts, of `width` rows.
            width: number of rows of `caches`.
        """
        left = list(zip(sources, rows, strict=True))
        while left:  # each turn copies a row of `caches` at most once
            at = np.full(width, self.rows, np.int32)  # what goes past the last row is dropped
            turn = {source: row for source, row in reversed(left)}
            at[list(turn)] = list(turn.values())
            self.caches = put_rows(self.caches, at, caches)
            left = [(source, row) for source, row in left if turn[source] != row]

    def enter(self, row: int, token: int, position: int) -> None:
        """Sets the last token of a row and its position."""
        self.tokens[row] = token
        self.positions[row] = position

    def free(self, row: int) -> None:
        """Marks a row as free; attention gives its cached keys zero weight."""
        self.positions[row] = PAD_POSITION
