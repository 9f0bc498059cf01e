"""Attention inside a jitted program by our own loops: a decode step's here, others' in `prefill_attention`.

Each row reads the positions that it has, no others. XLA's products read caches as long as they may become, of
all rows, and wake threads of their own for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import carray, types

from layerscope_jax.kernels import crew
from layerscope_jax.kernels.host_kernels import WORDS
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.numbers import pointer, round_row, taken, widened
from layerscope_jax.kernels.prefill_attention import (
    BOUNDS,
    GROUPS,
    HEADS,
    STORED,
    VALUE_SIZE,
    VALUES,
    WEIGHING,
    blocks,
    compute_attention_of_many,
)
from layerscope_jax.kernels.registry import Kernel, Work, built_in, choose
from layerscope_jax.kernels.softmax import weigh
from layerscope_jax.kernels.vectors import COLUMNS
from layerscope_jax.kernels.weighted_sums import BLOCK, STRIDE, add_product
from layerscope_jax.kernels.xla_calls import ARGUMENTS, RESULTS, buffer, layout, long_at, matches, within
from layerscope_jax.kernels.xla_ffi import Unavailable, register
from layerscope_jax.support.njit import cfunc, njit


@njit(cache=True, nogil=True, inline="always")
def attend_group(queries, keys, values, weighing, first, last, outputs):
    """Queries [G, D] of one row see keys [D, P] and values [P, V or more] from `first` to `last`.

    Outputs are [G, V]; scales and sinks [G, 2].
    """
    groups, size = queries.shape
    value_size = outputs.shape[1]
    x = np.empty((groups, size), np.float32)
    for group in range(groups):
        for d in range(np.uint64(size)):
            x[group, d] = widened(queries[group, d])
    # To the edge of what is added at once: a few positions more are computed, and have a share of zero.
    until = min(first + (last - first + COLUMNS - 1) // COLUMNS * COLUMNS, keys.shape[1])
    scores, sums = np.empty((groups, until - first), np.float32), np.empty((groups, STRIDE), np.float32)
    for begin in range(first, until, BLOCK):
        end = min(begin + BLOCK, until)
        clear(sums, end - begin)
        add_product(x, keys, begin, end, sums)
        for group in range(groups):
            columns, scale = scores[group, begin - first : end - first], weighing[group, 0]
            for index in range(np.uint64(end - begin)):
                columns[index] = scale * sums[group, index]
    for group in range(groups):
        weigh(scores[group, : last - first], weighing[group, 1], outputs)
        for index in range(np.uint64(last - first), np.uint64(until - first)):
            scores[group, index] = 0
    for begin in range(0, value_size, BLOCK):
        end = min(begin + BLOCK, value_size)
        clear(sums, end - begin)
        add_product(scores, values[first:until], begin, end, sums)
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
        values = carray(pointer(job[VALUES]), (count, heads, length, job[STORED]), np.float32)
        outputs = carray(pointer(job[crew.OUTPUTS]), (count, heads, groups, job[VALUE_SIZE]), words)
        weighing = carray(pointer(job[WEIGHING]), (heads, groups, 2), np.float32)
        bounds = carray(pointer(job[BOUNDS]), (count, 2), np.int32)
        while True:
            part = taken(address + 8 * crew.TAKEN)
            if part >= job[crew.PARTS]:
                break
            row, head = part // heads, part % heads
            first, last = bounds[row, 0], bounds[row, 1]
            if first < last:
                attend_group(
                    queries[row, head],
                    keys[row, head],
                    values[row, head],
                    weighing[head],
                    first,
                    last,
                    outputs[row, head],
                )
            else:
                outputs[row, head] = 0

    return attend_rows


# Of a batch B: tokens S, query heads H and key heads G of size D, positions P; bounds are two numbers N each,
# and so are the scale and the sink of a head. Of R columns of values the first Q are used.
BATCH, _, KEY_HEADS, QUERY_HEADS, BOUND, POSITIONS, USED, STORE, TOKENS = range(9)  # letters, in their order
ONE = layout("x B H D, float32 B G D P, float32 B G P R, int32 B N, float32 H N", "x B H Q")
MANY = layout("x B S H D, float32 B G D P, float32 B G P R, int32 B S N, float32 H N", "x B S H Q")


@njit(cache=True, nogil=True)
def share_heads(sizes):
    """Whether each key head has as many query heads, bounds are two numbers each, and values long enough."""
    heads = sizes[KEY_HEADS]
    even = heads > 0 and sizes[QUERY_HEADS] % heads == 0
    return even and sizes[BOUND] == 2 and sizes[USED] <= sizes[STORE]


@njit(cache=True, nogil=True)
def fit_attention(call):
    """Whether a call that `fits` is one of attention of a token a row, and no bound past all positions."""
    like, sizes = matches(call, ONE)
    return like and share_heads(sizes) and within(call, 3, 2 * sizes[BATCH], sizes[POSITIONS])


@njit(cache=True, nogil=True)
def fit_attention_of_many(call):
    """The same of several tokens a row."""
    like, sizes = matches(call, MANY)
    count = 2 * sizes[BATCH] * sizes[TOKENS]
    return like and share_heads(sizes) and within(call, 3, count, sizes[POSITIONS])


@njit(cache=True, nogil=True)
def compute_attention(call, do, size):
    """Of queries [B, H, D], keys, values, bounds [B, 2], scales and sinks [H, 2] and a table, into [B, H, V].

    As `compute_experts`.
    """
    queries, sizes = buffer(call, ARGUMENTS, 0)
    count, heads = long_at(sizes), long_at(sizes + 8)
    keys, cache = buffer(call, ARGUMENTS, 1)
    values, of_values = buffer(call, ARGUMENTS, 2)
    bounds, _ = buffer(call, ARGUMENTS, 3)
    weighing, _ = buffer(call, ARGUMENTS, 4)
    table_at, _ = buffer(call, ARGUMENTS, 5)
    outputs, of_outputs = buffer(call, RESULTS, 0)
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS], job[crew.OUTPUTS] = do, queries, keys, outputs
    job[VALUES], job[BOUNDS], job[WEIGHING] = values, bounds, weighing
    job[STORED], job[VALUE_SIZE] = long_at(of_values + 24), long_at(of_outputs + 16)
    job[HEADS], job[crew.DEPTH], job[crew.WIDTH] = (
        long_at(cache + 8),
        long_at(cache + 16),
        long_at(cache + 24),
    )
    job[crew.ROWS], job[GROUPS], job[crew.PARTS] = count, heads // job[HEADS], count * job[HEADS]
    limits = carray(pointer(bounds), (count, 2), np.int32)
    positions = 0
    for row in range(count):
        positions += limits[row, 1] - limits[row, 0]
    # Where queries share keys the arithmetic takes longer than reading, so it is what counts.
    crew.share_out(pool_at(long_at(table_at)), job, 8 * positions * heads * job[crew.DEPTH])


def attention(
    table: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    window: int | None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array | None:
    """`attention.attend`, inside a jitted program.

    Args:
        table: any layer's (`Inside`).
        query: [B, S, H, D_head] float32 or bfloat16.
        key: [B, H_kv, D_head, P] float32.
        value: [B, H_kv, P, D_value] float32.
        positions: [B, S] of the tokens, whose keys are there; those of none are past all others.
        window: positions that each sees at most, its own counted.
        scale, sinks: as of `attend`.

    Returns:
        [B, S, H * D_value], zeros where there is no token. None where no kernel suits: several tokens in
        shapes with a rest, and all where our own loops cannot be compiled.
    """
    formats = {key.dtype.name, value.dtype.name}
    name = formats.pop() if len(formats) == 1 else "mixed"
    sizes = (query.shape[1], query.shape[3], key.shape[3], value.shape[3])
    kernel = choose(Work("attention", name, np.dtype(query.dtype), sizes))
    if kernel is None:
        return None
    return kernel.run(table, query, key, value, positions, window, scale, sinks)


def suits(work: Work) -> bool:
    tokens, *others = work.sizes
    even = tokens == 1 or not any(size % COLUMNS for size in others)
    return even and work.format == "float32" and work.dtype.name in WORDS


def attention_target(dtype: np.dtype, one: bool) -> str:
    """XLA's name for the function of attention, of one token a row or of many.

    Raises:
        Unavailable: if there can be none.
    """
    words: Any = WORDS[dtype.name].type
    if one:
        name = f"layerscope_attention_{dtype.name}"
        return register(name, compute_attention, lambda: rows(words), dtype, fit_attention)
    name = f"layerscope_attention_of_many_{dtype.name}"
    return register(name, compute_attention_of_many, lambda: blocks(words), dtype, fit_attention_of_many)


def obstacle(work: Work) -> str | None:
    try:
        attention_target(work.dtype, work.sizes[0] == 1)
    except Unavailable as error:
        return str(error)
    return None


def attend_by_loops(
    table: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    window: int | None,
    scale: float | None,
    sinks: jax.Array | None,
    value_size: int | None = None,
) -> jax.Array:
    """`attention` by our own loops.

    Args:
        table, query, key, value, positions, window, scale, sinks: as of `attention`.
        value_size: how many of a value's numbers are used; None for all.
    """
    last = jnp.where(positions < key.shape[3], positions + 1, 0)
    first = jnp.zeros_like(last) if window is None else jnp.maximum(last - window, 0)
    bounds, one = jnp.stack([first, last], axis=-1), query.shape[1] == 1
    if one:
        query, bounds = query[:, 0], bounds[:, 0]
    heads, size = query.shape[-2:]
    scales = jnp.full(heads, 1 / np.sqrt(size) if scale is None else scale, jnp.float32)
    extra = jnp.full(heads, -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    weighing = jnp.stack([scales, extra], axis=-1)  # [H, 2]
    shape = (*query.shape[:-1], value_size or value.shape[3])
    call = jax.ffi.ffi_call(
        attention_target(np.dtype(query.dtype), one), jax.ShapeDtypeStruct(shape, query.dtype)
    )
    result = call(query, key, value, bounds, weighing, table)
    return result.reshape(*positions.shape, -1)


built_in(Kernel("loops", "attention", suits, attend_by_loops, obstacle))
