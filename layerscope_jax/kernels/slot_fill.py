"""Copying experts into slots inside a jitted program on a CPU, by a loop of our own.

An accelerator has a cache of experts in its memory, and a program that fills it reads the host's memory by
address. On a CPU both memories are the same; what this loop does there is what a kernel does on a GPU.
"""

from __future__ import annotations

import jax
import numpy as np
from numba import carray

from layerscope_jax.kernels.numbers import pointer
from layerscope_jax.kernels.xla_calls import (
    ARGUMENTS,
    ARGUMENTS_NUMBER,
    INT32,
    NUMBER,
    RANK,
    RESULTS,
    SIZES,
    TYPE,
    buffer,
    description,
    int_at,
    long_at,
)
from layerscope_jax.kernels.xla_ffi import no_share, register
from layerscope_jax.support.njit import njit

POOL, SOURCES, TARGETS, TABLE = range(4)


@njit(cache=True, nogil=True)
def fit_fill(call):
    """Whether a call that `fits` is one of `fill_slots`, and no move leads out of the slots or the table."""
    if long_at(call + ARGUMENTS_NUMBER) != 4 or long_at(call + NUMBER) != 1:
        return False
    given, kept = description(call, ARGUMENTS, POOL), description(call, RESULTS, 0)
    rank = long_at(given + RANK)
    if rank < 1 or rank != long_at(kept + RANK):
        return False
    for axis in range(rank):
        if long_at(long_at(given + SIZES) + 8 * axis) != long_at(long_at(kept + SIZES) + 8 * axis):
            return False
    moves = long_at(buffer(call, ARGUMENTS, SOURCES)[1]) if rank else 0
    for index in (SOURCES, TARGETS):
        item = description(call, ARGUMENTS, index)
        if int_at(item + TYPE) != INT32 or long_at(item + RANK) != 1:
            return False
        if long_at(long_at(item + SIZES)) != moves:
            return False
    slots = long_at(long_at(given + SIZES))
    experts = long_at(buffer(call, ARGUMENTS, TABLE)[1]) // 2
    sources = carray(pointer(buffer(call, ARGUMENTS, SOURCES)[0]), moves, np.int32)
    targets = carray(pointer(buffer(call, ARGUMENTS, TARGETS)[0]), moves, np.int32)
    for move in range(moves):
        if sources[move] >= experts or (sources[move] >= 0 and not 0 <= targets[move] < slots):
            return False
    return True


@njit(cache=True, nogil=True)
def copy(source, target, count):
    """Copies bytes from one address to another, eight at a time."""
    words = count // 8
    given, kept = carray(pointer(source), words, np.int64), carray(pointer(target), words, np.int64)
    for word in range(words):
        kept[word] = given[word]
    rest = count - 8 * words
    given_rest = carray(pointer(source + 8 * words), rest, np.uint8)
    kept_rest = carray(pointer(target + 8 * words), rest, np.uint8)
    for byte in range(rest):
        kept_rest[byte] = given_rest[byte]


@njit(cache=True, nogil=True)
def fill_slots(call, do, size):
    """Copies experts' arrays, whose addresses a table [E] has, into slots of a pool [S, ...].

    Args:
        call: XLA's: pool, sources [N], where a negative one is no move, targets [N], table; the result is
            the pool, in its place where XLA lets it.
        do: not used.
        size: bytes of a number.
    """
    given, sizes = buffer(call, ARGUMENTS, POOL)
    kept, _ = buffer(call, RESULTS, 0)
    slots, count = long_at(sizes), size
    for axis in range(1, long_at(description(call, ARGUMENTS, POOL) + RANK)):
        count *= long_at(sizes + 8 * axis)
    if kept != given:
        copy(given, kept, slots * count)
    sources_at, sizes = buffer(call, ARGUMENTS, SOURCES)
    moves = long_at(sizes)
    sources = carray(pointer(sources_at), moves, np.int32)
    targets = carray(pointer(buffer(call, ARGUMENTS, TARGETS)[0]), moves, np.int32)
    table_at, sizes = buffer(call, ARGUMENTS, TABLE)
    table = carray(pointer(table_at), long_at(sizes) // 2, np.int64)
    for move in range(moves):
        if sources[move] >= 0:
            copy(table[sources[move]], kept + count * targets[move], count)


def target_of(dtype: np.dtype) -> str:
    """XLA's name for the function that fills pools of a dtype.

    Raises:
        Unavailable: if there can be none.
    """
    return register(f"layerscope_fill_{dtype.name}", fill_slots, no_share, dtype, fit_fill)


def filled(pool: jax.Array, sources: jax.Array, targets: jax.Array, table: jax.Array) -> jax.Array:
    """A pool with some of its slots overwritten, inside a jitted program.

    Args:
        pool: [S, ...] one array of the experts in each slot.
        sources: [N] int32, the expert to copy in each move; negative for no move.
        targets: [N] int32, the slot that it is copied to.
        table: [2 E] uint32, the address of that array of each expert, an int64 in two words.
    """
    call = jax.ffi.ffi_call(
        target_of(np.dtype(pool.dtype)),
        jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={POOL: 0},
    )
    return call(pool, sources, targets, table)
