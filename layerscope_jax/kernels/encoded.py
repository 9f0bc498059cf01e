"""Experts whose matrices are encoded (`encodings.py`), by the loops and tiles that compute plain ones.

Some rows of a matrix at a time are written out as the float numbers that they stand for, into scratch that
stays in the nearest cache, and multiplied as plain ones: the bits are those of plain experts with these
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import overload
from numba.np.numpy_support import as_dtype

from layerscope_jax.formats.quantised import QuantisedFormat
from layerscope_jax.kernels import amx, loops, tile_products
from layerscope_jax.kernels.decoding import decode, prepare, prepare_matrix
from layerscope_jax.kernels.dots import DEEP, HIGH, add_tiles, step_of
from layerscope_jax.kernels.encodings import (
    CHUNK,
    CODE,
    CODES,
    DEPTH,
    MATRIX,
    ROOM,
    SPAN,
    facts_of,
    row_of,
)
from layerscope_jax.kernels.numbers import pointer
from layerscope_jax.kernels.tiles import TILE, add_few, clear, store_few
from layerscope_jax.kernels.wide_decoding import HIGH as TALL
from layerscope_jax.kernels.wide_decoding import PART, SLOT, STEP, add_steps
from layerscope_jax.support.njit import njit

# Addresses of an expert: of codes, scales and what is third of gate, up and down, 0 where there is none; of
# biases. Then of matrices [F, D], and of [D, F]: CODE to TABLE (`encodings.py`).
PARTS, BIAS, FACTS, EACH, ARRAYS = 3, 9, 10, MATRIX - CODE, 10 + 2 * (MATRIX - CODE)


def addresses_of(format: QuantisedFormat, width: int, hidden: int, pointers: Sequence[int]) -> list[int]:
    """Returns the addresses of an expert [width, hidden], given those of its arrays.

    >>> from layerscope_jax.formats import format_named
    >>> facts = addresses_of(format_named("int8"), 64, 32, [1, 2, 3, 4, 5, 6])
    >>> facts[:BIAS], facts[FACTS:]
    ([1, 2, 0, 3, 4, 0, 5, 6, 0], [0, 64, 1, 1, 0, 0, 0, 32, 1, 1, 0, 0])
    """
    count, result = len(format.encoding.fields), []
    for which in range(3):
        arrays = list(pointers[count * which : count * (which + 1)])
        result += arrays + [0] * (PARTS - count)
    facts = [facts_of(format, hidden, width), facts_of(format, width, hidden)]
    numbers = [number for some in facts if some is not None for number in some]
    return [*result, pointers[-1] if format.body.bias else 0, *numbers]


@njit(cache=True, nogil=True)
def matrix_of(addresses, which, rows, depth, kind):
    """[MATRIX] of an expert's gate (0), up (1) or down (2)."""
    matrix, facts = np.empty(MATRIX, np.int64), FACTS + EACH * (which == 2)
    for part in range(PARTS):
        matrix[CODES + part] = addresses[PARTS * which + part]
    matrix[DEPTH] = depth
    for fact in range(EACH):
        matrix[CODE + fact] = addresses[facts + fact]
    return matrix


@njit(cache=True, nogil=True)
def bias_of(addresses, width, hidden, kind):
    """[2 F + D] float32, or [0]."""
    return carray(pointer(addresses[BIAS]), 2 * hidden + width if addresses[BIAS] else 0, np.float32)


def scratch(kind: Any) -> Any:
    """[HIGH, ...] rows for numbers as they are written out, and the same as they are multiplied.

    bfloat16 that is multiplied as float32 is written as such: otherwise it would be widened for every tile.
    """


@overload(scratch)
def _scratch(kind):
    if kind.dtype is types.uint16:

        def widened(kind):
            rows = np.empty((HIGH, DEEP + CHUNK), np.uint32)
            return rows, rows.view(np.float32)

        return widened
    dtype = as_dtype(kind.dtype)

    def plain(kind):
        rows = np.empty((HIGH, DEEP + CHUNK), dtype)
        return rows, rows

    return plain


