"""Link (AsyncIO of the LayerScope paper): copies experts to the device on a separate thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from layerscope_jax.offload.bank import ExpertBank, device_sharding
from layerscope_jax.offload.queue import Copy, CopyQueue
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support.errors import ReadError, TransferError
from layerscope_jax.support.jax_settings import settle_thread
from layerscope_jax.support.spans import Moved, Spans

ATTEMPTS = 3

AHEAD_BYTES = 16 * 2**20
"""Bytes in flight at once on an unpaced link to an accelerator. A copy costs about 200 us whatever its size,
and waits for all work that the device was given before it: with one copy of 3 MiB at a time, a link of 50
GB/s reached 9 GB/s, and it stood still while the device computed (`benchmarks/bench_gpu_facts.py`). The price
is that an on-demand load may wait for this many bytes of prefetches, a third of a millisecond at that
bandwidth."""

WITHIN_BYTES = 64 * 2**20
"""Bytes of on-demand loads in flight at once if copies are made by this CPU (`Transfers.within`): JAX copies
on its own threads, which would run out of work before the link's thread adds more. Prefetches are copied one
by one there, because each takes long."""

STANDSTILL_S = 60.0
"""Time (s) after which a chunk that is overdue counts as stuck; no real chunk takes that long."""

GRACE_S = 5.0
"""Time (s) to wait for a cancelled chunk that is on the link."""


@dataclass
class LinkStats:
    """Counts of the link since the last reset, in seconds and bytes."""

    busy_s: float = 0.0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    dropped: int = 0
    retries: int = 0
    failed_prefetches: int = 0


class _Chunk(NamedTuple):
    """One array on the link."""

    copy: Copy
    matrix: jax.Array | np.ndarray
    outcome: jax.Array | BaseException  # the copy, or why it could not be started
    due: float  # when its copy ends on a link of the emulated bandwidth


def start_copy(array: jax.Array | np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Starts the copy of an array to the device; tests replace it to inject faults."""
    return jax.device_put(array, sharding)


