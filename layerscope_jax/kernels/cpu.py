"""Experts computed by this machine's CPU, by the kernel that suits their shape.

float32 and bfloat16 by loops of our own: bfloat16 by AMX or by products of pairs where the CPU has them.
Other types by XLA's products.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numba import types

from layerscope_jax.kernels import amx, vectors
from layerscope_jax.kernels import experts as kernels
from layerscope_jax.kernels.grouping import Assignments, Group
from layerscope_jax.models.experts import ExpertWeights, ffn
from layerscope_jax.support import target
from layerscope_jax.support.machine import cores
from layerscope_jax.support.threads import Helpers

SHARE_BYTES = 1 << 20
"""Bytes of weights that make waking another thread worth while: some 50 us of reading."""


def default_threads(device: jax.Device) -> int:
    """As many as there are cores, less one where `device` is an accelerator, which another thread feeds."""
    return max(1, cores() - (device.platform != "cpu"))


class Kernel(NamedTuple):
    """A way to compute experts that is not XLA's.

    Attributes:
        name: as in the statistics.
        piece: rows of an expert that it computes at a time.
        words: what it takes bfloat16 for (`vectors.py`).
    """

    name: str
    piece: int
    words: np.dtype = np.dtype(np.uint16)


LOOPS, AMX = Kernel("loops", kernels.PIECE), Kernel("amx", amx.PIECE)
PAIRS = Kernel("pairs", kernels.PIECE, np.dtype(np.int16))


COMPILED = {"loops": kernels.run_experts, "pairs": kernels.run_experts, "amx": amx.run_experts}
"""What numba compiles for each kernel."""


def kernel_of(dtype: np.dtype, width: int, hidden: int) -> Kernel | None:
    """For experts [D, F] of a dtype, on this CPU, compiled for it. None: they are XLA's."""
    suitable = [LOOPS] if dtype in (np.float32, jnp.bfloat16) else []
    if vectors.suit_pairs(dtype, width, hidden):
        suitable.insert(0, PAIRS)
    if amx.suits(dtype, width, hidden):
        suitable.insert(0, AMX)
    return next((kernel for kernel in suitable if compiles(kernel, dtype)), None)


@functools.cache
def compiles(kernel: Kernel, dtype: np.dtype) -> bool:
    """Whether numba can compile a kernel for experts of a dtype, which it then has; says so if it cannot."""
    reason = target.refusal()
    if reason is None:
        words = types.float32 if dtype.itemsize == 4 else types.int16 if kernel is PAIRS else types.uint16
        whole, number = types.int64[::1], types.int64
        signature = [types.int64[:, ::1], whole, whole, types.int32[::1], number, number, number]
        signature += [words[:, ::1], number] + [number] * (kernel is AMX)
        try:
            COMPILED[kernel.name].compile(tuple(signature))
            return True
        except Exception as error:  # whatever numba and LLVM raise
            reason = f"{type(error).__name__}: {error}"
    say_it_is_slower(reason)
    return False


