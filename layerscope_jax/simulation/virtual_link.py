"""Link on a virtual clock: behaves as `layerscope_jax.offload.link`, without threads and copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable

from layerscope_jax.scheduling.plan import ExpertId


class Link:
    """A serial link: on-demand loads before prefetches; a chunk that has begun is finished.

    Time is passed in by the caller and never goes back. If a chunk can begin at the time of a call, it begins
    before the call takes effect.

    Args:
        transfer_ms: time (ms) to copy one expert.
        chunks: number of chunks of an expert, one for each of its arrays; all are taken to last equally long.

    Attributes:
        demanded, prefetched: chunks begun since the last reset.
        told: called with each chunk that begins: the expert, whether a layer waits for it, how many chunks of
            the expert are left, and when the chunk begins and ends (ms); None to call nothing.

    >>> link = Link(3.0, chunks=3)
    >>> link.submit([], [ExpertId(1, 0)], now=0.0)
    >>> link.submit([ExpertId(0, 0)], [], now=0.5)  # waits for one chunk of the prefetch
    >>> link.next_arrival({ExpertId(0, 0)}), link.next_arrival({ExpertId(1, 0)})
    (4.0, 6.0)
    """

    def __init__(self, transfer_ms: float, chunks: int):
        self._chunks = chunks
        self.demanded = self.prefetched = 0
        self.told: Callable[[ExpertId, bool, int, float, float], None] | None = None
        self._busy_ms = 0.0  # of chunks begun since the last reset, and of the one that was on the link then
        self._chunk_ms = transfer_ms / self._chunks
        self._free = 0.0  # when the chunk on the link ends, or the last one ended
        self._demand: deque[ExpertId] = deque()
        self._prefetch: deque[ExpertId] = deque()
        self._left: dict[ExpertId, int] = {}  # chunks that have not begun
        self._arrived: dict[ExpertId, float] = {}  # those whose last chunk has begun, with its end

    def reset(self, now: float) -> None:
        """Sets the counts to 0; the queues stay."""
        self._run(now)
        self.demanded = self.prefetched = 0
        self._busy_ms = max(0.0, self._free - now)

    def pace(self, transfer_ms: float, now: float) -> None:
        """Sets the time (ms) to copy an expert from now on; a chunk that has begun is not affected."""
        self._run(now)
        self._chunk_ms = transfer_ms / self._chunks

    def idle(self, now: float) -> bool:
        """Whether no copy is on the link or waits for it."""
        self._run(now)
        return not self._left and self._free <= now

    def busy_ms(self, now: float) -> float:
        """Busy time of the link between the last reset and now."""
        self._run(now)
        return self._busy_ms - max(0.0, self._free - now)

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId], now: float) -> None:
        """Queues copies; a load that is queued or has begun as a prefetch becomes an on-demand load."""
        self._run(now)
        if not self._left:
            self._free = max(self._free, now)
        for expert in load:
            if expert in self._arrived or expert in self._demand:
                continue
            if expert in self._left:
                self._prefetch.remove(expert)
            else:
                self._left[expert] = self._chunks
            self._demand.append(expert)
        for expert in prefetch:
            self._left[expert] = self._chunks
            self._prefetch.append(expert)

    def drop(self, stale: Callable[[ExpertId], bool], now: float) -> list[ExpertId]:
        """Removes the prefetches that have not begun and for which `stale(expert)` holds; returns them."""
        self._run(now)
        dropped = [
            expert for expert in self._prefetch if self._left[expert] == self._chunks and stale(expert)
        ]
        for expert in dropped:
            self._prefetch.remove(expert)
            del self._left[expert]
        return dropped

    def arrivals(self, now: float) -> list[ExpertId]:
        """Returns the experts that have arrived since the last call."""
        self._run(now)
        arrived = [expert for expert, when in self._arrived.items() if when <= now]
        for expert in arrived:
            del self._arrived[expert]
        return arrived

    def rest(self, now: float) -> float:
        """Returns the time at which the link becomes idle, if nothing else is submitted."""
        self._run(now)
        while self._left:
            self._run(self._free)
        return max(self._free, now)

    def next_arrival(self, experts: Collection[ExpertId]) -> float:
        """Returns the time at which the first of some experts arrives, if nothing else is submitted.

        Raises:
            RuntimeError: if none of them is in flight, so that the wait would never end.
        """
        while not any(expert in self._arrived for expert in experts):
            if not any(expert in self._left for expert in experts):
                raise RuntimeError(f"none of {sorted(experts)} is on its way to the device")
            self._run(self._free)
        return min(self._arrived[expert] for expert in experts if expert in self._arrived)

    def _run(self, now: float) -> None:
        """Begins every chunk that can begin by `now`."""
        while self._left and self._free <= now:
            queue = self._demand or self._prefetch
            expert = queue[0]
            self._count(expert, queue is self._demand, self._free)
            if not self._left[expert]:
                queue.popleft()
                del self._left[expert]
                self._arrived[expert] = self._free

    def _count(self, expert: ExpertId, demanded: bool, now: float) -> None:
        """Counts a chunk that begins now."""
        self._free = now + self._chunk_ms
        self._busy_ms += self._chunk_ms
        self._left[expert] -= 1
        if demanded:
            self.demanded += 1
        else:
            self.prefetched += 1
        if self.told is not None:
            self.told(expert, demanded, self._left[expert], now, self._free)
