"""Where experts are computed: on the device, and beside it on the host.

Where the device is this machine's CPU too, both compute alike, a row has the same bits on either, and both
write their rows into the same array.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.formats import ExpertFormat, plain_of
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats, expert_rows
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.host_kernels import kernel_of
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.kernels.registry import REFERENCE, Work, choose
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support.threads import Helpers, Job
from layerscope_jax.support.units import next_power

SIZES = 2
"""Sizes of rows to write to that are kept: a decode step's and those of the last prefill."""


@functools.partial(jax.jit, static_argnames=("choices", "product"), donate_argnames="outputs")
def grouped_ffn(
    outputs: jax.Array,
    inputs: jax.Array,
    slots: jax.Array,
    experts: tuple[Any, ...],
    choices: int,
    product: Callable,
) -> tuple[jax.Array, jax.Array]:
    """Computes N experts and writes their rows into `outputs` [T * K + 1, D], which is donated.

    Also returns one number of the result: it is ready when the whole result is, and may be waited for after
    `outputs` has been donated on.
    """
    rows = expert_rows(inputs, slots, experts, choices, product)
    outputs = outputs.at[slots.reshape(-1)].set(rows)
    return outputs, rows[-1, 0]


@functools.partial(jax.jit, donate_argnames="outputs")
def place_rows(outputs: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows [R, D] that the host computed into `outputs` [T * K + 1, D]."""
    return outputs.at[slots].set(rows)


def product_of(
    format: ExpertFormat, expert: Any, dtype: np.dtype, device: jax.Device
) -> tuple[str, Callable]:
    """Name in statistics, and product for `grouped_ffn`, of what computes such experts on a device."""
    work = Work("experts", format.name, np.dtype(dtype), format.sizes(expert), device.platform, format.body)
    # A CPU stands for an accelerator in tests alone; its kernels compute outside of programs.
    kernel = None if work.platform == "cpu" else choose(work)
    return (REFERENCE, format.ffn) if kernel is None else (kernel.name, kernel.run)


class DeviceExperts:
    """Computes experts whose weights are in device memory, without waiting for them.

    Args:
        device: that computes.
        format: of the experts; None for plain ones.

    Attributes:
        stats: what was done.
    """

    waits = False
    """Whether `run` returns only when it is done."""

    def __init__(self, device: jax.Device, format: ExpertFormat | None = None):
        self.stats = WorkStats()
        self._device = device
        self._format = format
        self._product: tuple[str, Callable] | None = None
        self._nothing: dict[int, jax.Array] = {}
        self._outputs: dict[int, jax.Array] = {}
        self._host_rows: dict[int, np.ndarray] = {}

    def keep(self, weights: Any) -> Any:
        """An expert that has come, in the form that `run` takes."""
        return weights

    def nothing(self, total: int, width: int, dtype: np.dtype) -> jax.Array:
        """[total + 1, width] zeros, the rows of a layer before the first."""
        if total not in self._nothing:
            self._nothing = {total: jnp.zeros((total + 1, width), dtype, device=self._device)}
        return self._nothing[total]

    def take(self, total: int, width: int, dtype: np.dtype) -> jax.Array:
        """[total + 1, width] to write a layer's rows to; what nobody writes keeps any finite value."""
        result = self._outputs.pop(total, None)
        return jnp.zeros((total + 1, width), dtype, device=self._device) if result is None else result

    def give_back(self, outputs: jax.Array) -> None:
        """Rows that have been dispatched to whoever reads them, to be overwritten in the next layer."""
        self._outputs[len(outputs) - 1] = outputs
        forget_oldest(self._outputs, SIZES)

    def run(
        self,
        outputs: jax.Array,
        inputs: jax.Array,
        rows: Assignments,
        experts: Iterable[int],
        weights: Callable[[Sequence[int]], Sequence[Any]],
    ) -> tuple[jax.Array, jax.Array | None]:
        """Dispatches `experts`; returns the outputs and something that is ready when they are."""
        done: jax.Array | None = None
        for group in rows.groups(experts):
            self.stats.count_group(group)
            arrays = tuple(weights(group.experts))
            if self._product is None:
                format = self._format or plain_of(arrays[0])
                self._product = product_of(format, arrays[0], inputs.dtype, self._device)
            name, product = self._product
            if name != REFERENCE:
                self.stats.by_kernel[name] += len(set(group.experts))
            outputs, done = grouped_ffn(outputs, inputs, group.slots, arrays, rows.choices, product)
        return outputs, done

    def host_rows(self, outputs: jax.Array) -> np.ndarray:
        """[T * K + 1, D] of host memory, for the host to write its rows to; the same in each layer."""
        if len(outputs) not in self._host_rows:
            self._host_rows = {len(outputs): np.empty(outputs.shape, outputs.dtype)}
        return self._host_rows[len(outputs)]

    def place(
        self, outputs: jax.Array, result: np.ndarray, rows: Assignments, experts: Sequence[int]
    ) -> jax.Array:
        """Puts the rows of `experts` that the host `found` among the others."""
        taken = np.concatenate([rows.slots(expert) for expert in experts])
        slots = np.full(next_power(len(taken)), rows.total, np.int32)  # few shapes to compile
        slots[: len(taken)] = taken
        values = np.zeros((len(slots), result.shape[1]), result.dtype)
        np.take(result, taken, 0, out=values[: len(taken)])
        return place_rows(outputs, slots, values)

    def clear(self) -> None:
        """After a failure: rows that are still being computed are not used again."""
        self._outputs.clear()
        self._host_rows.clear()


class SharedExperts:
    """As `DeviceExperts` where the device is this machine's CPU: waits, and all write the same array.

    Args:
        cpu: what computes.
    """

    waits = True

    def __init__(self, cpu: CpuExperts):
        self.stats = WorkStats()
        self._cpu = cpu
        self._arrays: dict[tuple[int, bool], np.ndarray] = {}

    def keep(self, weights: Any) -> InMemory:
        return InMemory.of(weights, self._cpu.format)

    def nothing(self, total: int, width: int, dtype: np.dtype) -> np.ndarray:
        return self._array(total, width, dtype, False)

    def take(self, total: int, width: int, dtype: np.dtype) -> np.ndarray:
        # The program that read the last layer's rows has ended: routing came out of it.
        return self._array(total, width, dtype, True)

    def _array(self, total: int, width: int, dtype: np.dtype, written: bool) -> np.ndarray:
        result = self._arrays.pop((total, written), None)
        if result is None:
            result = aligned_zeros((total + 1, width), dtype)
        self._arrays[total, written] = result
        forget_oldest(self._arrays, 2 * SIZES)
        return result

    def give_back(self, outputs: np.ndarray) -> None:
        pass

    def run(
        self,
        outputs: np.ndarray,
        inputs: jax.Array,
        rows: Assignments,
        experts: Iterable[int],
        weights: Callable[[Sequence[int]], Sequence[InMemory]],
    ) -> tuple[np.ndarray, None]:
        self._cpu.compute(outputs, inputs, rows, experts, weights, self.stats)
        return outputs, None

    def host_rows(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    def place(
        self, outputs: np.ndarray, result: np.ndarray, rows: Assignments, experts: Sequence[int]
    ) -> np.ndarray:
        return outputs

    def clear(self) -> None:
        self._arrays.clear()


def device_experts(device: jax.Device, cpu: CpuExperts) -> DeviceExperts | SharedExperts:
    """What computes resident experts."""
    return SharedExperts(cpu) if device.platform == "cpu" else DeviceExperts(device, cpu.format)


def forget_oldest(arrays: dict[Any, Any], most: int) -> None:
    """Keeps the `most` that were entered last."""
    while len(arrays) > most:
        del arrays[next(iter(arrays))]


def aligned_zeros(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Zeros that JAX's CPU backend takes as they are: it copies what does not begin at 64 bytes."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class HostExperts:
    """Computes experts on the host's CPU, straight from the bank's buffers, on a thread of its own.

    Args:
        bank: the host tier.
        device: the JAX CPU device to compute on.
        threads: that compute.
        shares_inputs: whether inputs come in arrays of this machine's memory, not of an accelerator's.

    Attributes:
        cpu: what computes.
        inside: with which programs on a CPU go through the same loops; None where they cannot, or where
            the device is an accelerator.
    """

    def __init__(self, bank: ExpertBank, device: jax.Device, threads: int, shares_inputs: bool = False):
        self.bank = bank
        self.device = device
        self.stats = WorkStats()
        self._weights: dict[tuple[int, int], InMemory] = {}  # those that share the bank's memory
        self._closed = False
        self._shares_inputs = shares_inputs
        self.cpu = CpuExperts(threads, kernel_of(bank.format, bank.dtype, *bank.sizes), bank.format)
        possible = shares_inputs and Inside.is_possible(bank.dtype)
        self.inside = Inside(self.cpu, bank.format.name, bank.dtype) if possible else None
        self._thread = Helpers(1, "layerscope-host")

    def start(
        self, outputs: np.ndarray, layer: int, inputs: jax.Array, rows: Assignments, experts: Sequence[int]
    ) -> Job:
        """Begins to compute experts of `layer` into `outputs`, as `CpuExperts.compute` does.

        Raises:
            ValueError: if it was closed.
        """
        if self._closed:
            raise ValueError("the host executor was closed with its engine; make a new Engine")
        return self._thread.start(lambda _: self.compute(outputs, layer, inputs, rows, experts))

    def rest(self) -> BaseException | None:
        """Waits until nothing is computed any more; gives what went wrong in what it waited for."""
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
        """As `start`, but by the thread that calls: where it would only wait, another is not worth waking."""
        began = time.perf_counter()
        kept = self._weights  # takes a plain pair too, and making an `ExpertId` of it takes longer

        def weights(experts: Sequence[int]) -> list[InMemory]:
            try:
                return [kept[layer, expert] for expert in experts]
            except KeyError:  # the first time
                return [self.weights(ExpertId(layer, expert)) for expert in experts]

        read = inputs if self._shares_inputs else np.asarray(inputs)
        self.cpu.compute(outputs, read, rows, experts, weights, self.stats)
        self.stats.busy_s += time.perf_counter() - began

    def everything(self) -> list[list[InMemory]]:
        """Every expert of every layer."""
        return [
            [self.weights(ExpertId(layer, expert)) for expert in range(len(experts))]
            for layer, experts in enumerate(self.bank.layers)
        ]

    def weights(self, expert: ExpertId) -> InMemory:
        """The bank's buffers as arrays of the host's CPU device.

        Where the backend shares memory they are kept. Where it copies they are not: all of them together
        would be the bank once more.
        """
        result = self._weights.get(expert)
        if result is None:
            # Through another handle on the buffer: JAX keeps with an array whatever copy NumPy was given.
            handles = [matrix.addressable_data(0) for matrix in self.bank[expert]]
            arrays = self.bank.format.Expert(
                *(jax.device_put(np.asarray(handle), self.device) for handle in handles)
            )
            result = InMemory.of(arrays, self.bank.format)
            if share_memory(arrays, self.bank[expert]):
                self._weights[expert] = result
        return result


def share_memory(some: Iterable[jax.Array], others: Iterable[jax.Array]) -> bool:
    """Whether two experts lie in the same buffers."""
    return all(
        a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in zip(some, others, strict=True)
    )
