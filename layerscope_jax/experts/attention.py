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

from layerscope_jax.experts import crew
from layerscope_jax.experts.compute import products_by
from layerscope_jax.experts.inside import ARGUMENTS, RESULTS, buffer, long_at, pool_at, target
from layerscope_jax.experts.kernels import BLOCK, STRIDE, add_product
from layerscope_jax.experts.numbers import pointer, round_row, taken, weigh, widened
from layerscope_jax.experts.prefill_attention import (
    BOUNDS,
    GROUPS,
    HEADS,
    VALUES,
    blocks,
    compute_attention_of_many,
)
from layerscope_jax.experts.products import products
from layerscope_jax.experts.vectors import COLUMNS
from layerscope_jax.models.layers import attending_by
from layerscope_jax.njit import cfunc, njit


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
        [B, S, H * D_head], zeros where there is no token. None for several tokens in shapes with a rest,
        which are XLA's.
    """
    words: Any = np.float32 if query.dtype == np.float32 else np.uint16
    length, kind = key.shape[3], np.dtype(words).name
    last = jnp.where(positions < length, positions + 1, 0)
    first = jnp.zeros_like(last) if window is None else jnp.maximum(last - window, 0)
    bounds = jnp.stack([first, last], axis=-1)
    if query.shape[1] == 1:
        name = target(f"layerscope_attention_{kind}", compute_attention, rows, words)
        query, bounds = query[:, 0], bounds[:, 0]
    elif length % COLUMNS or query.shape[3] % COLUMNS:
        return None
    else:
        name = target(f"layerscope_attention_of_many_{kind}", compute_attention_of_many, blocks, words)
    assert name is not None  # as it took experts
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
