"""Pool of host memory (`HostPool`): a bounded cache of experts that are on the disk, and its readers."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from layerscope_jax.kernels.cpu import InMemory
from layerscope_jax.offload.disk import CHUNK, DiskBank, Files, aligned
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.scheduling.reads import Uses
from layerscope_jax.support.errors import ReadError
from layerscope_jax.support.jax_settings import settle_thread
from layerscope_jax.support.spans import Moved, Spans

READERS = 4
"""Threads that read at the same time: with fewer, a disk of several GB/s does not reach its rate
(`benchmarks/bench_disk.py`)."""

STANDSTILL_S = 60.0
"""Time (s) without the end of any read after which a wait for one fails."""

GRACE_S = 5.0
"""Time (s) to wait for the end of a read that nobody needs any more."""

Holder = str
"""Who holds experts: "host" and "link" in an engine. One thread at a time holds and lets go under a name."""


@dataclass
class DiskStats:
    """Counts of the pool since the last reset, in seconds and bytes.

    Attributes:
        busy_s: time in which at least one read was under way.
        host_wait_s, link_wait_s: time in which the host's experts, and the engine for its loads, waited for
            reads.
        demand_bytes, ahead_bytes: bytes read for a layer that waited, and ahead of time.
        hits, misses: experts that a layer needed from the pool, and whether they were there.
        useful, wasted: experts read ahead and then used, or evicted unused.
        failed: reads that failed.
    """

    busy_s: float = 0.0
    host_wait_s: float = 0.0
    link_wait_s: float = 0.0
    demand_bytes: int = 0
    ahead_bytes: int = 0
    hits: int = 0
    misses: int = 0
    useful: int = 0
    wasted: int = 0
    failed: int = 0

    @property
    def wait_s(self) -> float:
        """Time (s) in which a layer waited for reads."""
        return self.host_wait_s + self.link_wait_s


class Slot:
    """Memory for one expert, with the arrays that link and kernels read it through, whatever expert it holds.

    JAX's arrays are made once: their memory is written again for each expert, which is safe as long as
    nothing reads it meanwhile. Engine and link hold an expert (`HostPool.hold`) while they read it.

    Attributes:
        arrays: arrays in pinned host memory.
        memories: the same memory, for writing.
        expert: expert that it holds, or that is read into it; None if it holds none.
        ready: whether the expert has been read.
        ahead: whether the expert was read ahead of time and not used yet.
    """

    def __init__(self, bank: DiskBank, host: jax.Device):
        pieces = bank.pieces(ExpertId(0, 0))
        blank = [aligned(piece.size, 64).view(piece.dtype).reshape(piece.shape) for piece in pieces]
        self.arrays = bank.format.Expert(*(jax.device_put(each, bank.sharding) for each in blank))
        jax.block_until_ready(self.arrays)
        self.memories = [
            (ctypes.c_char * piece.size).from_address(array.unsafe_buffer_pointer())
            for piece, array in zip(pieces, self.arrays, strict=True)
        ]
        self._format, self._host = bank.format, host
        copies = self._on_host()
        self._shared: InMemory | None = None
        if [a.unsafe_buffer_pointer() for a in copies.arrays] == list(map(ctypes.addressof, self.memories)):
            self._shared = copies
        self.expert: ExpertId | None = None
        self.ready = False
        self.ahead = False

    @property
    def in_memory(self) -> InMemory:
        """The expert as kernels of the host take it."""
        return self._shared or self._on_host()  # copied each time if the backend does not share memory

    def _on_host(self) -> InMemory:
        # Through another handle on the buffer, because JAX keeps the NumPy copy of an array with it.
        handles = [np.asarray(array.addressable_data(0)) for array in self.arrays]
        arrays = self._format.Expert(*(jax.device_put(handle, self._host) for handle in handles))
        return InMemory.of(arrays, self._format)


class HostPool:
    """Holds as many experts in host memory as a budget allows, and reads others from the disk in their place.

    Readers serve, in this order: experts that a layer waits for, experts that the link will copy ahead of
    time, and experts that are only expected (`read_ahead`). One reader fewer may read the last kind, so that
    a layer's read begins at once. A read begins as soon as a slot is free or has an expert that nobody holds;
    `scheduling.reads.Uses` chooses which of these is evicted, and expected experts are evicted last. A held
    expert stays until it is let go. A holder uses whichever of its experts is ready and lets go of each as
    soon as it has used it, so a single slot is enough to go on.

    The engine's thread, which an interrupt may reach between any two lines, changes what is held and expected
    only by single steps that can be repeated; slots are given and taken by readers alone.

    Args:
        bank: the experts on the disk.
        slots: number of experts that the pool holds, reads under way included; 1 or more.
        host: the JAX CPU device that computes experts on the host.

    Attributes:
        stats: counts of the pool.
        spans: where reads are recorded; None to record none.
        slots: number of slots.
        told: called, on a reader's thread, with each expert whose read has ended and the error, if any.
    """

    def __init__(self, bank: DiskBank, slots: int, host: jax.Device):
        self.bank, self.slots = bank, min(slots, sum(map(len, bank.layers)))
        self.stats = DiskStats()
        self.spans: Spans | None = None
        self.told: Callable[[ExpertId, ReadError | None], None] = lambda expert, error: None
        self._host = host
        self._changed = threading.Condition()
        self._where: dict[ExpertId, Slot] = {}  # in memory or being read
        self._made: list[Slot] = []
        self._free: list[Slot] = []
        self._held: dict[Holder, dict[ExpertId, bool]] = {"host": {}, "link": {}}  # whether a layer waits
        self._failed: dict[ExpertId, ReadError] = {}
        self._ahead: Sequence[ExpertId] = ()
        self._reading = 0
        self._busy_since = self._news = time.perf_counter()
        self._uses = Uses(len(bank.layers))
        self._closed = False
        self._broken: BaseException | None = None  # error that ended a reader
        self._files = Files()
        self._threads = [
            threading.Thread(target=self._run, name=f"layerscope-disk_{number}", daemon=True)
            for number in range(READERS)
        ]
        for thread in self._threads:
            thread.start()

    # ---- the side of engine and link ---------------------------------------------------------------------

    def hold(self, holder: Holder, experts: Iterable[ExpertId], urgent: bool) -> None:
        """Has experts read unless they are in memory, and keeps them there until the holder lets go.

        Args:
            holder: who holds them; holding twice is the same as once.
            experts: the experts, first needed first.
            urgent: whether a layer waits for them.
        """
        stats, experts = self.stats, list(experts)
        if not experts:
            return
        with self._changed:
            held = self._held.setdefault(holder, {})
            if urgent and (new := [expert for expert in experts if not held.get(expert)]):
                self._uses.count(new)
            for expert in experts:
                self._failed.pop(expert, None)
                slot = self._where.get(expert)
                if urgent and not held.get(expert):
                    ready = slot is not None and slot.ready
                    stats.hits, stats.misses = stats.hits + ready, stats.misses + (not ready)
                held[expert] = urgent or held.get(expert, False)
                if slot is not None and slot.ahead:
                    slot.ahead, stats.useful = False, stats.useful + 1
            self._news = time.perf_counter()
            self._changed.notify_all()

    def let_go(self, holder: Holder, experts: Iterable[ExpertId] | None = None) -> None:
        """Ends the holder's hold of some experts, or of all."""
        held = self._held.get(holder, {})
        with self._changed:
            for expert in list(held) if experts is None else experts:
                held.pop(expert, None)
            self._changed.notify_all()

    def read_ahead(self, experts: Sequence[ExpertId]) -> None:
        """Sets which experts to read when nothing more urgent is to be read, most valuable first.

        It replaces what was set before; a read under way is finished. An expert of the list is never evicted
        for another of the list.
        """
        if not experts and not self._ahead:
            return
        self._ahead = tuple(experts)
        with self._changed:
            self._changed.notify_all()

    def is_ready(self, expert: ExpertId) -> bool:
        """Whether an expert is in memory."""
        slot = self._where.get(expert)
        return slot is not None and slot.ready

    def failure(self, expert: ExpertId) -> ReadError | None:
        """Returns why an expert could not be read; None if it could, or if it was held again since."""
        return self._failed.get(expert)

    @property
    def present(self) -> Container[ExpertId]:
        """Experts that are in memory or being read."""
        return self._where.keys()

    def wait(self, experts: Collection[ExpertId]) -> list[ExpertId]:
        """Waits until one of some held experts is in memory; returns all of them that are.

        Raises:
            ReadError: if one of them could not be read, or no read ends.
        """
        with self._changed:
            while not (ready := [expert for expert in experts if self.is_ready(expert)]):
                for expert in experts:
                    if expert in self._failed:
                        raise ReadError(str(self._failed[expert])) from self._failed[expert]
                if not any(expert in held for held in self._held.values() for expert in experts):
                    raise RuntimeError(f"{sorted(experts)} are waited for, but nobody holds them")
                if self._closed:
                    raise ReadError(
                        "the threads that read experts ended with their engine; make a new Engine"
                    )
                if self._broken is not None:
                    raise RuntimeError(f"a thread that reads has ended: {self._broken!r}") from self._broken
                left = self._news + STANDSTILL_S - time.perf_counter()
                if left <= 0:
                    file = self.bank.pieces(next(iter(experts)))[0].file
                    raise ReadError(
                        f"{file}: no read has ended for {STANDSTILL_S:g} s; check that the disk still answers"
                    )
                self._changed.wait(left)
        return ready

    def slot(self, expert: ExpertId) -> Slot:
        """Returns where a held expert is, which must be in memory."""
        slot = self._where[expert]
        if not slot.ready:
            raise RuntimeError(f"{expert} is to be used, but has not been read")
        return slot

    def settle(self) -> None:
        """Ends all holds and expectations, and waits for the reads under way; their experts stay.

        A read that does not end within `GRACE_S` is not waited for: it writes to a slot of its own.
        """
        with self._changed:
            for held in self._held.values():
                held.clear()
            self._ahead = ()
            self._failed.clear()
            until = time.perf_counter() + GRACE_S
            while self._reading and not self._closed and (left := until - time.perf_counter()) > 0:
                self._changed.wait(left)

    def close(self) -> None:
        """Ends the threads after their current reads. It may be called again.

        A read that does not end is not waited for: its thread does not keep the interpreter from exiting.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # garbage collection may run on a reader
                thread.join(GRACE_S)
        if not any(thread.is_alive() for thread in self._threads):
            self._files.close()

    # ---- the readers' side -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            settle_thread()
            self._serve()
        except BaseException as error:  # a bug of ours, which whoever waits reports
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _serve(self) -> None:
        buffer = aligned(CHUNK)
        while True:
            with self._changed:
                while (begun := None if self._closed else self._begin()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
            slot, expert, urgent = begun
            error: ReadError | None = None
            try:
                self._files.read(self.bank.pieces(expert), slot.memories, buffer)
            except Exception as raised:
                what = f"reading expert {expert.expert} of layer {expert.layer} failed: {raised!r}"
                error = raised if isinstance(raised, ReadError) else ReadError(what)
            with self._changed:
                self._end(slot, expert, urgent, error)
            self.told(expert, error)

    def _begin(self) -> tuple[Slot, ExpertId, bool] | None:
        """Begins the next read; returns slot, expert and whether a layer waits, or None if none may begin."""
        expert, urgent = self._next()
        if expert is None:
            return None
        slot = self._slot_for(expert)
        if slot is None:
            return None
        if slot.expert is not None:
            del self._where[slot.expert]
            if slot.ahead:
                self.stats.wasted += 1
        slot.expert, slot.ready = expert, False
        slot.ahead = not any(expert in held for held in self._held.values())
        self._where[expert] = slot
        if not self._reading:
            self._busy_since = time.perf_counter()
        self._reading += 1
        return slot, expert, urgent

    def _next(self) -> tuple[ExpertId | None, bool]:
        """Returns the expert to be read next, and whether a layer waits for it."""
        for waits in (True, False):
            for held in self._held.values():
                for expert, urgent in list(held.items()):  # the engine may end a hold meanwhile
                    if urgent is waits and expert not in self._where and expert not in self._failed:
                        return expert, waits
        for expert in self._ahead if self._reading < READERS - 1 else ():
            if expert not in self._where and expert not in self._failed:
                return expert, False
        return None, False

    def _slot_for(self, expert: ExpertId) -> Slot | None:
        """Returns an empty slot, a new one, that of an expert that makes way, or None."""
        if self._free:
            return self._free.pop()
        if len(self._made) < self.slots:
            slot = Slot(self.bank, self._host)
            self._made.append(slot)
            return slot
        held, expected = set().union(*self._held.values()), set(self._ahead)
        loose = [slot for slot in self._made if slot.ready and slot.expert not in held]
        spare = [slot for slot in loose if slot.expert not in expected]
        if not spare and expert in held:
            spare = loose
        return min(spare, key=lambda slot: self._uses.worth(slot.expert), default=None)

    def _end(self, slot: Slot, expert: ExpertId, urgent: bool, error: ReadError | None) -> None:
        """Enters the end of a read."""
        now, stats = time.perf_counter(), self.stats
        stats.busy_s += now - self._busy_since
        if self.spans is not None and error is None:
            kind, moved = "read" if urgent else "read ahead", Moved(expert.expert, self.bank.expert_bytes)
            self.spans.add("disk", kind, self._busy_since, now, expert.layer, moved)
        self._busy_since = self._news = now
        self._reading -= 1
        if error is None:
            slot.ready = True
            if urgent:
                stats.demand_bytes += self.bank.expert_bytes
            else:
                stats.ahead_bytes += self.bank.expert_bytes
        else:
            stats.failed += 1
            del self._where[expert]
            slot.expert, slot.ahead = None, False
            self._free.append(slot)
            self._failed[expert] = error  # not read again before it is held again
        self._changed.notify_all()