@functools.cache
def say_it_is_slower(reason: str) -> None:
    """Warns once that something of our own does not compute experts."""
    warnings.warn(
        "a kernel of our own cannot be compiled or called, so that another or XLA computes in its place, "
        f"more slowly (`RunStats.kernels` says which computed experts): {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def expert_rows(
    inputs: jax.Array, slots: jax.Array, weights: tuple[ExpertWeights, ...], choices: int
) -> jax.Array:
    """N experts of M rows each, unrolled: [T, D], [N, M] -> [N * M, D]."""
    token = jnp.minimum(slots // choices, inputs.shape[0] - 1)  # padding reads any row
    return jnp.concatenate([ffn(inputs[token[i]], expert) for i, expert in enumerate(weights)])


grouped_rows = jax.jit(expert_rows, static_argnames="choices")


@dataclass
class WorkStats:
    """What an executor did since the last reset.

    Attributes:
        busy_s: at it, Python around the arithmetic included.
        arithmetic_s: of that, in our own loops and in XLA's products; counted on CPUs alone.
        by_kernel: experts that each kernel of our own computed, by its name; XLA the others.
    """

    busy_s: float = 0.0
    arithmetic_s: float = 0.0
    experts: int = 0
    tokens: int = 0
    rows: int = 0  # computed, padding counted
    dispatches: int = 0
    by_kernel: Counter[str] = field(default_factory=Counter)

    def count(self, experts: int, tokens: int, rows: int) -> None:
        """One dispatch."""
        self.experts += experts
        self.tokens += tokens
        self.rows += rows
        self.dispatches += 1

    def count_group(self, group: Group) -> None:
        self.count(len(set(group.experts)), group.rows, group.slots.size)


class InMemory(NamedTuple):
    """An expert that this process can read.

    Attributes:
        arrays: its matrices, copied already and not on the way: our own loops do not wait for copies.
        addresses: of the three of them, int64 as bytes: those of many experts are joined faster than numbers.
    """

    arrays: ExpertWeights
    addresses: bytes

    @classmethod
    def of(cls, arrays: ExpertWeights) -> InMemory:
        """Waits until the matrices are there.

        Raises:
            ValueError: if they are not those of an expert, of one dtype, in this machine's memory.
        """
        gate, up, down = arrays
        same = gate.ndim == 2 and gate.shape == up.shape == down.shape[::-1]
        if not same or not gate.dtype == up.dtype == down.dtype:
            found = ", ".join(f"{matrix.dtype}{list(matrix.shape)}" for matrix in arrays)
            raise ValueError(f"an expert is gate [D, F], up [D, F] and down [F, D] of one dtype, got {found}")
        if any(device.platform != "cpu" for matrix in arrays for device in matrix.devices()):
            raise ValueError(f"expected an expert on a CPU device, got one on {gate.sharding}")
        jax.block_until_ready(arrays)
        addresses = np.array([matrix.unsafe_buffer_pointer() for matrix in arrays], np.int64)
        return cls(arrays, addresses.tobytes())


def address(array: jax.Array | np.ndarray) -> int:
    """Where the numbers of an array in this machine's memory begin.

    `np.asarray` of a bfloat16 array takes ten times as long as its pointer.
    """
    return array.unsafe_buffer_pointer() if isinstance(array, jax.Array) else array.ctypes.data


class CpuExperts:
    """Computes rows of experts whose weights are in this machine's memory.

    XLA's products run on the CPU device that an expert's arrays are on. One caller at a time.

    Args:
        threads: that share the experts of a call, the caller's own counted.
        kernel: that computes them; None: XLA.
    """

    def __init__(self, threads: int, kernel: Kernel | None):
        self.threads = threads
        self.kernel = kernel
        self._kept = [np.empty(0, np.uint8)] * threads
        self._helpers = Helpers(threads - 1)

    def rest(self) -> None:
        """Waits until nothing is computed any more, whatever interrupted `compute`."""
        self._helpers.rest()

    def close(self) -> None:
        self._helpers.close()

    def compute(
        self,
        outputs: np.ndarray,
        inputs: jax.Array | np.ndarray,
        rows: Assignments,
        experts: Iterable[int],
        weights: Callable[[Sequence[int]], Sequence[InMemory]],
        stats: WorkStats,
    ) -> None:
        """Writes the rows of some of a layer's experts.

        Args:
            outputs: [T * K + 1, D]; rows of other experts are left alone, the last is anybody's.
            inputs: [T, D] in this machine's memory.
            rows: which rows go to which expert.
            experts: that are to be computed.
            weights: of some experts.
            stats: counts what is done.
        """
        if self.kernel is not None:
            self._by(self.kernel, outputs, inputs, rows, list(experts), weights, stats)
            return
        began = time.perf_counter()
        groups, parts, local = rows.groups(experts), [], None
        for group in groups:
            stats.count_group(group)
            arrays = tuple(expert.arrays for expert in weights(group.experts))
            if local is None:
                local = jax.device_put(np.asarray(inputs), arrays[0].gate.sharding)
            parts.append(grouped_rows(local, group.slots, arrays, rows.choices))
        for group, part in zip(groups, parts, strict=True):
            outputs[group.slots.reshape(-1)] = part
        stats.arithmetic_s += time.perf_counter() - began

    def _by(
        self,
        kernel: Kernel,
        outputs: np.ndarray,
        inputs: jax.Array | np.ndarray,
        rows: Assignments,
        experts: list[int],
        weights: Callable[[Sequence[int]], Sequence[InMemory]],
        stats: WorkStats,
    ) -> None:
        if not experts:
            return
        held = weights(experts)
        width, hidden = held[0].arrays.gate.shape
        check(outputs, inputs, rows, held[0].arrays.gate)
        addresses = np.frombuffer(bytearray().join([expert.addresses for expert in held]), np.int64)
        addresses = addresses.reshape(-1, 3)
        index = np.array(experts)
        firsts, lasts = rows.starts[index], rows.ends[index]
        tokens = len(rows.order)
        if len(experts) < len(rows.demand):
            tokens = sum([rows.demand[expert] for expert in experts])
        stats.count(experts=len(experts), tokens=tokens, rows=tokens)
        stats.by_kernel[kernel.name] += len(experts)
        if tokens > kernel.piece:
            addresses, firsts, lasts = pieces(addresses, firsts, lasts, kernel.piece)
        size = 3 * width * hidden * outputs.itemsize * len(held)
        words = outputs.view(kernel.words) if outputs.itemsize == 2 else outputs
        begins = address(inputs)
        counter = np.zeros(1, np.int64)
        of_all = addresses, firsts, lasts, rows.order, rows.choices, begins, hidden, words

        scratch = amx.scratch_bytes(firsts, lasts, width, hidden) if kernel is AMX else 0

        def part(share: int) -> None:
            if kernel is AMX:
                amx.run_experts(*of_all, address(counter), self._scratch(share, scratch))
            else:
                kernels.run_experts(*of_all, address(counter))

        shares = min(self.threads, len(firsts), max(1, size // SHARE_BYTES))
        began = time.perf_counter()
        self._helpers.run(part, shares)
        stats.arithmetic_s += time.perf_counter() - began

    def _scratch(self, share: int, size: int) -> int:
        """Address of memory that no other thread of this call uses; it grows as it has to."""
        if self._kept[share].nbytes < size + 64:
            self._kept[share] = np.empty(size + 64, np.uint8)
        return -(-self._kept[share].ctypes.data // 64) * 64


def check(outputs: np.ndarray, inputs: jax.Array | np.ndarray, rows: Assignments, gate: jax.Array) -> None:
    """Before loops go by addresses alone.

    Raises:
        ValueError: if arrays do not fit each other, or do not lie row after row.
    """
    width = gate.shape[0]
    if (
        outputs.shape == (rows.total + 1, width)
        and inputs.shape == (rows.total // rows.choices, width)
        and outputs.dtype == inputs.dtype == gate.dtype
        and outputs.flags.carray
        and (isinstance(inputs, jax.Array) or inputs.flags.c_contiguous)
    ):
        return
    raise ValueError(
        f"expected inputs [{rows.total // rows.choices}, {width}] and outputs [{rows.total + 1}, {width}] of "
        f"{gate.dtype}, row after row, got {inputs.dtype}{list(inputs.shape)} and "
        f"{outputs.dtype}{list(outputs.shape)}"
    )


def pieces(
    addresses: np.ndarray, firsts: np.ndarray, lasts: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same experts with at most so many rows each, an expert of more several times.

    >>> addresses, firsts, lasts = pieces(np.array([[1], [2]]), np.array([0, 5]), np.array([5, 7]), 2)
    >>> addresses.tolist(), firsts.tolist(), lasts.tolist()
    ([[1], [1], [1], [2]], [0, 2, 4, 5], [2, 4, 5, 7])
    """
    counts = -(-(lasts - firsts) // most)
    whose = np.repeat(np.arange(len(firsts)), counts)
    firsts = firsts[whose] + most * (np.arange(len(whose)) - (np.cumsum(counts) - counts)[whose])
    return addresses[whose], firsts, np.minimum(firsts + most, lasts[whose])
