"""The link (AsyncIO of the LayerScope paper): copies experts to the device on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from layerscope_jax.models.experts import ExpertWeights
from layerscope_jax.offload.bank import ExpertBank, device_sharding
from layerscope_jax.offload.queue import Copy, CopyQueue
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support.errors import TransferError
from layerscope_jax.support.jax_settings import settle_thread

MATRICES = len(ExpertWeights._fields)  # chunks of a plain expert; in any format one for each array

ATTEMPTS = 3

AHEAD_BYTES = 16 * 2**20
"""Given to an unpaced link before the first of it has arrived. A copy to an accelerator costs some 200 us
whatever its size, and waits for all that the device was given before it: one at a time, a link that carries
50 GB/s reached 9 with copies of 3 MiB, and stood still while the device computed
(`benchmarks/bench_gpu_facts.py`). The price is that a demand load may wait for so many bytes of prefetches, a
third of a millisecond there."""

WITHIN_BYTES = 64 * 2**20
"""The same of demands where copies are this CPU's own work (`Transfers.within`): JAX shares them out to its
threads, and this one comes late to hand over more. Prefetches go one by one there, as each takes long."""

STANDSTILL_S = 60.0
"""A link on which no chunk has ended for so long after it was due stands still; no real chunk takes that."""

GRACE_S = 5.0
"""How long a chunk on the link that nobody wants any more is waited for."""


@dataclass
class LinkStats:
    """What the link did since the last reset: seconds and bytes."""

    busy_s: float = 0.0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    dropped: int = 0
    retries: int = 0
    failed_prefetches: int = 0


class _Chunk(NamedTuple):
    """One matrix on the link."""

    copy: Copy
    matrix: jax.Array
    outcome: jax.Array | BaseException  # what starting the copy gave
    due: float  # when a link of the paced rate has carried it


def start_copy(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Starts a copy of a matrix to the device, as every copy does: a test puts its faults in here."""
    return jax.device_put(array, sharding)


