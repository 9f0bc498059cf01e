"""Attention inside a jitted program by our own loops: a decode step's here, others' in `prefill_attention`.

Each row reads the positions that it has, no others. XLA's products read caches as long as they may become, of
all rows, and wake threads of their own for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import carray, types

from layerscope_jax.kernels import crew
from layerscope_jax.kernels.experts import BLOCK, STRIDE, add_product
from layerscope_jax.kernels.foreign import (
    ARGUMENTS,
    ARGUMENTS_NUMBER,
    DATA,
    FLOAT32,
    INT32,
    NUMBER,
    RANK,
    RESULTS,
    SIZES,
    buffer,
    is_of,
    long_at,
    target,
)
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.numbers import pointer, round_row, taken, weigh, widened
from layerscope_jax.kernels.prefill_attention import (
    BOUNDS,
    GROUPS,
    HEADS,
    VALUES,
    blocks,
    compute_attention_of_many,
)
from layerscope_jax.kernels.products import products
from layerscope_jax.kernels.vectors import COLUMNS
from layerscope_jax.models.experts import products_by
from layerscope_jax.models.layers import attending_by
from layerscope_jax.support.njit import cfunc, njit


@njit(cache=True, nogil=True, inline="always")
def attend_group(queries, keys, values, first, last, outputs):
    """Queries [G, D] of one row see keys [D, P] and values [P, D] from `first` to `last`."""
    groups, size = queries.shape
    x = np.empty((groups, size), np.float32)
    for group in range(groups):
        for d in range(np.uint64(size)):
            x[group, d] = widened(queries[group, d])
    # To the edge of what is added at once: a few positions more are computed, and have a share of zero.
    until = min(first + (last - first + COLUMNS - 1) // COLUMNS * COLUMNS, keys.shape[1])
    scores, sums = np.empty((groups, until - first), np.float32), np.empty((groups, STRIDE), np.float32)
    scale = np.float32(1 / np.sqrt(size))
    for begin in range(first, until, BLOCK):
        end = min(begin + BLOCK, until)
        clear(sums, end - begin)
        add_product(x, keys, begin, end, sums, keys)
        for group in range(groups):
            some = scores[group, begin - first : end - first]
            for index in range(np.uint64(end - begin)):
                some[index] = scale * sums[group, index]
    for group in range(groups):
        weigh(scores[group, : last - first], outputs)
        for index in range(np.uint64(last - first), np.uint64(until - first)):
            scores[group, index] = 0
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        clear(sums, end - begin)
        add_product(scores, values[first:until], begin, end, sums, values)
        for group in range(groups):
            round_row(sums[group], outputs[group, begin:end])


@njit(cache=True, nogil=True, inline="always")
def clear(sums, columns):
    for row in range(len(sums)):
        for index in range(np.uint64(columns)):
            sums[row, index] = 0


@functools.cache
def rows(words: Any) -> Any:
    """A C function: a thread's share of a job of attention, as of `crew.products`."""

    @cfunc(types.void(types.int64), cache=True)
    def attend_rows(address):
        job = carray(pointer(address), crew.SIZE, np.int64)
        count, size, length = job[crew.ROWS], job[crew.DEPTH], job[crew.WIDTH]
        heads, groups = job[HEADS], job[GROUPS]
        queries = carray(pointer(job[crew.INPUTS]), (count, heads, groups, size), words)
        keys = carray(pointer(job[crew.WEIGHTS]), (count, heads, size, length), np.float32)
        values = carray(pointer(job[VALUES]), (count, heads, length, size), np.float32)
        outputs = carray(pointer(job[crew.OUTPUTS]), (count, heads, groups, size), words)
        bounds = carray(pointer(job[BOUNDS]), (count, 2), np.int32)
        while True:
            part = taken(address + 8 * crew.TAKEN)
            if part >= job[crew.PARTS]:
                break
            row, head = part // heads, part % heads
            first, last = bounds[row, 0], bounds[row, 1]
            if first < last:
                attend_group(
                    queries[row, head], keys[row, head], values[row, head], first, last, outputs[row, head]
                )
            else:
                outputs[row, head] = 0

    return attend_rows


