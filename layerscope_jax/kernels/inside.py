"""Our own loops inside a jitted program: a layer is no dispatch, no read-back, no Python.

XLA calls a compiled function at the place of a layer's experts (`xla_ffi.py`), and in the same way at that of
its other products and of its attention (`products.py`, `attention.py`). A crew of threads helps it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numba import carray

from layerscope_jax.kernels import crew
from layerscope_jax.kernels.activations import facts_of
from layerscope_jax.kernels.cpu import CpuExperts, InMemory
from layerscope_jax.kernels.crew import SEMAPHORE, SEMAPHORES, Crew
from layerscope_jax.kernels.encoded import ARRAYS as ENCODED_ARRAYS
from layerscope_jax.kernels.grouping import by_expert
from layerscope_jax.kernels.host_kernels import WORDS, AddressKernel
from layerscope_jax.kernels.loops import ARRAYS
from layerscope_jax.kernels.numbers import pointer
from layerscope_jax.kernels.registry import warn_fallback
from layerscope_jax.kernels.xla_calls import ARGUMENTS, RESULTS, buffer, layout, long_at, matches, within
from layerscope_jax.kernels.xla_ffi import Unavailable, register
from layerscope_jax.support import target
from layerscope_jax.support.njit import njit

FACTS = 6
"""Numbers of a layer's table before its addresses (`Inside.table_of`)."""

_, CHOICES, ROWS, TOKENS = range(4)  # letters, in their order
EXPERTS = layout("x T D, int32 T K, flag T", "x R D")