@njit(cache=True, nogil=True)
def encoded_dots(x, matrix, first, last, outputs, kind):
    """As `dots.dot_products`, with rows of a matrix written out as numbers of the type of `kind`."""
    depth, count, spare = matrix[DEPTH], last - first, np.empty((len(x), HIGH), np.float32)
    rows, numbers = scratch(kind)
    memory = np.empty(2 * ROOM, np.uint8)
    room = memory.ctypes.data
    written, multiplied = rows[0], numbers[0]
    prepare_matrix(matrix, room, written)
    at, stride, apart = rows.ctypes.data, rows.strides[0], CHUNK * rows.itemsize
    step = step_of(multiplied)
    outputs[:, :count] = 0
    for p in range(0, count, HIGH):
        high = min(HIGH, count - p)
        spare[:] = 0
        for k in range(0, depth, DEEP):
            part = min(DEEP, depth - k)
            begin, line = row_of(matrix, depth, first + p + HIGH)
            chunks, coming = part // CHUNK, begin + line * k // depth
            scales = prepare(matrix, first + p, high, k, chunks, room + ROOM, written)
            decode(matrix, first + p, high, k, chunks, scales, at, stride, apart, coming, line, written)
            if high == HIGH:
                add_tiles(at, stride, x[:, k:], part // step, outputs[:, p:], 0, multiplied)
            else:  # one row after the other, as all of a tile
                for row in range(high):
                    spare[:] = 0
                    begin = at + stride * row
                    add_tiles(begin, np.int64(0), x[:, k:], part // step, spare, 0, multiplied)
                    for m in range(len(x)):
                        outputs[m, p + row] += spare[m, 0]
    rows[0, 0] = memory[0] = 0  # kept until here


@njit(cache=True, nogil=True)
def stage(matrix, depth, first, rows, begin, steps, to, kind):
    """As `tile_products.stage`, of encoded rows; their scales behind them."""
    room = to + tile_products.STAGED_WEIGHTS + ROOM
    for row in range(0, rows, TILE):
        scales = prepare(matrix, first + row, TILE, begin, steps, room, kind)
        tile, here = to + row // TILE * (steps * 1024), row_of(matrix, depth, first + row)[0]
        decode(matrix, first + row, TILE, begin, steps, scales, tile, 2 * CHUNK, 1024, here, 0, kind)


@njit(cache=True, nogil=True)
def add_chunks(x, wide, slot, first, last):
    """Adds the products of some chunks of two tiles, which lie in a slot, with their inputs."""
    for chunk in range(first, last):
        add_few(x + wide * (CHUNK // 2) * chunk, wide, slot, 2 * CHUNK, PART // 2, 2)
        slot += PART


@njit(cache=True, nogil=True)
def product_of_few(inputs, depth, matrix, first, last, tokens, sums, staged, ahead, kind):
    """As `tile_products.product_of_few`, of encoded rows."""
    wide, room = 4 * tokens, staged + tile_products.STAGED_WEIGHTS + ROOM
    for start in range(first, last, TALL):
        line, row = row_of(matrix, depth, start + TALL)
        more = np.int64(start + TALL < last)
        if not more:
            line = ahead
        clear()
        for k in range(0, depth, SPAN * CHUNK):
            chunks = min(SPAN, (depth - k) // CHUNK)
            scales = prepare(matrix, start, TALL, k, chunks, room, kind)
            count, x = chunks // STEP, inputs + wide * (k // 2)
            done = STEP * count
            # What the same columns of the rows to come take is asked for in the order in which it lies.
            coming, step = line + TALL * row * k // depth, row * STEP * CHUNK // depth
            if count > 0:
                at = coming + TALL * step * (count - 1)
                decode(matrix, start, TALL, k, STEP, scales, staged, 2 * CHUNK, PART, at, step, kind)
                if count > 1:
                    add_steps(matrix, start, k, count, scales, staged, x, wide, coming, more)
                add_chunks(x, wide, staged + (count - 1) % 2 * SLOT, done - STEP, done)
            if done < chunks:
                to, left, begin = staged + count % 2 * SLOT, chunks - done, k + CHUNK * done
                at, step = coming + TALL * step * count, row * left * CHUNK // depth
                decode(matrix, start, TALL, begin, left, scales, to, 2 * CHUNK, PART, at, step, kind)
                add_chunks(x, wide, to, done, chunks)
        store_few(sums + wide * (start - first), wide, 2)


product_of_many = tile_products.many_by(stage, row_of)


@njit(cache=True, nogil=True)
def product(inputs, depth, matrix, first, last, tokens, sums, staged, ahead, kind):
    prepare_matrix(matrix, staged + tile_products.STAGED_WEIGHTS, kind)
    if tokens <= TILE:
        product_of_few(inputs, depth, matrix, first, last, tokens, sums, staged, ahead, kind)
    else:
        product_of_many(inputs, depth, matrix, first, last, tokens, sums, staged, ahead, kind)


by_dots = loops.experts_by(matrix_of, bias_of, encoded_dots)
by_tiles = amx.experts_by(matrix_of, bias_of, row_of, product)
