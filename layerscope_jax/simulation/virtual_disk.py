"""Disk and pool of host memory on a virtual clock (`Disk`), and the link that takes experts from it.

They behave as `layerscope_jax.offload.pool` and `layerscope_jax.offload.staged`, without threads and files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Sequence
from typing import NamedTuple

from layerscope_jax.offload.pool import DiskStats, Holder
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.scheduling.reads import Uses
from layerscope_jax.simulation.virtual_link import Link


class Begin(NamedTuple):
    """The next read: when it can begin, of which expert, whether a layer waits, and what makes way."""

    when: float
    expert: ExpertId
    urgent: bool
    victim: ExpertId | None


class Disk:
    """A serial disk that fills a bounded pool: what a layer waits for first, then prefetches, then the
    expected.

    Args:
        read_ms: time (ms) between the ends of two reads that follow each other.
        start_ms: time (ms) by which a read lasts longer; reads overlap by it.
        slots: number of experts that the pool holds.
        num_layers: L, number of MoE layers.

    Attributes:
        stats: counts since the last reset; times in milliseconds.
        told: called with each read that begins: the expert, whether a layer waits for it, and from when to
            when (ms) the disk is busy with it; None to call nothing.

    >>> disk = Disk(2.0, 0.5, slots=1, num_layers=1)
    >>> disk.hold("host", [ExpertId(0, 0)], True, now=1.0)
    >>> disk.begin(disk.next_begin()); disk.ready_at(ExpertId(0, 0))
    3.5
    """

    def __init__(self, read_ms: float, start_ms: float, slots: int, num_layers: int):
        self.slots = slots
        self.stats = DiskStats()
        self.told: Callable[[ExpertId, bool, float, float], None] | None = None
        self._read_ms, self._start_ms = read_ms, start_ms
        self._ready: dict[ExpertId, float] = {}  # in memory or being read: when it is ready
        self._released: dict[ExpertId, float] = {}  # when its last holder has let go
        self._held: dict[Holder, dict[ExpertId, bool]] = {"host": {}, "link": {}}
        self._ahead: Sequence[ExpertId] = ()
        self._unused: set[ExpertId] = set()  # read ahead
        self._uses = Uses(num_layers)
        self._free = 0.0

    @property
    def present(self) -> Container[ExpertId]:
        """Experts that are in memory or being read."""
        return self._ready.keys()

    def ready_at(self, expert: ExpertId) -> float | None:
        """Returns when an expert is in memory; None if its read has not begun."""
        return self._ready.get(expert)

    def hold(self, holder: Holder, experts: Collection[ExpertId], urgent: bool, now: float) -> None:
        """Has experts read, and keeps them; see `HostPool.hold`. Everything up to `now` must have begun."""
        if not experts:
            return
        held, stats = self._held[holder], self.stats
        self._free = max(self._free, now)
        if urgent:
            self._uses.count(experts)
        for expert in experts:
            if urgent and not held.get(expert):
                ready = self._ready.get(expert, now + 1.0) <= now
                stats.hits, stats.misses = stats.hits + ready, stats.misses + (not ready)
            held[expert] = urgent or held.get(expert, False)
            if expert in self._unused:
                self._unused.remove(expert)
                stats.useful += 1

    def let_go(self, holder: Holder, experts: Iterable[ExpertId], when: float) -> None:
        """Ends holds at a time that may be in the future."""
        for expert in experts:
            if self._held[holder].pop(expert, None) is not None:
                self._released[expert] = max(self._released.get(expert, 0.0), when)

    def read_ahead(self, experts: Sequence[ExpertId], now: float) -> None:
        """Sets which experts to read when nothing more urgent is to be read."""
        self._free = max(self._free, now)
        self._ahead = experts

    def next_begin(self) -> Begin | None:
        """Returns the next read; None if nothing is to be read, or everything in memory is held."""
        expert, urgent = self._next()
        if expert is None:
            return None
        if len(self._ready) < self.slots:
            return Begin(self._free, expert, urgent, None)
        held, expected = {*self._held["host"], *self._held["link"]}, set(self._ahead)
        loose = {e: max(when, self._released.get(e, 0.0)) for e, when in self._ready.items() if e not in held}
        spare = {e: when for e, when in loose.items() if e not in expected}
        if not spare and expert in held:
            spare = loose
        if not spare:
            return None
        when = max(self._free, min(spare.values()))
        victim = min((e for e, idle in spare.items() if idle <= when), key=lambda e: (self._uses.worth(e), e))
        return Begin(when, expert, urgent, victim)

    def _next(self) -> tuple[ExpertId | None, bool]:
        for waits in (True, False):
            for held in self._held.values():
                for expert, urgent in held.items():
                    if urgent is waits and expert not in self._ready:
                        return expert, waits
        return next((expert for expert in self._ahead if expert not in self._ready), None), False

    def begin(self, read: Begin | None) -> None:
        """Begins a read that `next_begin` returned."""
        assert read is not None
        if read.victim is not None:
            del self._ready[read.victim]
            self._released.pop(read.victim, None)
            if read.victim in self._unused:
                self._unused.remove(read.victim)
                self.stats.wasted += 1
        self._free = read.when + self._read_ms
        self._ready[read.expert] = self._free + self._start_ms
        self.stats.busy_s += self._read_ms
        if not any(read.expert in held for held in self._held.values()):
            self._unused.add(read.expert)
        if read.urgent:
            self.stats.demand_bytes += 1  # experts; the simulator knows their size
        else:
            self.stats.ahead_bytes += 1
        if self.told is not None:
            self.told(read.expert, read.urgent, read.when, self._free)


class StagedLink(Link):
    """`Link` whose copies begin when their expert has been read from the disk.

    Args:
        transfer_ms, chunks: as in `Link`.
        disk: the disk; its reads are begun by this link, in the order of time.
    """

    def __init__(self, transfer_ms: float, chunks: int, disk: Disk):
        super().__init__(transfer_ms, chunks)
        self.disk = disk

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId], now: float) -> None:
        load, prefetch = list(load), list(prefetch)
        super().submit(load, prefetch, now)
        self._free = max(self._free, now)
        self.disk.hold("link", [expert for expert in load if expert not in self._arrived], True, now)
        self.disk.hold("link", prefetch, False, now)

    def drop(self, stale: Callable[[ExpertId], bool], now: float) -> list[ExpertId]:
        dropped = super().drop(stale, now)
        self.disk.let_go("link", dropped, now)
        return dropped

    def rest(self, now: float) -> float:
        self._run(now)
        while self._left:
            self._advance()
        return max(self._free, now)

    def next_arrival(self, experts: Collection[ExpertId]) -> float:
        while not any(expert in self._arrived for expert in experts):
            self._advance()
        return min(self._arrived[expert] for expert in experts if expert in self._arrived)

    def next_ready(self, experts: Collection[ExpertId]) -> float:
        """Returns when the first of some experts is in host memory."""
        while not (known := [when for e in experts if (when := self.disk.ready_at(e)) is not None]):
            self._advance()
        return min(known)

    def until(self, now: float) -> None:
        """Begins every read and every chunk that can begin by `now`."""
        self._run(now)

    def _advance(self) -> None:
        """Begins the next read or chunk, whenever that is."""
        times = [when for when in (self._chunk_at(), self._read_at()) if when is not None]
        if not times:
            raise RuntimeError("nothing more is read or copied, but something is waited for")
        self._run(min(times))

    def _run(self, now: float) -> None:
        while True:
            chunk, read = self._chunk_at(), self.disk.next_begin()
            if read is not None and read.when <= now and (chunk is None or read.when <= chunk):
                self.disk.begin(read)
            elif chunk is not None and chunk <= now:
                self._begin(chunk)
            else:
                return

    def _read_at(self) -> float | None:
        read = self.disk.next_begin()
        return None if read is None else read.when

    def _chunk_at(self) -> float | None:
        """Returns when the next chunk can begin; None if no expert that is to be copied is being read."""
        ready = [self.disk.ready_at(expert) for queue in (self._demand, self._prefetch) for expert in queue]
        known = [when for when in ready if when is not None]
        return max(self._free, min(known)) if known else None

    def _begin(self, now: float) -> None:
        """Begins a chunk of the first expert that is in host memory, demand before prefetch."""
        queue, expert = next(
            (queue, expert)
            for queue in (self._demand, self._prefetch)
            for expert in queue
            if (when := self.disk.ready_at(expert)) is not None and when <= now
        )
        self._count(expert, queue is self._demand, now)
        if not self._left[expert]:
            queue.remove(expert)
            del self._left[expert]
            self._arrived[expert] = self._free
            self.disk.let_go("link", [expert], self._free)
