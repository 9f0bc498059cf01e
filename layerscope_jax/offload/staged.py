"""Link and host executor of a model whose experts are on the disk: both take them from the pool.

`host_parts` makes the parts that a model needs, on the disk or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack

import jax
import numpy as np

from layerscope_jax.kernels.cpu import InMemory
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.offload.disk import DiskBank
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import Transfers, _Chunk
from layerscope_jax.offload.pool import HostPool
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support.errors import ReadError


class StagedTransfers(Transfers):
    """`Transfers` whose copies begin as soon as their expert has been read into the pool.

    A queued copy holds its expert in the pool until it has ended or was given up. A demand that is still
    being read does not keep other copies from the link.

    Args:
        pool: the pool.
        device, bandwidth: as in `Transfers`.
    """

    def __init__(self, pool: HostPool, device: jax.Device, bandwidth: int | None = None):
        self.pool = pool
        super().__init__(pool.bank, device, bandwidth, ready=pool.is_ready)
        pool.told = self._read

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId]) -> None:
        load, prefetch = list(load), list(prefetch)
        if not (load or prefetch):
            return
        with self._changed:
            super().submit(load, prefetch)
            self.pool.hold("link", [e for e in load if e not in self.queue.arrived], urgent=True)
            self.pool.hold("link", prefetch, urgent=False)

    def drop(self, stale: Callable[[ExpertId], bool]) -> list[ExpertId]:
        gone = super().drop(stale)
        if gone:
            self.pool.let_go("link", gone)
        return gone

    def wait(self, experts: Collection[ExpertId], count: int = 1) -> None:
        queue, pool = self.queue, self.pool
        on_disk = not queue.arrived and not any(e in queue.begun or pool.is_ready(e) for e in experts)
        began = time.perf_counter()
        super().wait(experts, count)
        if on_disk:
            pool.stats.link_wait_s += time.perf_counter() - began

    def cancel(self) -> None:
        super().cancel()
        self.pool.let_go("link")

    def _arrays(self, expert: ExpertId) -> Sequence[jax.Array]:
        return self.pool.slot(expert).arrays

    def _finish(self, chunk: _Chunk) -> float:
        try:
            return super()._finish(chunk)
        finally:
            expert = chunk.copy.expert
            with self._changed:
                if not self.queue.has(expert):
                    self.pool.let_go("link", [expert])

    def _read(self, expert: ExpertId, error: ReadError | None) -> None:
        """Lets the link know that a read has ended; called by the pool."""
        with self._changed:
            self._expected = max(
                self._expected, time.perf_counter()
            )  # a slow disk is no link that stands still
            if error is not None and self.pool.failure(expert) is error:  # it was not held again since
                self.queue.refuse(expert, error)
                self.pool.let_go("link", [expert])
            self._changed.notify_all()


class StagedHost(HostExperts):
    """`HostExperts` that computes experts as they are read into the pool, in as many rounds as it takes.

    Args:
        pool: the pool.
        device, threads, shares_inputs: as in `HostExperts`.
    """

    def __init__(self, pool: HostPool, device: jax.Device, threads: int, shares_inputs: bool = False):
        super().__init__(pool.bank, device, threads, shares_inputs)
        self.pool = pool

    def compute(
        self, outputs: np.ndarray, layer: int, inputs: jax.Array, rows: Assignments, experts: Sequence[int]
    ) -> None:
        left = [ExpertId(layer, expert) for expert in experts]
        self.pool.hold("host", left, urgent=True)
        while left:
            began = time.perf_counter()
            ready = self.pool.wait(left)
            self.pool.stats.host_wait_s += time.perf_counter() - began
            super().compute(outputs, layer, inputs, rows, [expert.expert for expert in ready])
            self.pool.let_go("host", ready)
            left = [expert for expert in left if expert not in ready]

    def several(self, layer: int, experts: Sequence[int]) -> list[InMemory]:
        return [self.pool.slot(ExpertId(layer, expert)).in_memory for expert in experts]

    def weights(self, expert: ExpertId) -> InMemory:
        """Returns an expert, read into memory of its own."""
        arrays = [jax.device_put(view, self.device) for view in self.bank.views(expert)]
        return InMemory.of(self.bank.format.Expert(*arrays), self.bank.format)

    def rest(self) -> BaseException | None:
        failure = super().rest()
        self.pool.let_go("host")
        return failure


def host_parts(
    bank: ExpertBank,
    device: jax.Device,
    host: jax.Device,
    threads: int,
    bandwidth: int | None = None,
    host_bytes: int | None = None,
) -> tuple[HostPool | None, HostExperts, Transfers]:
    """Returns the pool (None if every expert is in memory), the host executor and the link, to be closed.

    Args:
        bank: the experts.
        device: device that experts are copied to.
        host: the JAX CPU device that computes experts on the host.
        threads: number of threads that compute there.
        bandwidth: emulated bandwidth (bytes/s) of the link; None for full speed.
        host_bytes: host memory (bytes) for experts that are on the disk; None for all of them.

    Raises:
        ValueError: if host memory holds no expert.
    """
    shares_inputs = device.platform == "cpu"
    with ExitStack() as stack:
        pool: HostPool | None = None
        if isinstance(bank, DiskBank):
            pool = HostPool(bank, host_slots(bank, host_bytes), host)
            stack.callback(pool.close)
            executor: HostExperts = StagedHost(pool, host, threads, shares_inputs)
            stack.callback(executor.close)
            link: Transfers = StagedTransfers(pool, device, bandwidth)
        else:
            executor = HostExperts(bank, host, threads, shares_inputs)
            stack.callback(executor.close)
            link = Transfers(bank, device, bandwidth)
        stack.pop_all()
        return pool, executor, link


def host_slots(bank: DiskBank, host_bytes: int | None) -> int:
    """Returns how many experts host memory holds.

    Raises:
        ValueError: if that is not one.
    """
    slots = (bank.total_bytes if host_bytes is None else host_bytes) // bank.expert_bytes
    if slots < 1:
        raise ValueError(
            f"host_budget must hold one expert of {bank.expert_bytes:,} bytes, got {host_bytes:,}; raise it; "
            "with more memory, fewer experts are read again"
        )
    return slots
