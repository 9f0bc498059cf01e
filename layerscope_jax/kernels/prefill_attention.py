"""Attention of many tokens a row inside a jitted program: both its products panel by panel, block by block.

A block of neighbouring tokens reads the positions that one of them sees, no others: half of a prompt's on
average. XLA's products read all positions for all tokens, and write scores of all of them to memory.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, types

from layerscope_jax.kernels import crew
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.numbers import pointer, round_row, taken, widened
from layerscope_jax.kernels.panels import WIDE, add_panel, lay_first, packed, panel_of, shared_out, two_rooms
from layerscope_jax.kernels.softmax import weigh
from layerscope_jax.kernels.strips import APART, COLUMNS, MANY
from layerscope_jax.kernels.xla_calls import ARGUMENTS, RESULTS, buffer, long_at
from layerscope_jax.support.njit import cfunc, njit

# Of a job of attention (`crew`), of one token a row too: INPUTS are queries, WEIGHTS keys; ROWS are B, DEPTH
# is D_head, WIDTH P; TOKENS are S. Of values, STORED columns lie in each row, and the first VALUE_SIZE are
# used. WEIGHING is where each query head's scale and sink are.
VALUES, BOUNDS, HEADS, GROUPS, TOKENS, STORED, VALUE_SIZE, WEIGHING = range(9, 17)

BLOCK = 128
"""Queries of a key head that are computed at once."""


@njit(cache=True, nogil=True, inline="always")
def seen(bounds, start, end):
    """The first and last position that tokens from `start` to `end` see, at the edges of strips."""
    first, last = 2**31 - 1, 0
    for token in range(start, end):
        if bounds[token, 0] < bounds[token, 1]:
            first, last = min(first, bounds[token, 0]), max(last, bounds[token, 1])
    return first // COLUMNS * COLUMNS, (last + COLUMNS - 1) // COLUMNS * COLUMNS


@njit(cache=True, nogil=True, inline="always")
def attend_block(queries, keys, values, weighing, bounds, start, end, head, groups, outputs):
    """Tokens from `start` to `end` see keys [D, P] and values [P, V or more] within their bounds [S, 2].

    Queries are [S, H, D] and outputs [S, H, V]; those of this key head are `groups` from `head` on, and so
    are scales and sinks [H, 2].
    """
    size, value_size = queries.shape[2], outputs.shape[2]
    first, last = seen(bounds, start, end)
    if first >= last:
        for token in range(start, end):
            for group in range(groups):
                outputs[token, head + group] = 0
        return
    count = max(groups * (end - start), MANY)  # what is too few is filled with zeros
    x = np.zeros((count, size), np.float32)
    for row in range(groups * (end - start)):
        query = queries[start + row // groups, head + row % groups]
        for d in range(np.uint64(size)):
            x[row, d] = widened(query[d])
    ends = shared_out(count)
    inputs = packed(x, ends)
    memory, current, spare = two_rooms()
    scores = np.empty((count, last - first), np.float32)
    sums = np.empty((count, APART), np.float32)
    of_values = values[first:last]
    lay_first(panel_of(keys, first, last), current)
    for begin in range(first, last, WIDE):
        after = panel_of(keys, begin + WIDE, last)
        if begin + WIDE >= last:
            after = panel_of(of_values, 0, value_size)
        panel = panel_of(keys, begin, last)
        current, spare = add_panel(inputs, ends, panel, after, current, spare, sums)
        for row in range(count):
            columns = scores[row, begin - first : min(begin + WIDE, last) - first]
            scale = weighing[head + row % groups, 0]
            for index in range(np.uint64(len(columns))):
                columns[index] = scale * sums[row, index]
    for row in range(count):
        token = min(start + row // groups, end - 1)
        sink = weighing[head + row % groups, 1]
        weigh_within(scores[row], bounds[token, 0] - first, bounds[token, 1] - first, sink, outputs)
    inputs = packed(scores, ends)
    for begin in range(0, value_size, WIDE):
        end_of = min(begin + WIDE, value_size)
        panel, after = panel_of(of_values, begin, value_size), panel_of(of_values, end_of, value_size)
        current, spare = add_panel(inputs, ends, panel, after, current, spare, sums)
        for row in range(groups * (end - start)):
            output = outputs[start + row // groups, head + row % groups]
            round_row(sums[row], output[begin:end_of])
    memory[0] = 0  # kept until here


@njit(cache=True, nogil=True, inline="always")
def weigh_within(scores, first, last, sink, kind):
    """Scores to their softmax from `first` to `last`; zeros elsewhere."""
    if first < last:
        weigh(scores[first:last], sink, kind)
    else:
        first = last = 0
    for index in range(np.uint64(first)):
        scores[index] = 0
    for index in range(np.uint64(last), np.uint64(len(scores))):
        scores[index] = 0


@functools.cache
def blocks(words: Any) -> Any:
    """A C function: a thread's share of a job of attention, as of `crew.products`."""

    @cfunc(types.void(types.int64), cache=True)
    def attend_blocks(address):
        job = carray(pointer(address), crew.SIZE, np.int64)
        count, size, length = job[crew.ROWS], job[crew.DEPTH], job[crew.WIDTH]
        tokens, heads, groups = job[TOKENS], job[HEADS], job[GROUPS]
        shape = (count, tokens, heads * groups)
        queries = carray(pointer(job[crew.INPUTS]), (*shape, size), words)
        keys = carray(pointer(job[crew.WEIGHTS]), (count, heads, size, length), np.float32)
        values = carray(pointer(job[VALUES]), (count, heads, length, job[STORED]), np.float32)
        outputs = carray(pointer(job[crew.OUTPUTS]), (*shape, job[VALUE_SIZE]), words)
        weighing = carray(pointer(job[WEIGHING]), (heads * groups, 2), np.float32)
        bounds = carray(pointer(job[BOUNDS]), (count, tokens, 2), np.int32)
        most = tokens_of_block(groups)
        while True:
            part = taken(address + 8 * crew.TAKEN)
            if part >= job[crew.PARTS]:
                break
            of_row, head = part // heads, part % heads
            row, start = of_row % count, of_row // count * most
            attend_block(
                queries[row],
                keys[row, head],
                values[row, head],
                weighing,
                bounds[row],
                start,
                min(start + most, tokens),
                head * groups,
                groups,
                outputs[row],
            )

    return attend_blocks


