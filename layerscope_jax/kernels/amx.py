"""bfloat16 products by the matrix instructions of Intel's server CPUs (AMX), for any number of tokens.

`TDPBF16PS` multiplies a tile of 16 rows of 32 weights, as they lie in memory, with a tile of 32 inputs of up
to 16 tokens, which are woven in pairs once for all matrices that take them. So sums come by output and token,
a row of a matrix with all tokens, and each is summed over the inputs in one order, in float32: a token's
result has the same bits in any company and on any thread.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray

from layerscope_jax.kernels.activations import SILU, gate_row
from layerscope_jax.kernels.loops import plain_bias
from layerscope_jax.kernels.numbers import pointer, rounded, silu, taken, widened
from layerscope_jax.kernels.tiles import (
    DEPTH,
    TILE,
    ask,
    available,
    clear0,
    clear1,
    clear2,
    clear3,
    columns,
    few0,
    few1,
    few2,
    few3,
    load0,
    load1,
    load2,
    load3,
    load4,
    load5,
    load6,
    load7,
    load_shapes,
    many0,
    many1,
    many2,
    many3,
    shape_tiles,
    store0,
    store1,
    store2,
    store3,
    store_shapes,
    weave,
    write_rows,
)
from layerscope_jax.support.njit import njit

PIECE = 256
"""Most tokens at a time, so that their sums stay in the cache."""

FEW_ROWS, MANY_ROWS = 64, 32
"""Rows of a matrix at once, for up to 16 tokens and for more: four tiles of sums in either case."""

HIGH = 512
"""Inputs at once for more than 16 tokens: so much of the rows stays in the nearest cache for all tokens."""

STAGED = 2 * MANY_ROWS * HIGH
"""Bytes of that."""


@functools.cache
def suit(dtype: np.dtype, width: int, hidden: int) -> bool:
    """Whether experts [width, hidden] can be computed here."""
    return dtype.name == "bfloat16" and width % DEPTH == 0 == hidden % DEPTH and available()


@functools.cache
def suit_products(dtype: np.dtype, depth: int, *widths: int) -> bool:
    """Whether products of inputs [..., depth] with matrices [width, depth] can be computed here."""
    whole = depth % DEPTH == 0 and not any(width % TILE for width in widths)
    return dtype.name == "bfloat16" and whole and available()


@njit(cache=True, nogil=True)
def product_of_few(inputs, depth, weights, first, last, tokens, sums, ahead):
    """`weights[first:last] @ inputs` of at most 16 tokens, all but sizes as addresses.

    Args:
        inputs: [depth / 2, tokens, 2] bfloat16.
        weights: [N, depth] bfloat16.
        sums: [last - first, tokens] float32, overwritten.
        ahead: address of the matrix that is read next, or of any memory.
    """
    row, wide = 2 * depth, 4 * tokens
    for start in range(first, last, FEW_ROWS):
        tiles, at, to = (
            min(FEW_ROWS, last - start) // TILE,
            weights + row * start,
            sums + wide * (start - first),
        )
        coming = at + FEW_ROWS * row if start + FEW_ROWS < last else ahead
        clear0()
        clear1()
        clear2()
        clear3()
        for k in range(0, depth, DEPTH):
            begin = at + 2 * k
            load7(inputs + wide * (k // 2), wide)
            for line in range(TILE * tiles):  # in the order in which memory is fastest
                ask(coming + 2 * TILE * tiles * k + 64 * line)
            load4(begin, row)
            few0()
            if tiles > 1:
                load5(begin + TILE * row, row)
                few1()
            if tiles > 2:
                load6(begin + 2 * TILE * row, row)
                few2()
            if tiles > 3:
                load4(begin + 3 * TILE * row, row)
                few3()
        store0(to, wide)
        if tiles > 1:
            store1(to + TILE * wide, wide)
        if tiles > 2:
            store2(to + 2 * TILE * wide, wide)
        if tiles > 3:
            store3(to + 3 * TILE * wide, wide)


@njit(cache=True, nogil=True)
def stage(weights, depth, first, rows, begin, steps, to, kind):
    """Copies a part of some rows of a matrix into tiles that follow each other.

    Args:
        weights: address of [N, depth] bfloat16.
        first, rows: the first row, and how many.
        begin, steps: the first column, and how many times `DEPTH`.
        to: address of the tiles.
        kind: of no use here.
    """
    for line in range(rows):
        source = carray(pointer(weights + 2 * (depth * (first + line) + begin)), (steps, 8), np.uint64)
        tile = to + line // TILE * (steps * 1024) + line % TILE * 64
        tiles = carray(pointer(tile), (steps, 128), np.uint64)
        for k in range(np.uint64(steps)):
            for word in range(np.uint64(8)):
                tiles[k, word] = source[k, word]


@njit(cache=True, nogil=True, inline="always")
def row_of(weights, depth, row):
    """Where a row of a matrix begins, and the bytes of one."""
    return weights + 2 * depth * row, 2 * depth


def many_by(stage: Any, row_of: Any) -> Any:
    """A compiled function of products of more than 16 tokens.

    Args:
        stage: compiled, as that of plain matrices: writes weights as tiles.
        row_of: compiled, as that of plain matrices.
    """

    @njit(cache=True, nogil=True)
    def product_of_many(inputs, depth, weights, first, last, tokens, sums, staged, ahead, kind):
        """The same of more tokens.

        Args:
            inputs: [tokens / 16, depth / 2, 16, 2].
            staged: scratch of `STAGED` bytes.
            kind: an array of bfloat16, as its bits.
        """
        wide, tiles = 4 * columns(tokens), (tokens + TILE - 1) // TILE
        for start in range(first, last, MANY_ROWS):
            rows, to = min(MANY_ROWS, last - start), sums + wide * (start - first)
            line, row = row_of(weights, depth, start + MANY_ROWS)
            if start + MANY_ROWS >= last:
                line = ahead
            asked = row * TILE // depth  # lines of the rows to come for each step
            for begin in range(0, depth, HIGH):
                steps = (min(begin + HIGH, depth) - begin) // DEPTH
                stage(weights, depth, start, rows, begin, steps, staged, kind)
                for tile in range(0, tiles, 2):
                    pair = tile + 1 < tiles and rows > TILE
                    upper, x = to + 4 * TILE * tile, inputs + 2 * TILE * depth * tile + 2 * TILE * begin
                    lower, y = upper + TILE * wide, x + 2 * TILE * depth
                    if begin == 0:
                        clear0()
                        clear1()
                        clear2()
                        clear3()
                    else:
                        load0(upper, wide)
                        if tile + 1 < tiles:
                            load1(upper + 64, wide)
                        if rows > TILE:
                            load2(lower, wide)
                        if pair:
                            load3(lower + 64, wide)
                    if pair:
                        for k in range(steps):
                            load4(staged + 1024 * k, 64)
                            load6(x + 1024 * k, 64)
                            many0()
                            load7(y + 1024 * k, 64)
                            many1()
                            load5(staged + 1024 * (steps + k), 64)
                            many2()
                            many3()
                            if tile == 0:
                                for _ in range(asked):
                                    ask(line)
                                    line += 64
                    else:
                        for k in range(steps):
                            load4(staged + 1024 * k, 64)
                            load6(x + 1024 * k, 64)
                            many0()
                            if tile + 1 < tiles:
                                load7(y + 1024 * k, 64)
                                many1()
                            if rows > TILE:
                                load5(staged + 1024 * (steps + k), 64)
                                many2()
                            if tile == 0:
                                for _ in range(asked):
                                    ask(line)
                                    line += 64
                    store0(upper, wide)
                    if tile + 1 < tiles:
                        store1(upper + 64, wide)
                    if rows > TILE:
                        store2(lower, wide)
                    if pair:
                        store3(lower + 64, wide)

    return product_of_many


plain_many = many_by(stage, row_of)


@njit(cache=True, nogil=True)
def product(inputs, depth, weights, first, last, tokens, sums, staged, ahead, kind):
    if tokens <= TILE:
        product_of_few(inputs, depth, weights, first, last, tokens, sums, ahead)
    else:
        plain_many(inputs, depth, weights, first, last, tokens, sums, staged, ahead, kind)


@njit(cache=True, nogil=True)
def rows_at_once(tokens):
    """Rows of a matrix whose sums stay in the cache."""
    return max(FEW_ROWS, (1 << 16) // columns(tokens) // FEW_ROWS * FEW_ROWS)


@njit(cache=True, nogil=True)
def scratch_parts(tokens, width, hidden):
    """Where in scratch: staged weights, inputs, inner activations, two blocks of sums, its end."""
    wide = columns(tokens)
    most = min(rows_at_once(tokens), max(width, hidden))
    inputs = 128 + STAGED
    inner = inputs + 2 * wide * width
    sums = inner + 2 * wide * hidden
    more = sums + 4 * wide * most
    return 128, inputs, inner, sums, more, more + 4 * wide * most


@njit(cache=True, nogil=True)
def scratch_bytes(firsts, lasts, width, hidden):
    """That `run_experts` needs for any of these experts."""
    size = 0
    for expert in range(len(firsts)):
        size = max(size, scratch_parts(lasts[expert] - firsts[expert], width, hidden)[5])
    return size


@njit(cache=True, nogil=True)
def add_bias(sums, bias, first):
    """Adds biases, from the first on, to rows of sums; nothing where there are none."""
    if len(bias) > 0:
        for n in range(len(sums)):
            number, row = widened(bias[first + n]), sums[n]
            for m in range(np.uint64(len(row))):
                row[m] += number


@njit(cache=True, nogil=True)
def activate(gates, ups, tokens, hidden, first, to, activation, limit, kind):
    """Gated numbers of some rows of sums [F, columns], woven into tiles of inputs.

    Args:
        first: the row of the whole that they begin with.
        to: address of the tiles.
        kind: an array of bfloat16, as its bits.
    """
    flat, others = gates.reshape(-1), ups.reshape(-1)
    if activation == SILU:
        for index in range(np.uint64(len(flat))):
            flat[index] = silu(flat[index]) * others[index]
    else:
        gate_row(flat, others, len(flat), activation, limit)
    wide = min(tokens, TILE)
    for tile in range(0, gates.shape[1], TILE):
        pairs = carray(pointer(to + 2 * tile * hidden + 2 * wide * first), (len(gates) // 2, wide), np.uint32)
        for f in range(np.uint64(len(pairs))):
            even, odd, pair = gates[2 * f], gates[2 * f + 1], pairs[f]
            for m in range(np.uint64(wide)):
                low, high = rounded(even[tile + m], kind), rounded(odd[tile + m], kind)
                pair[m] = np.uint32(low) | (np.uint32(high) << np.uint32(16))


def experts_by(matrix_of: Any, bias_of: Any, row_of: Any, product: Any) -> Any:
    """A compiled function that computes experts of bfloat16 activations, however their matrices are stored.

    Args:
        matrix_of, bias_of: compiled, as of `loops.experts_by`.
        row_of: compiled, as that of plain matrices.
        product: compiled, as that of plain matrices.
    """

    @njit(cache=True, nogil=True)
    def run_experts(
        addresses,
        firsts,
        lasts,
        order,
        choices,
        inputs,
        hidden,
        activation,
        limit,
        outputs,
        kind,
        counter,
        scratch,
    ):
        """As that of `loops.experts_by`.

        Args:
            firsts, lasts: at most `PIECE` apart.
            scratch: address of `scratch_bytes` that no other thread uses, aligned to 64.
        """
        width = outputs.shape[1]
        read = carray(pointer(inputs), (len(outputs) // choices, width), outputs.dtype)
        store_shapes(scratch + 64)  # another user of tiles in this thread may count on theirs
        while True:
            expert = taken(counter)
            if expert >= len(firsts):
                break
            slots, arrays = order[firsts[expert] : lasts[expert]], addresses[expert]
            tokens = len(slots)
            wide, block = columns(tokens), rows_at_once(tokens)
            parts = scratch_parts(tokens, width, hidden)
            staged, x, y = scratch + parts[0], scratch + parts[1], scratch + parts[2]
            sums, more = scratch + parts[3], scratch + parts[4]
            gate, up = matrix_of(arrays, 0, hidden, width, kind), matrix_of(arrays, 1, hidden, width, kind)
            down, bias = matrix_of(arrays, 2, width, hidden, kind), bias_of(arrays, width, hidden, kind)
            shape_tiles(scratch, tokens)
            rows = np.empty(tokens, np.int64)
            for m in range(tokens):
                rows[m] = read[slots[m] // choices].ctypes.data
            weave(rows, tokens, width, x)
            for first in range(0, hidden, block):
                last = min(first + block, hidden)
                coming = row_of(gate, width, last)[0] if last < hidden else row_of(down, hidden, 0)[0]
                ahead = row_of(up, width, first)[0]
                product(x, width, gate, first, last, tokens, sums, staged, ahead, kind)
                product(x, width, up, first, last, tokens, more, staged, coming, kind)
                gates = carray(pointer(sums), (last - first, wide), np.float32)
                ups = carray(pointer(more), (last - first, wide), np.float32)
                add_bias(gates, bias, first)
                add_bias(ups, bias, hidden + first)
                activate(gates, ups, tokens, hidden, first, y, activation, limit, kind)
            for first in range(0, width, block):
                last = min(first + block, width)
                ahead = row_of(down, hidden, min(last, width - 1))[0]
                product(y, hidden, down, first, last, tokens, sums, staged, ahead, kind)
                totals = carray(pointer(sums), (last - first, wide), np.float32)
                add_bias(totals, bias, 2 * hidden + first)
                write_rows(totals, outputs, slots, first, last)
        load_shapes(scratch + 64)

    return run_experts


@njit(cache=True, nogil=True, inline="always")
def plain_address(addresses, which, rows, depth, kind):
    return addresses[which]


run_experts = experts_by(plain_address, plain_bias, row_of, product)


@njit(cache=True, nogil=True)
def multiply(x, weights, outputs, first, last):
    """`x [M, K] @ weights [N, K]^T` into the columns `first` to `last` of `outputs`, all of bfloat16."""
    depth = x.shape[1]
    piece, block = min(len(x), PIECE), rows_at_once(min(len(x), PIECE))
    wide, most = columns(piece), min(block, last - first)
    memory = np.empty(64 + 128 + STAGED + 2 * wide * depth + 4 * wide * most, np.uint8)
    scratch = (memory.ctypes.data + 63) // 64 * 64
    staged = scratch + 128
    inputs = staged + STAGED
    sums = inputs + 2 * wide * depth
    store_shapes(scratch + 64)
    for start in range(0, len(x), PIECE):
        tokens = min(PIECE, len(x) - start)
        shape_tiles(scratch, tokens)
        rows = np.arange(start, start + tokens)
        weave(x.ctypes.data + x.strides[0] * rows, tokens, depth, inputs)
        for begin in range(first, last, most):
            end = min(begin + most, last)
            at = weights.ctypes.data
            ahead = at + 2 * depth * min(end, last - 1)
            product(inputs, depth, at, begin, end, tokens, sums, staged, ahead, outputs)
            totals = carray(pointer(sums), (end - begin, columns(tokens)), np.float32)
            write_rows(totals, outputs, rows, begin, end)
    load_shapes(scratch + 64)
    memory[0] = 0  # kept until here
