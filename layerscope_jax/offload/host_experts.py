"""The host's executor: computes experts on the CPU, where the bank's buffers lie."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats, address
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.host_kernels import kernel_of
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support.spans import Spans
from layerscope_jax.support.threads import Helpers, Job


class HostExperts:
    """Computes experts on the host's CPU, directly from the bank's buffers, on a separate thread.

    Args:
        bank: the expert bank.
        device: the JAX CPU device to compute on.
        threads: number of threads that compute.
        shares_inputs: whether inputs are in this machine's memory and not on an accelerator.

    Attributes:
        spans: where computations are recorded; None to record none.
        cpu: what computes.
        inside: the same kernels for use within jitted programs on a CPU; None if that is not supported, or
            the device is an accelerator.
    """

    def __init__(self, bank: ExpertBank, device: jax.Device, threads: int, shares_inputs: bool = False):
        self.bank = bank
        self.device = device
        self.stats = WorkStats()
        self.spans: Spans | None = None
        self._weights: dict[tuple[int, int], InMemory] = {}  # arrays that share the bank's memory
        self._closed = False
        self._shares_inputs = shares_inputs
        self.cpu = CpuExperts(threads, kernel_of(bank.format, bank.dtype, *bank.sizes), bank.format)
        possible = shares_inputs and Inside.is_possible(bank.dtype)
        self.inside = Inside(self.cpu, bank.format.name, bank.dtype) if possible else None
        self._thread = Helpers(1, "layerscope-host")

    def start(
        self, outputs: np.ndarray, layer: int, inputs: jax.Array, rows: Assignments, experts: Sequence[int]
    ) -> Job:
        """Starts to compute experts of `layer` into `outputs`; see `CpuExperts.compute`.

        Raises:
            ValueError: if the executor was closed.
        """
        if self._closed:
            raise ValueError("the host executor was closed with its engine; make a new Engine")
        return self._thread.start(lambda _: self.compute(outputs, layer, inputs, rows, experts))

    def rest(self) -> BaseException | None:
        """Waits until the host is idle; returns the failure of the computation that it waited for, if any."""
        failure = self._thread.rest()
        self.cpu.rest()
        return failure

    def close(self) -> None:
        self._closed = True
        self._thread.close()
        self.cpu.close()
        if self.inside is not None:
            self.inside.close()

    def compute(
        self, outputs: np.ndarray, layer: int, inputs: jax.Array, rows: Assignments, experts: Sequence[int]
    ) -> None:
        """Computes as `start` does, but on the calling thread, which saves waking another one."""
        began = time.perf_counter()
        read = inputs if self._shares_inputs else np.asarray(inputs)
        self.cpu.compute(outputs, read, rows, experts, functools.partial(self.several, layer), self.stats)
        ended = time.perf_counter()
        self.stats.busy_s += ended - began
        if self.spans is not None:
            self.spans.add("host", "experts", began, ended, layer, tuple(experts), len(experts))

    def several(self, layer: int, experts: Sequence[int]) -> list[InMemory]:
        """Returns some experts of a layer."""
        kept = self._weights  # also found by a plain pair, which is made faster than an `ExpertId`
        try:
            return [kept[layer, expert] for expert in experts]
        except KeyError:  # the first time
            return [self.weights(ExpertId(layer, expert)) for expert in experts]

    def everything(self) -> list[list[InMemory]]:
        """Returns every expert of every layer."""
        return [
            [self.weights(ExpertId(layer, expert)) for expert in range(len(experts))]
            for layer, experts in enumerate(self.bank.layers)
        ]

    def weights(self, expert: ExpertId) -> InMemory:
        """Returns the bank's buffers of an expert as arrays of the host's CPU device.

        The arrays are kept if the backend shares memory. If it copies they are not, because together they
        would take as much memory as the bank.
        """
        result = self._weights.get(expert)
        if result is None:
            views = self.bank.views(expert)
            mapped = any(isinstance(array, np.ndarray) for array in self.bank[expert])
            mapped = mapped and self.cpu.kernel is not None
            arrays = self.bank.format.Expert(
                *(views if mapped else [jax.device_put(view, self.device) for view in views])
            )
            result = InMemory.of(arrays, self.bank.format)
            if share_memory(arrays, self.bank[expert]):
                self._weights[expert] = result
        return result


def share_memory(some: Iterable[jax.Array | np.ndarray], others: Iterable[jax.Array | np.ndarray]) -> bool:
    """Whether the arrays of two experts have the same buffers."""
    return all(address(a) == address(b) for a, b in zip(some, others, strict=True))