class Transfers:
    """Copies experts from the bank into device memory, one array (chunk) at a time, demand before prefetch.

    A chunk that has begun is finished. A prefetch chunk begins only when no demand waits and nothing else is
    on the link, so an on-demand load waits for at most one prefetch chunk. Demand chunks overlap by one,
    which hides the start of each copy. Unless the bandwidth is emulated, they begin while fewer than
    `AHEAD_BYTES` are on the link (within main memory `WITHIN_BYTES`), and on an accelerator so do prefetch
    chunks. A failed chunk is tried again; if the copy of an expert fails for good, the expert stays where it
    was, and only callers that wait for it get an error. No call waits forever for a copy that does not end,
    or for a link whose thread has ended.

    Args:
        bank: source of the experts.
        device: destination of the experts.
        bandwidth: emulated bandwidth (bytes/s), or None. A chunk then counts as arrived when its real copy is
            done and its time on a link of that bandwidth has passed.
        copy: `(array, sharding) -> array`; `start_copy` if None.
        ready: returns whether an expert is in host memory; None if all are.

    Attributes:
        stats: counts of the link.
        spans: where chunks are recorded; None to record none.
        queue: copies that wait, are on the link or have arrived; read and changed only under one lock.
        copy: function that starts every copy.
        within: whether copies are made within main memory at full speed, by the CPU that also computes.
        most_staged: most experts that are on the link, or have arrived and were not taken; None for any
            number. Where experts are written into slots, they take memory of their own until then.
        ahead, prefetch_ahead: bytes on the link below which the next demand or prefetch chunk begins.
        sharding: sharding of the copies.
    """

    def __init__(
        self,
        bank: ExpertBank,
        device: jax.Device,
        bandwidth: int | None = None,
        copy: Callable[[jax.Array | np.ndarray, jax.sharding.Sharding], jax.Array] | None = None,
        ready: Callable[[ExpertId], bool] | None = None,
    ):
        self.bank = bank
        chunks = bank.arrays_per_expert
        self.bandwidth = bandwidth
        self.stats = LinkStats()
        self.spans: Spans | None = None
        self.copy = copy or start_copy
        self.sharding = device_sharding(device)
        self.queue = CopyQueue(lambda expert: chunks, ready)
        self.most_staged: int | None = None
        self._changed = threading.Condition()
        self._enough = 1  # number of arrivals at which the engine is woken
        self._closed = False
        self._broken: BaseException | None = None  # error that ended the link's thread
        self.within = not bandwidth and device.platform == "cpu"
        self.ahead = 0 if bandwidth else WITHIN_BYTES if self.within else AHEAD_BYTES
        self.prefetch_ahead = 0 if device.platform == "cpu" else self.ahead
        self._expected, self._busy_since = 0.0, 0.0  # when a chunk is due; begin of the busy spell
        self._thread = threading.Thread(target=self._run, name="layerscope-link", daemon=True)
        self._thread.start()

    # ---- the engine's side -------------------------------------------------------------------------------

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId]) -> None:
        """Queues copies and returns at once.

        A load that is queued or has begun as a prefetch moves ahead of all prefetches; one that has arrived
        is not copied again.

        Raises:
            ValueError: if the bank has no such expert; nothing is queued then.
            TransferError: if the link's thread has ended; so do all methods that wait.
        """
        load, prefetch = list(load), list(prefetch)
        if not (load or prefetch):
            return  # does not wake the link's thread needlessly
        unknown = [tuple(expert) for expert in (*load, *prefetch) if expert not in self.bank]
        if unknown:
            raise ValueError(f"the model has no experts (layer, expert) {unknown} to copy")
        with self._changed:
            self._check_thread()
            self._expected = max(self._expected, time.perf_counter())
            self.queue.submit(load, prefetch)
            self._changed.notify_all()

    def drop(self, stale: Callable[[ExpertId], bool]) -> list[ExpertId]:
        """Removes the prefetches that have not begun and for which `stale(expert)` holds; returns them."""
        with self._changed:
            gone = self.queue.drop(stale)
            self.stats.dropped += len(gone)
            return gone

    def arrivals(self) -> tuple[dict[ExpertId, Any], list[ExpertId]]:
        """Returns experts that arrived and prefetches that failed since the last call; does not wait."""
        queue = self.queue
        if not (queue.arrived or queue.lost):
            return {}, []  # what arrives at this moment is returned by the next call
        with self._changed:
            arrived, lost = queue.take()
            if self.most_staged is not None:
                self._changed.notify_all()  # the link may have waited for this
            return {expert: self._assembled(arrays) for expert, arrays in arrived.items()}, lost

    def wait(self, experts: Collection[ExpertId], count: int = 1) -> None:
        """Waits until `count` experts have arrived since `arrivals` was last called.

        Args:
            experts: on-demand loads that the caller waits for.
            count: at most the number of `experts`.

        Raises:
            TransferError: if a copy of `experts` failed for good or does not end, or the engine was closed.
            ReadError: if one of `experts` could not be read from the disk.
        """
        with self._changed:
            self._enough = count
            while len(self.queue.arrived) < count:
                failed = next((expert for expert in experts if expert in self.queue.failed), None)
                if failed is not None:
                    error = self.queue.failed[failed]
                    if isinstance(error, ReadError):
                        raise ReadError(str(error)) from error
                    raise TransferError(
                        f"copying expert {failed.expert} of layer {failed.layer} to the device failed "
                        f"{ATTEMPTS} times: {error}"
                    ) from error
                if self._closed:
                    raise TransferError("the transfer engine was closed while a layer waited for an expert")
                self._await_news(self._expected, STANDSTILL_S)

    def rest(self) -> None:
        """Waits until the link is idle; demands that failed then count as prefetches that failed.

        Raises:
            TransferError: if a copy does not end.
        """
        with self._changed:
            self._changed.notify_all()  # an interrupt may have kept `submit` from notifying
            while not (self._closed or self.queue.idle):
                self._await_news(self._expected, STANDSTILL_S)
            self.queue.let_go()

    def cancel(self) -> None:
        """Gives up every copy that has not arrived, even demands; waits only for the chunks on the link.

        They are not reported any more: after this, every expert that `arrivals` does not name is where it
        was.

        Raises:
            TransferError: if a chunk on the link does not end; its memory stays in use. It may be called
                again.
        """
        with self._changed:
            self.queue.cancel()
            began = time.perf_counter()
            while not self._closed and (self.queue.on_link or self._broken):
                self._await_news(began, GRACE_S)

    def close(self) -> None:
        """Finishes the chunks on the link and ends the thread; queued copies are dropped.

        A chunk that does not end is not waited for: the thread does not keep the interpreter from exiting.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # garbage collection may run on the link's thread
            self._thread.join(GRACE_S)

    def _check_thread(self) -> None:
        if self._broken is not None:
            what = f"the link's thread has ended ({self._broken!r}); make a new Engine"
            raise TransferError(what) from self._broken

    def _await_news(self, since: float, patience: float) -> None:
        """Waits for a change of the queue; raises TransferError `patience` seconds after `since`."""
        self._check_thread()
        left = since + patience - time.perf_counter()
        if left <= 0:
            raise TransferError(
                f"the link to the device stands still: no copy has ended for {patience:g} s after it should "
                "have; check that the device still answers"
            )
        self._changed.wait(left)

    # ---- the link's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            settle_thread()
            self._carry()
        except BaseException as error:  # a bug of ours, which the waiting callers report
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _carry(self) -> None:
        on_link: deque[_Chunk] = deque()
        carried = 0  # bytes of the chunks on the link
        free = 0.0  # when the link, at the emulated bandwidth, has finished its chunks
        rested = True  # whether the link was idle since the last chunk began
        while True:
            with self._changed:
                while not (self._closed or on_link or (self.queue.waiting and self._may_begin())):
                    rested = True
                    self._changed.wait()
                if self._closed and not on_link:
                    return
                begun = None if self._closed else self._next(len(on_link), carried)
            if begun is None:
                # If real copies were slower than the emulated link, it does not catch up later.
                carried -= on_link[0].matrix.nbytes
                free = max(free, self._finish(on_link.popleft()))
                continue
            now = time.perf_counter()
            if not on_link:
                self._busy_since = now
            matrix = begun[1]
            carried += matrix.nbytes
            # In a busy spell the next chunk follows by the emulated clock and not by the time at which this
            # thread woke up, so that the average rate is the emulated bandwidth.
            free = (max(free, now) if rested else free) + (
                matrix.nbytes / self.bandwidth if self.bandwidth else 0.0
            )
            rested = False
            self._expected = max(now, free)
            on_link.append(_Chunk(*begun, self._start(matrix), free))

    def _next(self, on_link: int, carried: int) -> tuple[Copy, jax.Array | np.ndarray] | None:
        """Begins the next chunk, if one may begin beside those on the link; otherwise returns None."""
        # A chunk is chosen and begun under one lock, so that a chosen chunk cannot be dropped.
        copy = self.queue.begin(
            demand=on_link < 2 or carried < self.ahead,
            prefetch=on_link == 0 or carried < self.prefetch_ahead,
            another=self._has_room(),
        )
        return None if copy is None else (copy, self._arrays(copy.expert)[copy.begun - 1])

    def _has_room(self) -> bool:
        """Whether the copy of another expert may begin."""
        return self.most_staged is None or self.queue.staged < self.most_staged

    def _may_begin(self) -> bool:
        return self._has_room() or self.queue.part_way

    def _arrays(self, expert: ExpertId) -> Sequence[jax.Array]:
        """Returns the arrays to copy."""
        return self.bank.chunks(expert)

    def _assembled(self, arrays: Sequence[jax.Array]) -> Any:
        """Returns what has arrived of an expert, as `ExpertBank.parcel`."""
        return self.bank.format.Expert(*arrays) if self.bank.parcels is None else arrays[0]

    def _start(self, matrix: jax.Array | np.ndarray) -> jax.Array | BaseException:
        """Returns a copy that has begun, or the error that kept it from beginning."""
        try:
            return self.copy(matrix, self.sharding)
        except BaseException as error:
            return error

    def _finish(self, chunk: _Chunk) -> float:
        """Waits until a chunk has arrived, with the last one delivers the expert, and returns the time."""
        copy = chunk.copy
        try:
            array = self._settle(chunk)
        except BaseException as error:
            with self._changed:
                self.stats.failed_prefetches += self.queue.fail(copy, error)
                self._ended(self.queue.failed or self.queue.lost)
            return time.perf_counter()
        across = time.perf_counter()
        if self.bandwidth:
            # Emulation only delays a finished copy, as a slower link would.
            while (early := chunk.due - time.perf_counter()) > 0 and self._is_needed(copy):
                time.sleep(min(early, 1.0))  # checks from time to time whether the copy is still needed
        with self._changed:
            now = time.perf_counter()
            self.stats.busy_s += now - self._busy_since
            if self.spans is not None:
                moved = Moved(copy.expert.expert, array.nbytes, len(copy.arrays) + 1, copy.chunks)
                kind = "demand" if copy.demanded else "prefetch"
                self.spans.add("link", kind, self._busy_since, now, copy.expert.layer, moved)
            self._busy_since = now
            if copy.demanded:
                self.stats.demand_bytes += array.nbytes
            else:
                self.stats.prefetch_bytes += array.nbytes
            self.queue.finish(copy, array)
            self._ended(len(self.queue.arrived) >= self._enough)
        return across

    def _ended(self, worth_telling: object) -> None:
        """Counts a chunk as done, and wakes waiting threads if there is something for them."""
        self._expected = max(self._expected, time.perf_counter())
        if worth_telling or self.queue.idle:
            self._changed.notify_all()

    def _is_needed(self, copy: Copy) -> bool:
        """Whether a copy that has begun was not given up."""
        return self.queue.wants(copy) and not self._closed

    def _settle(self, chunk: _Chunk) -> jax.Array:
        """Returns the finished copy of a chunk, which is tried again if it failed."""
        outcome = chunk.outcome
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                return outcome.block_until_ready()
            except BaseException:
                if attempt == ATTEMPTS or not self._is_needed(chunk.copy):
                    raise
                self.stats.retries += 1
                self._expected = max(self._expected, time.perf_counter())
                outcome = self._start(chunk.matrix)
        raise AssertionError("unreachable")
