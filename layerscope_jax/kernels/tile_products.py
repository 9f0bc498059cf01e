"""bfloat16 products by the matrix instructions of Intel's server CPUs (AMX), for any number of tokens.

`TDPBF16PS` multiplies a tile of 16 rows of 32 weights, as they lie in memory, with a tile of 32 inputs of up
to 16 tokens, which are woven in pairs once for all matrices that take them. So sums come by output and token,
a row of a matrix with all tokens, and each is summed over the inputs in one order, in float32: a token's
result has the same bits in any company and on any thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from layerscope_jax.kernels.numbers import pointer
from layerscope_jax.kernels.tiles import (
    DEPTH,
    TILE,
    add_few,
    ask,
    clear,
    columns,
    load0,
    load1,
    load2,
    load3,
    load4,
    load5,
    load6,
    load7,
    many0,
    many1,
    many2,
    many3,
    store0,
    store1,
    store2,
    store3,
    store_few,
)
from layerscope_jax.support.njit import njit

FEW_ROWS, MANY_ROWS = 64, 32
"""Rows of a matrix at once, for up to 16 tokens and for more: four tiles of sums in either case."""

HIGH = 512
"""Inputs at once for more than 16 tokens: so much of the rows stays in the nearest cache for all tokens."""

STAGED_WEIGHTS = 2 * MANY_ROWS * HIGH
"""Bytes of that."""

STAGED = STAGED_WEIGHTS + 5 * (1 << 12)
"""Bytes of that, and of tables and scales (`encodings.ROOM`, `wide_decoding.prepare`): what takes encoded
weights needs both."""


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
        tiles = min(FEW_ROWS, last - start) // TILE
        at, to = weights + row * start, sums + wide * (start - first)
        coming = at + FEW_ROWS * row if start + FEW_ROWS < last else ahead
        clear()
        for k in range(0, depth, DEPTH):
            for line in range(TILE * tiles):  # in the order in which memory is fastest
                ask(coming + 2 * TILE * tiles * k + 64 * line)
            add_few(inputs + wide * (k // 2), wide, at + 2 * k, row, TILE * row, tiles)
        store_few(to, wide, tiles)


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
                        clear()
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
