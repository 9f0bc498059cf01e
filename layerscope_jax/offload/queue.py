"""Queue of copies to the device: demand before prefetch, expert by expert, one chunk at a time.

It has no clock, lock or arrays of its own: `layerscope_jax.offload.link.Transfers` holds its lock around
every call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from layerscope_jax.scheduling.plan import ExpertId


@dataclass(eq=False)
class Copy:
    """Copy of one expert.

    Attributes:
        expert: the expert.
        demanded: whether a layer waits for it.
        chunks: number of its chunks.
        begun: number of chunks that have begun.
        arrays: arrays that have arrived, in order.
    """

    expert: ExpertId
    demanded: bool
    chunks: int
    begun: int = 0
    arrays: list[Any] = field(default_factory=list)


class CopyQueue:
    """Copies that wait for the link, are on it, or have arrived and were not taken yet.

    A copy is queued until its last chunk has begun, and in `begun` from its first chunk on until its last has
    arrived; in between it is in both. A copy that `cancel` gave up is in neither, and its chunks are ignored.

    Args:
        chunks: returns the number of chunks of an expert.
        ready: returns whether an expert is in host memory, so that its copy may begin; None if all are.

    Attributes:
        demand, prefetch: queued copies, next first.
        begun: copies that have begun and not ended.
        arrived: arrays of the experts that have arrived since `take`.
        failed: demands whose copy failed for good, with the error.
        lost: prefetches whose copy failed for good since `take`.
        on_link: number of chunks that have begun and not ended, including those given up.

    >>> queue = CopyQueue(lambda expert: 1)
    >>> queue.submit([], [ExpertId(1, 0)])
    >>> queue.submit([ExpertId(0, 0)], [])
    >>> first = queue.begin(demand=True, prefetch=True)
    >>> first.expert, queue.begin(demand=False, prefetch=True).expert
    (ExpertId(layer=0, expert=0), ExpertId(layer=1, expert=0))
    >>> queue.finish(first, "weights"); queue.take()
    ({ExpertId(layer=0, expert=0): ['weights']}, [])
    """

    def __init__(self, chunks: Callable[[ExpertId], int], ready: Callable[[ExpertId], bool] | None = None):
        self._chunks = chunks
        self._ready = ready
        self.demand: deque[Copy] = deque()
        self.prefetch: deque[Copy] = deque()
        self.begun: dict[ExpertId, Copy] = {}
        self.arrived: dict[ExpertId, list[Any]] = {}
        self.failed: dict[ExpertId, BaseException] = {}
        self.lost: list[ExpertId] = []
        self.on_link = 0

    @property
    def waiting(self) -> bool:
        """Whether any chunk could begin."""
        if self._ready is None:
            return bool(self.demand or self.prefetch)
        return any(self._ready(copy.expert) for queue in (self.demand, self.prefetch) for copy in queue)

    @property
    def idle(self) -> bool:
        """Whether no chunk waits or is on the link."""
        return not (self.demand or self.prefetch or self.on_link)

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId]) -> None:
        """Queues copies; a load that is already a prefetch moves ahead, and one that has arrived stays."""
        for expert in load:
            copy = self.begun.get(expert) or next((c for c in self.prefetch if c.expert == expert), None)
            if copy is not None:
                copy.demanded = True
                if copy in self.prefetch:  # else its last chunk is on the link
                    self.prefetch.remove(copy)
                    self.demand.append(copy)
            elif expert not in self.arrived:
                if expert in self.lost:  # failed as a prefetch, which was not taken yet
                    self.lost.remove(expert)
                self.demand.append(Copy(expert, True, self._chunks(expert)))
        self.prefetch.extend([Copy(expert, False, self._chunks(expert)) for expert in prefetch])

    def drop(self, stale: Callable[[ExpertId], bool]) -> list[ExpertId]:
        """Removes the prefetches that have not begun and for which `stale(expert)` holds; returns them."""
        gone = [copy for copy in self.prefetch if not copy.begun and stale(copy.expert)]
        for copy in gone:
            self.prefetch.remove(copy)
        return [copy.expert for copy in gone]

    @property
    def staged(self) -> int:
        """Number of experts whose copy has begun, or has arrived and was not taken."""
        return len(self.begun) + len(self.arrived)

    @property
    def part_way(self) -> bool:
        """Whether a copy has chunks on the link or behind it, and others still to begin."""
        return any(copy.begun for queue in (self.demand, self.prefetch) for copy in queue)

    def begin(self, *, demand: bool, prefetch: bool, another: bool = True) -> Copy | None:
        """Begins the next chunk and returns its copy (chunk `begun - 1`); None if none may begin now.

        While a demand waits, no prefetch begins, unless the demand is not in host memory yet.

        Args:
            demand, prefetch: whether the link has room for a chunk of this kind.
            another: whether there is room for one more expert; otherwise only copies that have begun go on.
        """
        first = _first if self._ready is None else self._first_ready
        if not another:
            first = _first_begun
        copy = first(self.demand)
        queue, room = (self.demand, demand) if copy is not None else (self.prefetch, prefetch)
        if not room or (copy := copy or first(self.prefetch)) is None:
            return None
        copy.begun += 1
        self.on_link += 1
        self.begun[copy.expert] = copy
        if copy.begun == copy.chunks:
            queue.remove(copy)
        return copy

    def _first_ready(self, queue: deque[Copy]) -> Copy | None:
        """Returns the first copy whose expert is in host memory."""
        assert self._ready is not None
        return next((copy for copy in queue if self._ready(copy.expert)), None)

    def wants(self, copy: Copy) -> bool:
        """Whether a copy that has begun was neither given up nor failed."""
        return self.begun.get(copy.expert) is copy

    def finish(self, copy: Copy, array: Any) -> None:
        """Enters a chunk that has arrived; with the last one the expert has arrived."""
        self.on_link -= 1
        copy.arrays.append(array)
        if len(copy.arrays) == copy.chunks and self.wants(copy):
            del self.begun[copy.expert]
            self.arrived[copy.expert] = copy.arrays

    def fail(self, copy: Copy, error: BaseException) -> bool:
        """Enters a chunk that failed for good, and so its expert; returns whether that was a prefetch.

        It has no effect if another chunk of the copy failed before, or the copy was given up.
        """
        self.on_link -= 1
        if not self.wants(copy):
            return False
        del self.begun[copy.expert]
        for queue in (self.demand, self.prefetch):
            if copy in queue:
                queue.remove(copy)
        if copy.demanded:
            self.failed[copy.expert] = error
        else:
            self.lost.append(copy.expert)
        return not copy.demanded

    def refuse(self, expert: ExpertId, error: BaseException) -> None:
        """Enters that an expert whose copy is queued and has not begun cannot be copied."""
        for queue in (self.demand, self.prefetch):
            for copy in [copy for copy in queue if copy.expert == expert and not copy.begun]:
                queue.remove(copy)
                if copy.demanded:
                    self.failed[expert] = error
                else:
                    self.lost.append(expert)

    def has(self, expert: ExpertId) -> bool:
        """Whether a copy of an expert waits or is on the link."""
        return expert in self.begun or any(
            copy.expert == expert for queue in (self.demand, self.prefetch) for copy in queue
        )

    def take(self) -> tuple[dict[ExpertId, list[Any]], list[ExpertId]]:
        """Returns what has arrived since the last call, and which prefetches failed."""
        arrived, self.arrived = self.arrived, {}
        lost, self.lost = self.lost, []
        return arrived, lost

    def let_go(self) -> None:
        """Turns failed demands into failed prefetches, when no layer waits for them any more."""
        self.lost.extend(self.failed)
        self.failed.clear()

    def cancel(self) -> None:
        """Gives up every copy that has not arrived, including those on the link."""
        for copies in (self.demand, self.prefetch, self.begun, self.failed):
            copies.clear()


def _first(queue: deque[Copy]) -> Copy | None:
    return queue[0] if queue else None


def _first_begun(queue: deque[Copy]) -> Copy | None:
    return next((copy for copy in queue if copy.begun), None)