@njit(cache=True, nogil=True)
def fit_attention(call):
    """Whether a call that `fits` is one of attention, and no bound past the positions that there are."""
    if long_at(call + ARGUMENTS_NUMBER) != 5 or long_at(call + NUMBER) != 1:
        return False
    buffers = long_at(call + ARGUMENTS)
    queries, keys, values = long_at(buffers), long_at(buffers + 8), long_at(buffers + 16)
    bounds, outputs, rank = long_at(buffers + 24), long_at(long_at(call + RESULTS)), long_at(queries + RANK)
    if rank < 3 or rank > 4 or long_at(outputs + RANK) != rank or not is_of(bounds, INT32, rank - 1):
        return False
    if not is_of(keys, FLOAT32, 4) or not is_of(values, FLOAT32, 4):
        return False
    of_queries, of_keys, of_values = long_at(queries + SIZES), long_at(keys + SIZES), long_at(values + SIZES)
    of_bounds, of_outputs, tokens = long_at(bounds + SIZES), long_at(outputs + SIZES), 1
    for axis in range(rank):
        if long_at(of_outputs + 8 * axis) != long_at(of_queries + 8 * axis):
            return False
    for axis in range(rank - 2):  # [B] or [B, S]
        if long_at(of_bounds + 8 * axis) != long_at(of_queries + 8 * axis):
            return False
        tokens *= long_at(of_bounds + 8 * axis)
    batch, heads, size, length = of_keys, of_keys + 8, of_keys + 16, of_keys + 24
    of_heads, of_size = of_queries + 8 * (rank - 2), of_queries + 8 * (rank - 1)
    if long_at(of_bounds + 8 * (rank - 2)) != 2 or long_at(batch) != long_at(of_queries):
        return False
    if long_at(of_values) != long_at(batch) or long_at(of_values + 8) != long_at(heads):
        return False
    if long_at(of_values + 16) != long_at(length) or long_at(of_values + 24) != long_at(size):
        return False
    if long_at(of_size) != long_at(size) or long_at(heads) < 1 or long_at(of_heads) % long_at(heads) != 0:
        return False
    positions = carray(pointer(long_at(bounds + DATA)), 2 * tokens, np.int32)
    low = high = np.int32(0)
    for position in positions:
        low, high = min(low, position), max(high, position)
    return low >= 0 and high <= long_at(length)


@njit(cache=True, nogil=True)
def compute_attention(call, do, size):
    """Of queries [B, H, D], keys, values, bounds [B, 2] and a table, into [B, H, D]; as `compute_experts`."""
    queries, sizes = buffer(call, ARGUMENTS, 0)
    count, heads = long_at(sizes), long_at(sizes + 8)
    keys, cache = buffer(call, ARGUMENTS, 1)
    values, _ = buffer(call, ARGUMENTS, 2)
    bounds, _ = buffer(call, ARGUMENTS, 3)
    known, _ = buffer(call, ARGUMENTS, 4)
    outputs, _ = buffer(call, RESULTS, 0)
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS], job[crew.OUTPUTS] = do, queries, keys, outputs
    job[VALUES], job[BOUNDS] = values, bounds
    job[HEADS], job[crew.DEPTH], job[crew.WIDTH] = (
        long_at(cache + 8),
        long_at(cache + 16),
        long_at(cache + 24),
    )
    job[crew.ROWS], job[GROUPS], job[crew.PARTS] = count, heads // job[HEADS], count * job[HEADS]
    of = carray(pointer(bounds), (count, 2), np.int32)
    positions = 0
    for row in range(count):
        positions += of[row, 1] - of[row, 0]
    # Where queries share keys the arithmetic takes longer than reading, so it is what counts.
    crew.share_out(pool_at(long_at(known)), job, 8 * positions * heads * job[crew.DEPTH])


def attention(
    table: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    window: int | None,
) -> jax.Array | None:
    """`layers.attend`, inside a jitted program.

    Args:
        table: any layer's (`Inside`).
        query: [B, S, H, D_head] float32 or bfloat16.
        key: [B, H_kv, D_head, P] float32.
        value: [B, H_kv, P, D_head] float32.
        positions: [B, S] of the tokens, whose keys are there; those of none are past all others.
        window: positions that each sees at most, its own counted.

    Returns:
        [B, S, H * D_head], zeros where there is no token. None for what is XLA's: several tokens in shapes
        with a rest, and all where our own loops cannot be compiled.
    """
    words: Any = np.float32 if query.dtype == np.float32 else np.uint16
    length, kind = key.shape[3], np.dtype(words).name
    last = jnp.where(positions < length, positions + 1, 0)
    first = jnp.zeros_like(last) if window is None else jnp.maximum(last - window, 0)
    bounds = jnp.stack([first, last], axis=-1)
    if query.shape[1] == 1:
        name = target(f"layerscope_attention_{kind}", compute_attention, rows, words, fit_attention)
        query, bounds = query[:, 0], bounds[:, 0]
    elif length % COLUMNS or query.shape[3] % COLUMNS:
        return None
    else:
        name = target(
            f"layerscope_attention_of_many_{kind}", compute_attention_of_many, blocks, words, fit_attention
        )
    if name is None:
        return None
    shape = jax.ShapeDtypeStruct(query.shape, query.dtype)
    found = jax.ffi.ffi_call(name, shape)(query, key, value, bounds, table)
    return found.reshape(*positions.shape, -1)


@contextlib.contextmanager
def our_loops(table: jax.Array | None) -> Iterator[None]:
    """While a program is traced within, attention and products go by our own loops; without a table not."""
    if table is None:
        yield
        return
    with (
        products_by(functools.partial(products, table)),
        attending_by(functools.partial(attention, table)),
    ):
        yield
