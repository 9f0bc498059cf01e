"""Prefixes that are computed already: which tokens the caches of slots hold, and which prompts share them.

Decisions depend only on tokens and counts (no array of a device, no clock).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

MIN_SHARED = 16
"""Fewest shared tokens for which a cache is copied."""

POSITIONS_PER_TOKEN = 64
"""Cache positions whose copy takes about as long as one token's prefill: copies are of whole rows. Roughly
right for models with 3B active parameters on a CPU; the larger the model, the less a copy matters."""

WORTH_A_STEP = 256
"""Fewest tokens saved for which requests wait until the prefix that they share has been prefilled: another
step reads all weights again, which takes as long as computing a few hundred tokens more."""


class Found(NamedTuple):
    """A slot whose cache begins with the same tokens as a prompt.

    Attributes:
        row: the slot.
        length: number of these tokens.
    """

    row: int
    length: int


class Prefixes:
    """The tokens in the caches of slots, and when each slot was last used.

    Args:
        least: fewest shared tokens that count.

    >>> prefixes = Prefixes(least=2)
    >>> prefixes.hold(0, [5, 6, 7, 8])
    >>> prefixes.find([5, 6, 7, 9, 9])
    Found(row=0, length=3)
    >>> prefixes.find([5, 6, 7])  # the last token is computed in any case, for the logits that follow it
    Found(row=0, length=2)
    """

    def __init__(self, least: int = MIN_SHARED):
        self._least, self._whole = least, False
        self._held: dict[int, np.ndarray] = {}
        self._used: dict[int, int] = {}  # slot -> number of the latest use
        self._uses = 0

    def fit(self, length: int, whole: bool) -> None:
        """Sets what slots are like.

        Args:
            length: positions of each.
            whole: whether a cache can only be continued from its end, because a layer's state holds all of
                its tokens together.
        """
        self._least = max(self._least, length // POSITIONS_PER_TOKEN)
        self._whole = whole

    def hold(self, row: int, tokens: Sequence[int], runs: bool = False) -> None:
        """Notes that the cache of a slot holds these tokens, at positions from 0 on.

        Args:
            row: the slot.
            tokens: in its cache.
            runs: whether more tokens will follow them.
        """
        if runs and self._whole:
            self.drop(row)
            return
        self._held[row] = np.array(tokens, np.int32)
        self.use(row)

    def drop(self, row: int) -> None:
        """Notes that the cache of a slot holds nothing that can be reused."""
        self._held.pop(row, None)
        self._used.pop(row, None)

    def use(self, row: int) -> None:
        """Notes that a slot was used just now."""
        self._uses += 1
        self._used[row] = self._uses

    def keep(self, count: int, rows: int) -> list[int]:
        """Keeps the `count` most recently used of `rows` slots, renumbered in this order.

        Returns:
            Their old numbers.

        >>> prefixes = Prefixes(least=1)
        >>> for row in (0, 1, 2):
        ...     prefixes.hold(row, [row, row])
        >>> prefixes.keep(2, 4), prefixes.find([1, 1, 1])
        ([2, 1], Found(row=1, length=2))
        """
        kept = sorted(range(rows), key=lambda row: -self._used.get(row, 0))[:count]
        self._held = {new: self._held[old] for new, old in enumerate(kept) if old in self._held}
        self._used = {new: self._used[old] for new, old in enumerate(kept) if old in self._used}
        return kept

    def find(self, tokens: Sequence[int]) -> Found | None:
        """Returns the slot that shares most with a prompt; None if that is too little."""
        prompt, best = np.asarray(tokens, np.int32)[:-1], None
        for row, held in self._held.items():
            count = shared(held, prompt)
            if self._whole and count < len(held):
                continue
            if count >= self._least and (best is None or (count, -row) > (best.length, -best.row)):
                best = Found(row, count)
        return best

    def place(self, prompts: Sequence[Sequence[int]], free: Sequence[int]) -> list[int]:
        """Returns a free slot for each prompt.

        If most of what a slot holds is the beginning of the prompt, the prompt takes that slot. Otherwise it
        takes an unused slot or, if there is none, the least recently used one.
        """
        left = sorted(free, key=lambda row: (self._used.get(row, 0), row))
        rows = []
        for prompt in prompts:
            found = self.find(prompt)
            if found is None or found.row not in left or 2 * found.length <= len(self._held[found.row]):
                rows.append(left.pop(0))
            else:
                left.remove(found.row)
                rows.append(found.row)
        return rows

    def first(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Returns which prompts to prefill now: all, or those without which others would be computed twice.

        Prompts wait if together they share enough tokens with one of the others that no slot holds yet.
        """
        everyone = list(range(len(prompts)))
        if self._whole or len(prompts) == 1:
            return everyone
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
        known = [found.length if (found := self.find(prompt)) else 0 for prompt in prompts]
        now: dict[bytes, list[int]] = {}  # by their first tokens, so that only a few are compared
        saved = 0
        for number, array in enumerate(arrays):
            alike = now.setdefault(array[: self._least].tobytes(), [])
            most = max([shared(arrays[other], array[:-1]) for other in alike], default=0)
            if most >= self._least and most > known[number]:
                saved += most - known[number]
            else:
                alike.append(number)
        return sorted(chain(*now.values())) if saved >= WORTH_A_STEP else everyone


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """Returns how many tokens two sequences begin with alike.

    >>> shared(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    count = min(len(one), len(other))
    differs = one[:count] != other[:count]
    return int(differs.argmax()) if differs.any() else count


Place = Callable[[Sequence[int], Sequence[int]], Sequence[int]]
"""`(ids of requests, free slots)` -> a slot for each request."""
