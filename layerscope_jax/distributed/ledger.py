"""The ledger of a job: which worker has which rows, which are complete, and what becomes of a lost worker's.

It knows neither Ray nor a clock. The job (`layerscope_jax.distributed.crew`) and its simulation on a virtual
clock (`layerscope_jax.distributed.simulated`) keep the same one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from layerscope_jax.support.errors import LostWorkers


@dataclass(frozen=True)
class Shard:
    """Rows that a worker completes together.

    Attributes:
        rows: their numbers.
        losses: what became of the workers that had them since one of them was last completed, a sentence
            each.
    """

    rows: tuple[int, ...]
    losses: tuple[str, ...] = ()


class Ledger:
    """Which rows are waiting, with which worker, or complete; each is complete once.

    Args:
        shards: the rows, in the order in which they are given out.
        retries: how often a row may be given to another worker.

    Attributes:
        given: worker -> the shard that it has.
        complete: numbers of the rows that are complete.

    >>> ledger = Ledger([(0, 1), (2,)], retries=1)
    >>> ledger.give("a"), ledger.note("a", 0), ledger.note("a", 0)
    ((0, 1), True, False)
    >>> ledger.lose("a", "it has ended"), ledger.give("b")
    (1, (1,))
    """

    def __init__(self, shards: Iterable[tuple[int, ...]], retries: int):
        self._waiting = deque(Shard(rows) for rows in shards)
        self._retries = retries
        self._left = sum(len(shard.rows) for shard in self._waiting)
        self.given: dict[Hashable, Shard] = {}
        self.complete: set[int] = set()

    @property
    def left(self) -> int:
        """Number of rows that are not complete."""
        return self._left

    @property
    def waiting(self) -> int:
        """Number of shards that no worker has."""
        return len(self._waiting)

    def give(self, worker: Hashable) -> tuple[int, ...] | None:
        """Returns the rows of the next shard, which the worker now has; None if none is waiting."""
        assert worker not in self.given
        if not self._waiting:
            return None
        shard = self.given[worker] = self._waiting.popleft()
        return shard.rows

    def note(self, worker: Hashable, row: int) -> bool:
        """Returns whether a row that a worker completed counts: once, and only of the worker that has it."""
        shard = self.given.get(worker)
        if shard is None or row in self.complete or row not in shard.rows:
            return False
        self.complete.add(row)
        self._left -= 1
        return True

    def end(self, worker: Hashable) -> int:
        """Ends a worker's shard; rows that it left out are waiting again.

        Returns:
            The number of those rows.

        Raises:
            LostWorkers: as `lose`.
        """
        return self.lose(worker, "it ended a shard without completing all of its rows")

    def lose(self, worker: Hashable, why: str) -> int:
        """Puts the unfinished rows of a worker that was lost before all that are waiting.

        Rows that lose two workers in a row, without one of them being completed, are parted in halves, and so
        on: a row of which every worker dies is soon alone, and the others go on without it.

        Args:
            worker: the worker.
            why: what became of it, for the message.

        Returns:
            The number of those rows.

        Raises:
            LostWorkers: if a row that is alone has lost more workers than it may, or any row has and may lose
                none.
        """
        shard = self.given.pop(worker, None)
        if shard is None:
            return 0
        rows = tuple([row for row in shard.rows if row not in self.complete])
        if not rows:
            return 0
        has_progressed = len(rows) < len(shard.rows)
        losses = () if has_progressed and self._retries else (*shard.losses, why)
        half = len(rows) // 2 if len(losses) >= 2 else 0
        self._waiting.extendleft(Shard(part, losses) for part in (rows[half:], rows[:half]) if part)
        if len(losses) > self._retries and (len(rows) == 1 or not self._retries):
            raise LostWorkers(rows[0], losses)
        return len(rows)
