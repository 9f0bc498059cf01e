"""The link on a virtual clock: what `layerscope_jax.offload.link` does, without a thread or a byte."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable

from layerscope_jax.offload.link import MATRICES
from layerscope_jax.scheduling.plan import ExpertId

CHUNKS = MATRICES
"""Parts that an expert crosses the link in."""


class Link:
    """A serial link: demand before prefetch, a chunk that has begun is finished.

    The clock is the caller's. It never goes back, and of two things at one time the link is first: a chunk
    that may begin now has begun.

    Args:
        transfer_ms: of one expert.

    Attributes:
        demanded, prefetched: chunks begun since the last reset.

    >>> link = Link(3.0)
    >>> link.submit([], [ExpertId(1, 0)], now=0.0)
    >>> link.submit([ExpertId(0, 0)], [], now=0.5)  # waits for one chunk of the prefetch
    >>> link.next_arrival({ExpertId(0, 0)}), link.next_arrival({ExpertId(1, 0)})
    (4.0, 6.0)
    """

    def __init__(self, transfer_ms: float):
        self.demanded = self.prefetched = 0
        self._busy_ms = 0.0  # of chunks begun since the last reset, and of the one that was on the link then
        self._chunk_ms = transfer_ms / CHUNKS
        self._free = 0.0  # when the chunk on the link ends, or the last one ended
        self._demand: deque[ExpertId] = deque()
        self._prefetch: deque[ExpertId] = deque()
        self._left: dict[ExpertId, int] = {}  # chunks that have not begun
        self._arrived: dict[ExpertId, float] = {}  # those whose last chunk has begun, with its end

    def reset(self, now: float) -> None:
        """Begins the counts anew; the queues stay."""
        self._run(now)
        self.demanded = self.prefetched = 0
        self._busy_ms = max(0.0, self._free - now)

    def pace(self, transfer_ms: float, now: float) -> None:
        """Sets how long an expert takes from now on; a chunk that has begun is finished as it was."""
        self._run(now)
        self._chunk_ms = transfer_ms / CHUNKS

    def idle(self, now: float) -> bool:
        """Whether nothing is on the link or waits for it."""
        self._run(now)
        return not self._left and self._free <= now

    def busy_ms(self, now: float) -> float:
        """How long the link was busy between the last reset and now."""
        self._run(now)
        return self._busy_ms - max(0.0, self._free - now)

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId], now: float) -> None:
        """Queues copies; a load that is queued or has begun as a prefetch is moved ahead."""
        self._run(now)
        if not self._left:
            self._free = max(self._free, now)
        for expert in load:
            if expert in self._arrived or expert in self._demand:
                continue
            if expert in self._left:
                self._prefetch.remove(expert)
            else:
                self._left[expert] = CHUNKS
            self._demand.append(expert)
        for expert in prefetch:
            self._left[expert] = CHUNKS
            self._prefetch.append(expert)

    def drop(self, stale: Callable[[ExpertId], bool], now: float) -> list[ExpertId]:
        """Takes prefetches that have not begun off the queue where `stale(expert)`; returns them."""
        self._run(now)
        gone = [expert for expert in self._prefetch if self._left[expert] == CHUNKS and stale(expert)]
        for expert in gone:
            self._prefetch.remove(expert)
            del self._left[expert]
        return gone

    def arrivals(self, now: float) -> list[ExpertId]:
        """What has come since the last call."""
        self._run(now)
        found = [expert for expert, when in self._arrived.items() if when <= now]
        for expert in found:
            del self._arrived[expert]
        return found

    def rest(self, now: float) -> float:
        """When nothing is on the link any more or waits for it, if nothing is submitted before."""
        self._run(now)
        while self._left:
            self._run(self._free)
        return max(self._free, now)

    def next_arrival(self, wanted: Collection[ExpertId]) -> float:
        """When the first of them will be there, if nothing is submitted before.

        Raises:
            RuntimeError: if none of them is on its way: the wait would have no end.
        """
        while not any(expert in self._arrived for expert in wanted):
            if not any(expert in self._left for expert in wanted):
                raise RuntimeError(f"none of {sorted(wanted)} is on its way to the device")
            self._run(self._free)
        return min(self._arrived[expert] for expert in wanted if expert in self._arrived)

    def _run(self, now: float) -> None:
        """Begins every chunk that begins until `now`."""
        while self._left and self._free <= now:
            queue = self._demand or self._prefetch
            expert = queue[0]
            self._free += self._chunk_ms
            self._busy_ms += self._chunk_ms
            self._left[expert] -= 1
            if queue is self._demand:
                self.demanded += 1
            else:
                self.prefetched += 1
            if not self._left[expert]:
                queue.popleft()
                del self._left[expert]
                self._arrived[expert] = self._free
