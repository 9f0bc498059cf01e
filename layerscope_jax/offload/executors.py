"""Executors, which compute experts on the device; `host_experts` has the host's.

If the device is this machine's CPU, both use the same kernels, so that a row has the same bits on either, and
both write their rows into the same array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.formats import ExpertFormat, plain_of
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats, expert_rows
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.registry import REFERENCE, Work, choose
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support.units import next_power

LEAST_PIECE, PIECES = 64, 8
"""Rows of the host that are placed at once, at least, and how many times it takes at most. One program serves
any number of rows: larger pieces would copy more padding, smaller ones be more dispatches."""

SIZES = 2
"""Number of output arrays that are kept, by size: for decode steps and the last prefill."""


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

    Also returns one element of the result: it is ready when the whole result is, and can be waited for after
    `outputs` has been donated on.
    """
    rows = expert_rows(inputs, slots, experts, choices, product)
    outputs = outputs.at[slots.reshape(-1)].set(rows)
    return outputs, rows[-1, 0]


@functools.partial(jax.jit, donate_argnames="outputs")
def place_rows(outputs: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows [R, D] computed by the host into `outputs` [T * K + 1, D]."""
    return outputs.at[slots].set(rows)


def product_of(
    format: ExpertFormat, sizes: tuple[int, int], dtype: np.dtype, device: jax.Device
) -> tuple[str, Callable]:
    """Returns a device's kernel for experts of a format: name in statistics, product for `grouped_ffn`."""
    work = Work("experts", format.name, np.dtype(dtype), sizes, device.platform, format.body)
    # Only tests use a CPU as the accelerator; the CPU's kernels are not called from programs.
    kernel = None if work.platform == "cpu" else choose(work)
    return (REFERENCE, format.ffn) if kernel is None else (kernel.name, kernel.run)


class DeviceExperts:
    """Computes experts whose weights are in device memory; dispatches and does not wait.

    Args:
        device: the device.
        format: format of the experts; None for plain experts.

    Attributes:
        stats: counts of dispatches and rows.
    """

    waits = False
    """Whether `run` waits until the experts are computed."""

    passes_rows_on = False
    """Whether a decode step's rows of the host go into the next layer's program, in a form of their own."""

    first = 0
    """Number of the device's first expert in a layer, where several devices share them."""

    spread: int | None = None
    """Number of experts over which a layer's rows are spread; None for those that the device may hold."""

    def __init__(self, device: jax.Device, format: ExpertFormat | None = None):
        self.stats = WorkStats()
        self._device = device
        self._format = format
        self._product: tuple[str, Callable] | None = None
        self._nothing: dict[int, jax.Array] = {}
        self._outputs: dict[int, jax.Array] = {}
        self._host_rows: dict[int, np.ndarray] = {}

    def reserve(self, bank: ExpertBank, slots: int) -> None:
        """Allocates what experts are kept in; nothing here, where each keeps its own arrays."""

    @property
    def lost(self) -> bool:
        """Whether the experts that are kept have been lost, so that all are to be copied again."""
        return False

    def keep(self, weights: Any, expert: ExpertId | None = None) -> Any:
        """Returns an expert's copied arrays in the form that `run` takes."""
        return weights

    def release(self, kept: Any) -> None:
        """Lets go of what `keep` returned."""

    def begin(
        self,
        outputs: jax.Array,
        inputs: jax.Array,
        chosen: jax.Array,
        positions: jax.Array,
        layer: int,
        always: bool = False,
    ) -> jax.Array:
        """Dispatches what needs no plan; nothing here."""
        return outputs

    def nothing(self, total: int, width: int, dtype: np.dtype) -> jax.Array:
        """Returns the rows [total + 1, width] that the first layer adds: zeros."""
        if total not in self._nothing:
            self._nothing = {total: jnp.zeros((total + 1, width), dtype, device=self._device)}
        return self._nothing[total]

    def take(self, total: int, width: int, dtype: np.dtype) -> jax.Array:
        """Returns an array [total + 1, width] for a layer's rows; unwritten rows hold any finite values."""
        result = self._outputs.pop(total, None)
        return jnp.zeros((total + 1, width), dtype, device=self._device) if result is None else result

    def give_back(self, outputs: jax.Array) -> None:
        """Takes back an array whose reader has been dispatched, to be overwritten in the next layer."""
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
        """Dispatches `experts`; returns the outputs and an array that is ready when they are."""
        done: jax.Array | None = None
        for group in rows.groups(experts):
            self.stats.count_group(group)
            arrays = tuple(weights(group.experts))
            if self._product is None:
                format = self._format or plain_of(arrays[0])
                self._product = product_of(format, format.sizes(arrays[0]), inputs.dtype, self._device)
            name, product = self._product
            if name != REFERENCE:
                self.stats.by_kernel[name] += len(set(group.experts))
            outputs, done = grouped_ffn(outputs, inputs, group.slots, arrays, rows.choices, product)
        return outputs, done

    def rehearse(
        self,
        outputs: jax.Array,
        inputs: jax.Array,
        groups: Iterable[tuple[int, int]],
        weights: Any,
        choices: int,
    ) -> jax.Array:
        """Runs every program of `run`, with rows that nobody reads.

        Args:
            outputs, inputs: as of `run`.
            groups: shapes (row bucket, experts) of dispatches (`possible_groups`).
            weights: arrays of any expert on the device.
            choices: K.
        """
        format = self._format or plain_of(weights)
        _, product = product_of(format, format.sizes(weights), inputs.dtype, self._device)
        for bucket, size in groups:
            places = np.full((size, bucket), len(outputs) - 1, np.int32)
            outputs, _ = grouped_ffn(outputs, inputs, places, (weights,) * size, choices, product)
        return outputs

    def passed_on(self, outputs: Any, decoding: bool) -> Any:
        """Returns a layer's outputs, or `nothing`, in the form that the next layer's program takes."""
        return outputs

    def host_rows(self, outputs: jax.Array) -> np.ndarray:
        """Returns the array [T * K + 1, D] in host memory to which the host writes its rows in each layer."""
        if len(outputs) not in self._host_rows:
            self._host_rows = {len(outputs): np.empty(outputs.shape, outputs.dtype)}
        return self._host_rows[len(outputs)]

    def place(
        self, outputs: jax.Array, result: np.ndarray, rows: Assignments, experts: Sequence[int]
    ) -> jax.Array:
        """Copies the host's rows of `experts` into the outputs, in pieces of one size."""
        taken = np.concatenate([rows.slots(expert) for expert in experts])
        size = piece_rows(rows.total)
        for start in range(0, len(taken), size):
            piece = taken[start : start + size]
            slots = np.full(size, rows.total, np.int32)
            slots[: len(piece)] = piece
            values = np.zeros((size, result.shape[1]), result.dtype)
            np.take(result, piece, 0, out=values[: len(piece)])
            outputs = place_rows(outputs, slots, values)
        return outputs

    def rehearse_placing(self, outputs: jax.Array) -> jax.Array:
        """Runs the program of `place`, with rows that nobody reads."""
        size = piece_rows(len(outputs) - 1)
        slots = np.full(size, len(outputs) - 1, np.int32)
        return place_rows(outputs, slots, np.zeros((size, outputs.shape[1]), outputs.dtype))

    def clear(self) -> None:
        """Drops the output arrays after a failure, because rows may still be written to them."""
        self._outputs.clear()
        self._host_rows.clear()


class SharedExperts:
    """`DeviceExperts` for this machine's CPU: waits for the experts, and shares output arrays with the host.

    Args:
        cpu: what computes.
    """

    waits = True
    passes_rows_on = False
    first = 0
    spread: int | None = None

    def __init__(self, cpu: CpuExperts):
        self.stats = WorkStats()
        self._cpu = cpu
        self._arrays: dict[tuple[int, bool], np.ndarray] = {}

    lost = False

    def reserve(self, bank: ExpertBank, slots: int) -> None:
        pass

    def keep(self, weights: Any, expert: ExpertId | None = None) -> InMemory:
        return InMemory.of(weights, self._cpu.format)

    def release(self, kept: InMemory) -> None:
        pass

    def begin(
        self,
        outputs: np.ndarray,
        inputs: jax.Array,
        chosen: jax.Array,
        positions: jax.Array,
        layer: int,
        always: bool = False,
    ) -> np.ndarray:
        return outputs

    def nothing(self, total: int, width: int, dtype: np.dtype) -> np.ndarray:
        return self._array(total, width, dtype, False)

    def take(self, total: int, width: int, dtype: np.dtype) -> np.ndarray:
        # The program that read the last layer's rows has ended: it computed this layer's routing.
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

    def rehearse(
        self,
        outputs: np.ndarray,
        inputs: jax.Array,
        groups: Iterable[tuple[int, int]],
        weights: Any,
        choices: int,
    ) -> np.ndarray:
        return outputs  # its loops are compiled by computing a row (`runtime.warmup`)

    def rehearse_placing(self, outputs: np.ndarray) -> np.ndarray:
        return outputs  # the host writes into them itself

    def passed_on(self, outputs: np.ndarray, decoding: bool) -> np.ndarray:
        return outputs

    def host_rows(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    def place(
        self, outputs: np.ndarray, result: np.ndarray, rows: Assignments, experts: Sequence[int]
    ) -> np.ndarray:
        return outputs

    def clear(self) -> None:
        self._arrays.clear()


def device_experts(device: jax.Device, cpu: CpuExperts) -> DeviceExperts | SharedExperts:
    """Returns the executor of resident experts for a device."""
    if device.platform == "cpu":
        return SharedExperts(cpu)
    from layerscope_jax.offload.slotted import SlottedExperts  # which is made of what is above

    return SlottedExperts(device, cpu.format)


def piece_rows(total: int) -> int:
    """Rows of the host that `DeviceExperts.place` copies at once, of the T * K of a step.

    >>> piece_rows(4), piece_rows(100), piece_rows(4096 * 8)
    (4, 64, 4096)
    """
    power = next_power(total)
    return min(power, max(LEAST_PIECE, power // PIECES))


def forget_oldest(arrays: dict[Any, Any], most: int) -> None:
    """Removes all but the `most` newest entries."""
    while len(arrays) > most:
        del arrays[next(iter(arrays))]


def aligned_zeros(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Returns zeros aligned to 64 bytes, which JAX's CPU backend uses without a copy."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