@njit(cache=True, nogil=True)
def tokens_of_block(groups):
    return max(1, BLOCK // groups)


@njit(cache=True, nogil=True)
def compute_attention_of_many(call, do, size):
    """As `attention.compute_attention`, of queries [B, S, H, D] and bounds [B, S, 2] into [B, S, H, V]."""
    queries, sizes = buffer(call, ARGUMENTS, 0)
    count, tokens, all_heads = long_at(sizes), long_at(sizes + 8), long_at(sizes + 16)
    keys, cache = buffer(call, ARGUMENTS, 1)
    heads, depth, length = long_at(cache + 8), long_at(cache + 16), long_at(cache + 24)
    values, of_values = buffer(call, ARGUMENTS, 2)
    bounds, _ = buffer(call, ARGUMENTS, 3)
    weighing, _ = buffer(call, ARGUMENTS, 4)
    table_at, _ = buffer(call, ARGUMENTS, 5)
    outputs, of_outputs = buffer(call, RESULTS, 0)
    most = tokens_of_block(all_heads // heads)
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS], job[crew.OUTPUTS] = do, queries, keys, outputs
    job[crew.ROWS], job[crew.DEPTH], job[crew.WIDTH] = count, depth, length
    job[VALUES], job[BOUNDS], job[HEADS], job[TOKENS] = values, bounds, heads, tokens
    job[STORED], job[VALUE_SIZE], job[WEIGHING] = long_at(of_values + 24), long_at(of_outputs + 24), weighing
    job[GROUPS], job[crew.PARTS] = all_heads // heads, count * heads * ((tokens + most - 1) // most)
    crew.share_out(pool_at(long_at(table_at)), job, count * tokens * all_heads * depth * size)