class Transfers:
    """Copies experts from the bank into device memory, one array a chunk, demand before prefetch.

    A chunk that has begun is finished. A prefetch chunk begins only when no demand waits and nothing else is
    on the link, so a demand load waits for at most one prefetch chunk. Demand chunks overlap by one, which
    hides the start of each copy; unless the link is paced, they begin while fewer than `AHEAD_BYTES` are on
    it (within main memory `WITHIN_BYTES`), and on an accelerator prefetch chunks too. A failed chunk is tried
    again; an expert whose copy fails for good is left where it was, and only whoever waits for it hears of
    it. No call waits without end for a copy that does not end, nor for a link whose thread has ended.

    Args:
        bank: where experts come from.
        device: where they go.
        bandwidth: bytes a second to pace copies to, or None. A paced chunk counts as arrived when its real
            copy is done and its time on a link of that rate has passed.
        copy: `(array, sharding) -> array`; `start_copy` if None.

    Attributes:
        stats: what the link did.
        queue: what waits for it, is on it and has come off it; looked at and changed under one lock.
        copy: through which every copy goes.
        within: whether copies are unpaced and within main memory: they take the time of the CPU that
            computes.
        ahead, prefetch_ahead: bytes on the link until which chunks of demands begin, and of prefetches.
        sharding: of what has arrived.
    """

    def __init__(
        self,
        bank: ExpertBank,
        device: jax.Device,
        bandwidth: int | None = None,
        copy: Callable[[jax.Array, jax.sharding.Sharding], jax.Array] | None = None,
    ):
        self.bank = bank
        self.bandwidth = bandwidth
        self.stats = LinkStats()
        self.copy = copy or start_copy
        self.sharding = device_sharding(device)
        self.queue = CopyQueue(lambda expert: len(bank[expert]))
        self._changed = threading.Condition()
        self._enough = 1  # arrivals worth waking the engine for
        self._closed = False
        self._broken: BaseException | None = None  # what ended the link's thread before its time
        self.within = not bandwidth and device.platform == "cpu"
        self.ahead = 0 if bandwidth else WITHIN_BYTES if self.within else AHEAD_BYTES
        self.prefetch_ahead = 0 if device.platform == "cpu" else self.ahead
        self._expected, self._busy_since = 0.0, 0.0  # when the link has news if it moves; when it began
        self._thread = threading.Thread(target=self._run, name="layerscope-link", daemon=True)
        self._thread.start()

    # ---- the engine's side -------------------------------------------------------------------------------

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId]) -> None:
        """Queues copies and returns at once.

        A load that is queued or has begun as a prefetch is moved ahead; one that has arrived is left alone.

        Raises:
            ValueError: if the bank has no such expert; nothing is queued then.
            TransferError: if the link's thread has ended, as all that wait here do too.
        """
        load, prefetch = list(load), list(prefetch)
        if not (load or prefetch):
            return  # the link's thread is not woken for nothing
        unknown = [tuple(expert) for expert in (*load, *prefetch) if expert not in self.bank]
        if unknown:
            raise ValueError(f"the model has no experts (layer, expert) {unknown} to copy")
        with self._changed:
            self._check_thread()
            self._expected = max(self._expected, time.perf_counter())
            self.queue.submit(load, prefetch)
            self._changed.notify_all()

    def drop(self, stale: Callable[[ExpertId], bool]) -> list[ExpertId]:
        """Takes prefetches that have not begun off the queue where `stale(expert)`; returns them."""
        with self._changed:
            gone = self.queue.drop(stale)
            self.stats.dropped += len(gone)
            return gone

    def arrivals(self) -> tuple[dict[ExpertId, Any], list[ExpertId]]:
        """What has arrived since the last call, and which prefetches failed for good; does not wait."""
        queue = self.queue
        if not (queue.arrived or queue.lost):
            return {}, []  # what comes at this moment comes with the next call
        with self._changed:
            arrived, lost = queue.take()
            return {expert: type(self.bank[expert])(*arrays) for expert, arrays in arrived.items()}, lost

    def wait(self, wanted: Collection[ExpertId], count: int = 1) -> None:
        """Returns when `count` experts have arrived, no more than are wanted.

        Raises:
            TransferError: if the copy of a wanted expert failed for good or does not end, or the engine was
                closed.
        """
        with self._changed:
            self._enough = count
            while len(self.queue.arrived) < count:
                failed = next((expert for expert in wanted if expert in self.queue.failed), None)
                if failed is not None:
                    error = self.queue.failed[failed]
                    raise TransferError(
                        f"copying expert {failed.expert} of layer {failed.layer} to the device failed "
                        f"{ATTEMPTS} times: {error}"
                    ) from error
                if self._closed:
                    raise TransferError("the transfer engine was closed while a layer waited for an expert")
                self._await_news(self._expected, STANDSTILL_S)

    def rest(self) -> None:
        """Waits until the link has nothing left to do; demands that failed become prefetches that failed.

        Raises:
            TransferError: if a copy does not end.
        """
        with self._changed:
            self._changed.notify_all()  # an interrupt may have kept `submit` from saying so
            while not (self._closed or self.queue.idle):
                self._await_news(self._expected, STANDSTILL_S)
            self.queue.let_go()

    def cancel(self) -> None:
        """Gives up every copy that has not arrived, demands too; waits for the chunks on the link alone.

        Nothing is said of them any more: once this has returned, whatever `arrivals` does not name is where
        it was.

        Raises:
            TransferError: if a chunk on the link does not end; its memory stays in use. May be called again.
        """
        with self._changed:
            self.queue.cancel()
            began = time.perf_counter()
            while not self._closed and (self.queue.on_link or self._broken):
                self._await_news(began, GRACE_S)

    def close(self) -> None:
        """Finishes the chunks on the link and ends the thread; queued copies are dropped.

        A chunk that does not end is left to itself: the thread does not keep the interpreter from exiting.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # which may be the one that collects garbage
            self._thread.join(GRACE_S)

    def _check_thread(self) -> None:
        if self._broken is not None:
            what = f"the link's thread has ended ({self._broken!r}); make a new Engine"
            raise TransferError(what) from self._broken

    def _await_news(self, since: float, patience: float) -> None:
        """Waits for a change of the link, for `patience` seconds after `since`."""
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
        except BaseException as error:  # a fault of ours: whoever waits is to hear of it
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _carry(self) -> None:
        on_link: deque[_Chunk] = deque()
        carried = 0  # bytes of those
        free = 0.0  # when the link, at its paced rate, is through with what it was given
        rested = True  # whether it has had nothing to do since it began the last chunk
        while True:
            with self._changed:
                while not (self._closed or on_link or self.queue.waiting):
                    rested = True
                    self._changed.wait()
                if self._closed and not on_link:
                    return
                begun = None if self._closed else self._next(len(on_link), carried)
            if begun is None:
                # A link that turned out slower than the pace makes up for nothing later.
                carried -= on_link[0].matrix.nbytes
                free = max(free, self._finish(on_link.popleft()))
                continue
            now = time.perf_counter()
            if not on_link:
                self._busy_since = now
            matrix = begun[1]
            carried += matrix.nbytes
            # Within a busy spell the next chunk follows on the link's own clock, not on the time at which
            # this thread woke up: the average rate is the paced one.
            free = (max(free, now) if rested else free) + (
                matrix.nbytes / self.bandwidth if self.bandwidth else 0.0
            )
            rested = False
            self._expected = max(now, free)
            on_link.append(_Chunk(*begun, self._start(matrix), free))

    def _next(self, on_link: int, carried: int) -> tuple[Copy, jax.Array] | None:
        """Begins the next matrix that may begin beside so many chunks and their bytes; None to wait first."""
        # Choosing and beginning are one step under the lock: what has been chosen is not dropped any more.
        copy = self.queue.begin(
            demand=on_link < 2 or carried < self.ahead,
            prefetch=on_link == 0 or carried < self.prefetch_ahead,
        )
        return None if copy is None else (copy, self.bank[copy.expert][copy.begun - 1])

    def _start(self, matrix: jax.Array) -> jax.Array | BaseException:
        """A copy that has begun, or why it has not."""
        try:
            return self.copy(matrix, self.sharding)
        except BaseException as error:
            return error

    def _finish(self, chunk: _Chunk) -> float:
        """Waits until a chunk is across; hands the expert over with its last one. Returns when it was."""
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
            # Pacing only ever makes a finished copy later, as a slower link would.
            while (early := chunk.due - time.perf_counter()) > 0 and self._wanted(copy):
                time.sleep(min(early, 1.0))  # looks up now and then whether anybody waits
        with self._changed:
            now = time.perf_counter()
            self.stats.busy_s += now - self._busy_since
            self._busy_since = now
            if copy.demanded:
                self.stats.demand_bytes += array.nbytes
            else:
                self.stats.prefetch_bytes += array.nbytes
            self.queue.finish(copy, array)
            self._ended(len(self.queue.arrived) >= self._enough)
        return across

    def _ended(self, worth_telling: object) -> None:
        """A chunk has left the link; wakes who waits, if there is something for them."""
        self._expected = max(self._expected, time.perf_counter())
        if worth_telling or self.queue.idle:
            self._changed.notify_all()

    def _wanted(self, copy: Copy) -> bool:
        """Whether nobody has given up a copy that has begun."""
        return self.queue.wants(copy) and not self._closed

    def _settle(self, chunk: _Chunk) -> jax.Array:
        """The finished copy of a chunk, tried again where it failed."""
        outcome = chunk.outcome
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                return outcome.block_until_ready()
            except BaseException:
                if attempt == ATTEMPTS or not self._wanted(chunk.copy):
                    raise
                self.stats.retries += 1
                self._expected = max(self._expected, time.perf_counter())
                outcome = self._start(chunk.matrix)
        raise AssertionError("unreachable")