@njit(cache=True, nogil=True)
def fit_experts(call):
    """Whether a call that `fits` is one of `compute_experts`, and no choice an expert that is not there."""
    like, sizes = matches(call, EXPERTS)
    if not like or sizes[ROWS] != sizes[TOKENS] * sizes[CHOICES]:
        return False
    table_at, of_table = buffer(call, ARGUMENTS, 3)
    words = long_at(of_table)
    if words < 2 * FACTS or words % 2 != 0:
        return False
    table = carray(pointer(table_at), FACTS, np.int64)
    if table[5] < 1 or (words // 2 - FACTS) % table[5] != 0:
        return False
    return within(call, 1, sizes[ROWS], (words // 2 - FACTS) // table[5] - 1)


@njit(cache=True, nogil=True)
def pool_at(address):
    helpers = long_at(address + 8 * crew.HELPERS)
    return carray(pointer(address), SEMAPHORES + 2 * SEMAPHORE * helpers, np.int64)


@njit(cache=True, nogil=True)
def pieces(bounds, most, nodes):
    """Pieces of at most so many slots [N]: whose they are, their first and last slots.

    Args:
        bounds: [2, E] where each expert's slots begin and end.
        nodes: how many NUMA nodes there are; pieces are sorted by those of their experts (`numa.home`).

    Returns:
        These three, and [nodes + 1] where the pieces of each node begin.
    """
    count = 0
    for expert in range(bounds.shape[1]):
        count += (bounds[1, expert] - bounds[0, expert] + most - 1) // most
    whose, firsts, lasts = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    starts, index = np.zeros(nodes + 1, np.int64), 0
    for node in range(nodes):
        for expert in range(node, bounds.shape[1], nodes):
            for first in range(bounds[0, expert], bounds[1, expert], most):
                whose[index], firsts[index] = expert, first
                lasts[index] = min(first + most, bounds[1, expert])
                index += 1
        starts[node + 1] = index
    return whose, firsts, lasts, starts


@njit(cache=True, nogil=True)
def compute_experts(call, do, size):
    """A layer's experts: of inputs [T, D], choices [T, K], flags [T] and a table, into [T * K, D].

    Args:
        call: XLA's.
        do: address of the function of a thread's share.
        size: bytes of a number.
    """
    inputs, sizes = buffer(call, ARGUMENTS, 0)
    width = long_at(sizes + 8)
    chosen, sizes = buffer(call, ARGUMENTS, 1)
    tokens, choices = long_at(sizes), long_at(sizes + 8)
    flags, _ = buffer(call, ARGUMENTS, 2)
    table_at, sizes = buffer(call, ARGUMENTS, 3)
    words = long_at(sizes) // 2
    rows, _ = buffer(call, RESULTS, 0)
    table = carray(pointer(table_at), words, np.int64)
    pool, hidden, piece, arrays = pool_at(table[0]), table[1], table[2], table[5]
    active = carray(pointer(flags), tokens, np.uint8)
    order, bounds, _ = by_expert(carray(pointer(chosen), tokens * choices, np.int32), active, choices)
    nodes = pool[crew.OF_NODES]
    whose, firsts, lasts, starts = pieces(bounds, piece, nodes)
    counters = np.zeros(nodes, np.int64)
    addresses = np.empty((len(whose), arrays), np.int64)
    for index in range(len(whose)):
        for array in range(arrays):
            addresses[index, array] = table[FACTS + arrays * whose[index] + array]
        if index == 0 or whose[index] != whose[index - 1]:
            pool[crew.COUNTED] += 1
    pool[crew.ASSIGNED] += len(order)
    outputs = carray(pointer(rows), (tokens, choices * width * size), np.uint8)
    for token in range(tokens):
        if not active[token]:  # nobody writes these
            outputs[token] = 0
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.PARTS], job[crew.INPUTS] = do, len(firsts), inputs
    job[crew.WEIGHTS], job[crew.OUTPUTS] = addresses.ctypes.data, rows
    job[crew.ROWS], job[crew.DEPTH], job[crew.WIDTH] = tokens * choices, hidden, width
    job[crew.FIRSTS], job[crew.LASTS] = firsts.ctypes.data, lasts.ctypes.data
    job[crew.ORDER], job[crew.LENGTH], job[crew.CHOICES] = order.ctypes.data, len(order), choices
    job[crew.ACTIVATION], job[crew.LIMIT] = table[3], table[4]
    job[crew.NODES], job[crew.NEAR] = nodes, pool[crew.OF_CORES]
    job[crew.STARTS], job[crew.COUNTERS] = starts.ctypes.data, counters.ctypes.data
    crew.share_out(pool, job, 3 * width * hidden * size * len(firsts))
    # Numba gives an array up after its last use: this is theirs.
    job[crew.LENGTH] = addresses.size + firsts.size + lasts.size + order.size + starts.size + counters.size


def experts_target(kernel: AddressKernel, format: str, dtype: np.dtype) -> str:
    """XLA's name for the function of experts in a format, with activations of a dtype.

    Raises:
        Unavailable: if there can be none.
    """
    rows: Any = WORDS[dtype.name].type
    weights: Any = kernel.words(format, dtype).type
    arrays = ENCODED_ARRAYS if kernel.encoded else ARRAYS
    return register(
        f"layerscope_experts_{kernel.name}_{'encoded' if kernel.encoded else format}_{dtype.name}",
        compute_experts,
        lambda: crew.experts(kernel.run, kernel.scratch_bytes, arrays, rows, weights),
        dtype,
        fit_experts,
    )


class Inside:
    """What a program needs to compute with our own loops: a crew of threads, and where a model's experts lie.

    Args:
        cpu: what would compute experts outside: how, and by how many threads.
        format: name of their format.
        dtype: of activations.

    Attributes:
        target: XLA's name for the function of experts; None where programs cannot compute them.
        table: [2] uint32, an int64 in two words: where the crew's memory is. It is all that products and
            attention need.
    """

    def __init__(self, cpu: CpuExperts, format: str, dtype: np.dtype):
        self.target: str | None = None
        if isinstance(cpu.kernel, AddressKernel):
            self._piece = cpu.kernel.piece
            try:
                self.target = experts_target(cpu.kernel, format, dtype)
            except Unavailable as error:
                warn_fallback(str(error))
        self._crew = Crew(cpu.threads - 1)
        self.table = np.array([self._crew.pool.ctypes.data], np.int64).view(np.uint32)
        self.check_open, self.close = self._crew.check_open, self._crew.close

    @staticmethod
    def is_possible(dtype: np.dtype) -> bool:
        """Whether this system can let programs call our own loops, for activations of a dtype."""
        return platform.system() == "Linux" and dtype.name in WORDS and target.refusal() is None

    def table_of(self, experts: Sequence[InMemory]) -> np.ndarray:
        """[2 * (FACTS + A E)] uint32 for a layer: `table`, then F, tokens of an expert at a time, activation
        and limit, A, and the A addresses of each expert.

        Args:
            experts: of the layer; their memory must outlive every program that is given the table.
        """
        addresses = np.frombuffer(b"".join(expert.addresses for expert in experts), np.int64)
        layout = experts[0].layout
        activation, limit = facts_of(layout.format.body)
        facts = [
            self._crew.pool.ctypes.data,
            layout.hidden,
            self._piece,
            activation,
            limit.view(np.uint32),
            len(addresses) // len(experts),
        ]
        return np.array([*facts, *addresses], np.int64).view(np.uint32)

    def take_counts(self) -> tuple[int, int]:
        """Experts and assignments computed since the last time."""
        pool = self._crew.pool
        counts = int(pool[crew.COUNTED]), int(pool[crew.ASSIGNED])
        pool[[crew.COUNTED, crew.ASSIGNED]] = 0
        return counts


def rows(name: str, inputs: jax.Array, experts: jax.Array, active: jax.Array, table: jax.Array) -> jax.Array:
    """Unweighted rows of a layer's experts, inside a jitted program.

    Args:
        name: `Inside.target`.
        inputs: [T, D].
        experts: [T, K] int32.
        active: [T] bool: the rows of the others are zeros.
        table: of the layer (`Inside.table_of`).

    Returns:
        [T * K, D].

    Raises:
        ValueError: for arguments of other shapes or types.
    """
    tokens = len(inputs)
    kinds = [(inputs, 2, np.dtype(name.rpartition("_")[2])), (experts, 2, np.dtype(np.int32))]
    kinds += [(active, 1, np.dtype(np.bool_)), (table, 1, np.dtype(np.uint32))]
    fit = all(array.ndim == rank and array.dtype == dtype for array, rank, dtype in kinds)
    arrays = ENCODED_ARRAYS if "_encoded_" in name else ARRAYS
    numbers, rest = divmod(len(table) - 2 * FACTS, 2 * arrays) if fit else (0, 0)
    if numbers < 1 or rest or not len(experts) == len(active) == tokens:
        got = ", ".join(f"{array.dtype}{list(array.shape)}" for array, *_ in kinds)
        raise ValueError(
            f"{name} takes inputs [T, D], experts int32 [T, K], active bool [T] and a table, got {got}"
        )
    shape = jax.ShapeDtypeStruct((experts.size, inputs.shape[1]), inputs.dtype)
    return jax.ffi.ffi_call(name, shape)(inputs, experts, active, table)
