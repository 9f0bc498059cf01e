"""Where experts are computed: on the device, and beside it on the host.

Where the device is this machine's CPU too, both compute alike, and a row has the same bits on either.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from layerscope_jax.experts.bank import ExpertBank
from layerscope_jax.experts.compute import ExpertWeights
from layerscope_jax.experts.cpu import CpuExperts, WorkStats, expert_rows, split_by_tokens
from layerscope_jax.experts.grouping import Assignments
from layerscope_jax.scheduling.plan import ExpertId


@functools.partial(jax.jit, static_argnames="choices", donate_argnames="outputs")
def grouped_ffn(
    outputs: jax.Array, inputs: jax.Array, slots: jax.Array, weights: tuple[ExpertWeights, ...], choices: int
) -> tuple[jax.Array, jax.Array]:
    """Computes N experts and writes their rows into `outputs` [T * K + 1, D], which is donated.

    Also returns one number of the result: it is ready when the whole result is, and may be waited for after
    `outputs` has been donated on.
    """
    rows = expert_rows(inputs, slots, weights, choices)
    outputs = outputs.at[slots.reshape(-1)].set(rows)
    return outputs, rows[-1, 0]


@functools.partial(jax.jit, donate_argnames="outputs")
def place_rows(outputs: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows [R, D] that the host computed into `outputs` [T * K + 1, D]."""
    return outputs.at[slots].set(rows)


class DeviceExperts:
    """Computes experts whose weights are in device memory; asynchronous but for what `kernels` computes.

    Args:
        cpu: computes few rows, if the device is this machine's CPU; None for an accelerator.
    """

    def __init__(self, cpu: CpuExperts | None = None):
        self.stats = WorkStats()
        self._cpu = cpu

    def run(
        self,
        outputs: jax.Array,
        inputs: jax.Array,
        rows: Assignments,
        experts: Iterable[int],
        weights: Callable[[int], ExpertWeights],
    ) -> tuple[jax.Array, jax.Array | np.ndarray | None]:
        """Dispatches `experts`; returns the outputs and something that is ready when they are."""
        done: jax.Array | np.ndarray | None = None
        few: list[int] = []
        if self._cpu is not None:
            few, experts = split_by_tokens(rows, experts, inputs.dtype)
        for group in rows.groups(experts):
            self.stats.count_group(group)
            arrays = tuple(weights(expert) for expert in group.experts)
            outputs, done = grouped_ffn(outputs, inputs, group.slots, arrays, rows.choices)
        if self._cpu is not None and few:
            slots, found = self._cpu.compute(np.asarray(inputs), rows, few, weights, self.stats)
            outputs = place_rows(outputs, slots, found)
            done = found if done is None else done
        return outputs, done


class HostExperts:
    """Computes experts on the host's CPU, straight from the bank's buffers, on a thread of its own.

    Args:
        bank: the host tier.
        device: the JAX CPU device to compute on; another one than the device tier's, if that is a CPU too,
            so that the two do not queue behind each other.
        threads: that compute.

    Attributes:
        cpu: what computes.
    """

    def __init__(self, bank: ExpertBank, device: jax.Device, threads: int):
        self.bank = bank
        self.device = device
        self.stats = WorkStats()
        self._weights: dict[ExpertId, ExpertWeights] = {}  # those that share the bank's memory
        self._closed = False
        self.cpu = CpuExperts(device, threads)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layerscope-host")

    def start(
        self, layer: int, inputs: jax.Array, rows: Assignments, experts: Sequence[int]
    ) -> Future[tuple[np.ndarray, np.ndarray]]:
        """Begins to compute experts of `layer`; gives slots and rows as `CpuExperts.compute` does.

        Raises:
            ValueError: if it was closed.
        """
        if self._closed:
            raise ValueError("the host executor was closed with its engine; make a new Engine")
        return self._thread.submit(self.compute, layer, inputs, rows, experts)

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown(cancel_futures=True)
        self.cpu.close()

    def compute(
        self, layer: int, inputs: jax.Array, rows: Assignments, experts: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `start`, but by the thread that calls: where it would only wait, another is not worth waking."""
        began = time.perf_counter()
        found = self.cpu.compute(
            np.asarray(inputs), rows, experts, lambda e: self._expert(ExpertId(layer, e)), self.stats
        )
        self.stats.busy_s += time.perf_counter() - began
        return found

    def _expert(self, expert: ExpertId) -> ExpertWeights:
        """The bank's buffers as arrays of the host's CPU device.

        Where the backend shares memory they are kept. Where it copies they are not: all of them together
        would be the bank once more.
        """
        found = self._weights.get(expert)
        if found is None:
            # Through another handle on the buffer: JAX keeps with an array whatever copy NumPy was given.
            handles = [matrix.addressable_data(0) for matrix in self.bank[expert]]
            found = ExpertWeights(*(jax.device_put(np.asarray(handle), self.device) for handle in handles))
            jax.block_until_ready(found)  # our own loops read the buffers, and do not wait for copies
            if share_memory(found, self.bank[expert]):
                self._weights[expert] = found
        return found


def share_memory(some: ExpertWeights, others: ExpertWeights) -> bool:
    """Whether two experts lie in the same buffers."""
    return all(
        a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in zip(some, others, strict=True)
    )
