"""Experts computed by this machine's CPU, by the kernel that suits their format and shape.

float32 and bfloat16 by loops of our own: bfloat16 by AMX or by products of pairs where the CPU has them.
Other formats by kernels that were registered for them, or by their reference: XLA's products.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.formats import ExpertFormat, plain_of
from layerscope_jax.kernels.activations import facts_of
from layerscope_jax.kernels.grouping import Assignments, Group, pieces
from layerscope_jax.kernels.host_kernels import WORDS, AddressKernel, RowsKernel, addresses_of, suits
from layerscope_jax.kernels.loops import no_scratch
from layerscope_jax.kernels.registry import Work
from layerscope_jax.models.experts import SWIGLU
from layerscope_jax.support import numa
from layerscope_jax.support.machine import cores
from layerscope_jax.support.threads import Helpers

SHARE_BYTES = 1 << 20
"""Bytes of weights that make waking another thread worth while: some 50 us of reading."""


def default_threads(device: jax.Device) -> int:
    """As many as there are cores, less one where `device` is an accelerator, which another thread feeds."""
    return max(1, cores() - (device.platform != "cpu"))


def expert_rows(
    inputs: jax.Array, slots: jax.Array, experts: tuple[Any, ...], choices: int, product: Callable
) -> jax.Array:
    """N experts of M rows each, unrolled: [T, D], [N, M] -> [N * M, D].

    Args:
        product: `product(x, expert)` of some rows, as `ExpertFormat.ffn`.
    """
    token = jnp.minimum(slots // choices, inputs.shape[0] - 1)  # padding reads any row
    return jnp.concatenate([product(inputs[token[i]], expert) for i, expert in enumerate(experts)])


grouped_rows = jax.jit(expert_rows, static_argnames=("choices", "product"))


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


class Layout(NamedTuple):
    """How experts of one bank lie in memory; of equal ones there is one (`layout_of`).

    Attributes:
        format: of the experts.
        width, hidden: D, F.
        nbytes: of an expert.
    """

    format: ExpertFormat
    width: int
    hidden: int
    nbytes: int


@functools.lru_cache(maxsize=256)
def layout_of(format: ExpertFormat, width: int, hidden: int) -> Layout:
    return Layout(format, width, hidden, format.expert_bytes(width, hidden))


class InMemory(NamedTuple):
    """An expert that this process can read.

    Attributes:
        arrays: of its format, copied already and not on the way: our own loops do not wait for copies.
        addresses: what our own loops are given of it (`host_kernels.addresses_of`), int64 as bytes: those of
            many experts are joined faster than numbers.
        layout: how it lies in memory.
    """

    arrays: Any
    addresses: bytes
    layout: Layout

    @classmethod
    def of(cls, arrays: Any, format: ExpertFormat | None = None) -> InMemory:
        """Waits until the arrays are there.

        Args:
            arrays: an `Expert` of the format.
            format: None for the plain one of these matrices.

        Raises:
            ValueError: if they are not those of an expert in the format, in this machine's memory.
        """
        format = plain_of(arrays) if format is None else format
        format.check(arrays)
        copied = [array for array in arrays if not isinstance(array, np.ndarray)]
        if any(device.platform != "cpu" for array in copied for device in array.devices()):
            raise ValueError(f"expected an expert on a CPU device, got one on {arrays[0].sharding}")
        jax.block_until_ready(copied)
        pointers = [address(array) for array in arrays]
        addresses = np.array(addresses_of(format, arrays, pointers), np.int64)
        return cls(arrays, addresses.tobytes(), layout_of(format, *format.sizes(arrays)))


def address(array: jax.Array | np.ndarray) -> int:
    """Where the numbers of an array in this machine's memory begin.

    `np.asarray` of a bfloat16 array takes ten times as long as its pointer.
    """
    return array.ctypes.data if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()


class CpuExperts:
    """Computes rows of experts whose weights are in this machine's memory.

    XLA's products run on the CPU device that an expert's arrays are on. One caller at a time.

    Args:
        threads: that share the experts of a call, the caller's own counted.
        kernel: that computes them; None: the reference of their format.
        format: of the experts; None for plain ones.
    """

    def __init__(
        self, threads: int, kernel: AddressKernel | RowsKernel | None, format: ExpertFormat | None = None
    ):
        self.threads = threads
        self.kernel = kernel
        self.format = format
        self._taken: tuple[Layout, np.dtype] | None = None  # experts and rows that the kernel was asked about
        self._body = facts_of(SWIGLU)  # of these experts
        self._kind = np.empty(1)  # an array of the type that loops of our own take weights for
        self._kept = [np.empty(0, np.uint8)] * threads
        self._helpers = Helpers(threads - 1, began=numa.join_node)

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
        if self.kernel is None:
            self._by_reference(outputs, inputs, rows, experts, weights, stats)
            return
        chosen = list(experts)
        if not chosen:
            return
        held = weights(chosen)
        check(outputs, inputs, rows, held)
        index = np.array(chosen)
        firsts, lasts = rows.starts[index], rows.ends[index]
        tokens = rows.assigned
        if len(chosen) < len(rows.demand):
            tokens = sum([rows.demand[expert] for expert in chosen])
        stats.count(experts=len(chosen), tokens=tokens, rows=tokens)
        stats.by_kernel[self.kernel.name] += len(chosen)
        if isinstance(self.kernel, RowsKernel):
            call, parts = self._rows(self.kernel, outputs, inputs, rows, held, firsts, lasts), len(held)
        else:
            call, parts = self._loops(self.kernel, outputs, inputs, rows, chosen, held, firsts, lasts, tokens)
        shares = min(self.threads, parts, max(1, held[0].layout.nbytes * len(held) // SHARE_BYTES))
        began = time.perf_counter()
        self._helpers.run(call, shares)
        stats.arithmetic_s += time.perf_counter() - began

    def _by_reference(
        self,
        outputs: np.ndarray,
        inputs: jax.Array | np.ndarray,
        rows: Assignments,
        experts: Iterable[int],
        weights: Callable[[Sequence[int]], Sequence[InMemory]],
        stats: WorkStats,
    ) -> None:
        began = time.perf_counter()
        groups, parts, local = rows.groups(experts), [], None
        for group in groups:
            stats.count_group(group)
            held = weights(group.experts)
            arrays = tuple(expert.arrays for expert in held)
            if local is None:
                local = jax.device_put(np.asarray(inputs), arrays[0][0].sharding)
            parts.append(grouped_rows(local, group.slots, arrays, rows.choices, held[0].layout.format.ffn))
        for group, part in zip(groups, parts, strict=True):
            outputs[group.slots.reshape(-1)] = part
        stats.arithmetic_s += time.perf_counter() - began

    def _loops(
        self,
        kernel: AddressKernel,
        outputs: np.ndarray,
        inputs: jax.Array | np.ndarray,
        rows: Assignments,
        chosen: Sequence[int],
        held: Sequence[InMemory],
        firsts: np.ndarray,
        lasts: np.ndarray,
        tokens: int,
    ) -> tuple[Callable[[int], None], int]:
        """A thread's share of a call by our own loops, and how many parts there are to share."""
        layout = held[0].layout
        if self._taken is None or self._taken[0] is not layout or self._taken[1] != outputs.dtype:
            self._take(kernel, layout, outputs.dtype)
        activation, limit = self._body
        words = outputs.view(WORDS[outputs.dtype.name])
        addresses = np.frombuffer(bytearray().join([expert.addresses for expert in held]), np.int64)
        addresses = addresses.reshape(len(held), -1)
        size = 0
        works: list[
            tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
        ] = []  # the last counts what is taken
        for some in numa.by_node(chosen):
            part = addresses[some], firsts[some], lasts[some]
            if tokens > kernel.piece:
                part = pieces(*part, kernel.piece)
            works.append((*part, np.zeros(1, np.int64)))
            if kernel.scratch_bytes is not no_scratch and len(part[1]):
                size = max(size, kernel.scratch_bytes(*part[1:], layout.width, layout.hidden))

        def share(number: int) -> None:
            assert held  # it keeps them, as whoever waits for it may be interrupted
            begins = address(inputs)
            for node in numa.own_first(len(works)):
                addresses, firsts, lasts, counter = works[node]
                if not len(firsts):
                    continue
                kernel.run(
                    addresses,
                    firsts,
                    lasts,
                    rows.order,
                    rows.choices,
                    begins,
                    layout.hidden,
                    activation,
                    limit,
                    words,
                    self._kind,
                    address(counter),
                    self._scratch(number, size) if size else 0,
                )

        return share, sum(len(firsts) for _, firsts, _, _ in works)

    def _take(self, kernel: AddressKernel, layout: Layout, dtype: np.dtype) -> None:
        """Makes sure that loops of our own can read such experts, and such rows.

        Raises:
            ValueError: if they cannot.
        """
        work = Work(
            "experts", layout.format.name, dtype, (layout.width, layout.hidden), body=layout.format.body
        )
        if not suits(kernel, work):
            raise ValueError(
                f"the kernel {kernel.name!r} cannot compute experts [{layout.width}, {layout.hidden}] in the "
                f"format {layout.format.name!r} with rows of {dtype}"
            )
        self._kind = np.empty(1, kernel.words(layout.format.name, dtype))
        self._body, self._taken = facts_of(layout.format.body), (layout, dtype)

    def _rows(
        self,
        kernel: RowsKernel,
        outputs: np.ndarray,
        inputs: jax.Array | np.ndarray,
        rows: Assignments,
        held: Sequence[InMemory],
        firsts: np.ndarray,
        lasts: np.ndarray,
    ) -> Callable[[int], None]:
        """A thread's share of a call by a kernel that takes one expert after the other."""
        read, numbers = np.asarray(inputs), itertools.count()  # whose next number no two threads get

        def share(_: int) -> None:
            while (index := next(numbers)) < len(held):
                slots, arrays = rows.order[firsts[index] : lasts[index]], held[index].arrays
                result = np.empty((len(slots), outputs.shape[1]), outputs.dtype)
                expert = type(arrays)(*map(np.asarray, arrays))
                kernel.run(read[slots // rows.choices], expert, result)
                outputs[slots] = result

        return share

    def _scratch(self, share: int, size: int) -> int:
        """Address of memory that no other thread of this call uses; it grows as it has to."""
        if self._kept[share].nbytes < size + 64:
            self._kept[share] = np.empty(size + 64, np.uint8)
        return -(-self._kept[share].ctypes.data // 64) * 64


def check(
    outputs: np.ndarray, inputs: jax.Array | np.ndarray, rows: Assignments, held: Sequence[InMemory]
) -> None:
    """Compares arrays with each other and with the experts, before loops go by addresses alone.

    Raises:
        ValueError: if they do not fit, do not lie row after row, or if the experts differ in shape or format.
    """
    layout = held[0].layout
    if any([expert.layout is not layout for expert in held]):
        raise ValueError("expected experts of one shape and format in a call, got several")
    if (
        outputs.shape == (rows.total + 1, layout.width)
        and inputs.shape == (rows.total // rows.choices, layout.width)
        and outputs.dtype == inputs.dtype
        and outputs.flags.carray
        and (isinstance(inputs, jax.Array) or inputs.flags.c_contiguous)
    ):
        return
    raise ValueError(
        f"expected inputs [{rows.total // rows.choices}, {layout.width}] and outputs [{rows.total + 1}, "
        f"{layout.width}] of one dtype, row after row, got {inputs.dtype}{list(inputs.shape)} and "
        f"{outputs.dtype}{list(outputs.shape)}"
    )
