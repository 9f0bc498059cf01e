"""Slots: the rows of a running batch, with their caches, their last tokens and the positions of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from layerscope_jax.models.cache import grow, put_rows
from layerscope_jax.models.layers import PAD_POSITION


class Slots:
    """Rows that requests take turns in; they grow where a newcomer needs more of them, or longer ones.

    All caches have one length, so that a decode step is one program. What it costs: one request that may
    become much longer than the others makes every row as long, in memory and in what XLA's attention reads.

    Args:
        new_caches: `(rows, length)` -> empty caches.

    Attributes:
        caches: one a decoder layer, of B rows; donated by each step.
        length: positions of each row.
        tokens: [B, 1] int32, the last token of each row.
        positions: [B, 1] int32, its position; `PAD_POSITION` where nobody runs.
    """

    def __init__(self, new_caches: Callable[[int, int], Any]):
        self._new_caches = new_caches
        self.caches: Any = None
        self.length = 0
        self.tokens = np.zeros((0, 1), np.int32)
        self.positions = np.zeros((0, 1), np.int32)

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def fit(self, rows: int, length: int) -> None:
        """Makes room for so many rows and positions, where there is less."""
        if rows <= self.rows and length <= self.length:
            return
        more = max(0, rows - self.rows)
        length = max(length, self.length)
        if self.caches is None:
            self.caches = self._new_caches(more, length)
        else:
            self.caches = grow(self.caches, self.rows + more, length)
        self.length = length
        self.tokens = np.pad(self.tokens, ((0, more), (0, 0)))
        self.positions = np.pad(self.positions, ((0, more), (0, 0)), constant_values=PAD_POSITION)

    def put(self, rows: Sequence[int], caches: Any, width: int) -> None:
        """Puts newcomers' caches into rows that become theirs.

        Args:
            rows: of the newcomers.
            caches: theirs, of `width` rows; those past the newcomers are padding.
            width: at least as many as there are newcomers.
        """
        at = np.full(width, self.rows, np.int32)  # past the last row: padding goes nowhere
        at[: len(rows)] = rows
        self.caches = put_rows(self.caches, at, caches)

    def enter(self, row: int, token: int, position: int) -> None:
        """Enters the last token of a row and its position."""
        self.tokens[row] = token
        self.positions[row] = position

    def free(self, row: int) -> None:
        """Lets nobody run in a row; what its cache holds weighs nothing."""
        self.positions[row] = PAD_POSITION
