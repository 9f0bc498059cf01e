"""What packed weights stand for, written by registers of AVX-512 (`wide_codes.py`): for LLVM.

Either it is written where products read it, or tiles of AMX (`tiles.py`) multiply what was written just
before, while the next is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from layerscope_jax.kernels.encodings import (
    ALONG,
    APART,
    CHUNK,
    CODE,
    DEPTH,
    FP8,
    INT4_BFLOAT16,
    INT4_FLOAT16,
    INT8,
    MXFP4,
    NVFP4,
    SCALES,
    SHARED,
    TABLE,
    THIRD,
    row_of,
)
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.tiles import TILE, emit
from layerscope_jax.kernels.vectors import LONG, fetch
from layerscope_jax.kernels.wide_codes import KINDS, Codes, Rows, write
from layerscope_jax.support.njit import njit


def block(codes_of: Codes) -> Any:
    """A function that writes chunks of some rows.

    It takes the rows (`Rows`); how many, the first chunk and how many; where to write, and bytes from one row
    to the next, and from one chunk to the next. At last, an array of the type that is written: float32, or
    bfloat16 as its bits.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *places, count, begin, chunks, to, far, apart, _ = arguments
        words, rows = signature.args[-1].dtype is not types.float32, Rows(*places)

        def of_row(number: Any, _: list[Any]) -> list[Any]:
            row = rows.row(builder, number, codes_of.width)
            to_at = builder.add(to, builder.mul(number, far))

            def of_chunk(turn: Any, _: list[Any]) -> list[Any]:
                place = builder.add(to_at, builder.mul(turn, apart))
                registers = codes_of.decoded(builder, row, builder.add(begin, turn), words)
                for index, register in enumerate(registers):
                    write(builder, register, builder.add(place, LONG(64 * index)))
                return []

            return repeat(builder, chunks, [], of_chunk)

        repeat(builder, count, [], of_row)
        return context.get_dummy_value()

    def typed(typing, a, b, c, d, e, f, g, count, begin, chunks, to, far, apart, kind):
        return types.void(*[types.int64] * 13, kind), build

    return intrinsic(typed)


STEP = 4
"""Chunks of a row that are decoded one after the other: of 4 bits, a line of memory."""

HIGH = 2 * TILE
"""Rows of two tiles, whose sums are kept meanwhile."""

PART = 2 * HIGH * CHUNK
"""Bytes of a chunk of two tiles in bfloat16, row by row."""

SLOT = STEP * PART
"""Bytes of a step's weights of two tiles, chunk by chunk."""

TURN = HIGH // STEP
"""Rows that are decoded for each chunk of the step before that is multiplied."""


def steps(codes_of: Codes) -> Any:
    """A function that decodes steps of two tiles' rows, all but the first, and multiplies all but the last.

    It takes the rows (`Rows`); the first chunk; steps, at least two; the address of two slots, the first of
    them full; of the inputs (`tiles.add_few`), and bytes from one pair to the next; of what is to be asked
    for meanwhile.
    """
    asked = STEP * TURN * codes_of.bytes // 64

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *places, begin, count, slots, inputs, wide, ahead = arguments
        add, mul, rows = builder.add, builder.mul, Rows(*places)

        def step(before: Any, _: list[Any]) -> list[Any]:
            number = add(before, LONG(1))
            full = add(slots, mul(builder.and_(before, LONG(1)), LONG(SLOT)))
            empty = add(slots, mul(builder.and_(number, LONG(1)), LONG(SLOT)))
            chunk = add(begin, mul(number, LONG(STEP)))

            def turn(multiplied: Any, _: list[Any]) -> list[Any]:
                index = add(mul(before, LONG(STEP)), multiplied)
                for line in range(asked):
                    fetch(builder, add(ahead, add(mul(index, LONG(64 * asked)), LONG(64 * line))))
                first = mul(multiplied, LONG(TURN))
                for of_turn in range(TURN):
                    number = add(first, LONG(of_turn))
                    row = rows.row(builder, number, codes_of.width)
                    place = add(empty, mul(number, LONG(2 * CHUNK)))
                    for part in range(STEP):
                        (register,) = codes_of.decoded(builder, row, add(chunk, LONG(part)), True)
                        write(builder, register, add(place, LONG(PART * part)))
                x = add(inputs, mul(mul(index, LONG(CHUNK // 2)), wide))
                weights = add(full, mul(multiplied, LONG(PART)))
                emit(builder, "tileloadd64", [7], [x, wide])
                for tile in range(2):
                    at = add(weights, LONG(PART // 2 * tile))
                    emit(builder, "tileloadd64", [4 + tile], [at, LONG(2 * CHUNK)])
                    emit(builder, "tdpbf16ps", [tile, 4 + tile, 7])
                return []

            return repeat(builder, LONG(STEP), [], turn)

        repeat(builder, builder.sub(count, LONG(1)), [], step)
        return context.get_dummy_value()

    def typed(typing, a, b, c, d, e, f, g, begin, count, slots, inputs, wide, ahead):
        return types.void(*[types.int64] * 13), build

    return intrinsic(typed)


def by_code(made: Callable[[Codes], Any]) -> Any:
    """A compiled function that calls that which was made for a matrix's encoding.

    It takes the matrix, the first row, the address of scales that were written out (`decoding.prepare_rows`),
    and a tuple of the others' arguments.
    """
    int8, fp8, float16, bfloat16, float16_zeros, bfloat16_zeros, mxfp4, nvfp4 = map(made, KINDS)

    @njit(cache=True, nogil=True)
    def call(matrix, first, written, others):
        code, along, points = matrix[CODE], matrix[ALONG], matrix[THIRD]
        at, size = row_of(matrix, matrix[DEPTH], first)
        width = 2 if code in (INT4_FLOAT16, INT4_BFLOAT16) else 1
        if code in (INT8, FP8):
            scales, along = written, np.int64(APART)
        else:
            scales = matrix[SCALES] + width * along * first
        places = (at, scales, points + along * first, size, along, matrix[SHARED], matrix[TABLE])
        if code == INT8:
            int8(*places, *others)
        elif code == FP8:
            fp8(*places, *others)
        elif code == MXFP4:
            mxfp4(*places, *others)
        elif code == NVFP4:
            nvfp4(*places, *others)
        elif code == INT4_FLOAT16 and points == 0:
            float16(*places, *others)
        elif code == INT4_FLOAT16:
            float16_zeros(*places, *others)
        elif points == 0:
            bfloat16(*places, *others)
        else:
            bfloat16_zeros(*places, *others)

    return call


call_block, call_steps = by_code(block), by_code(steps)


@njit(cache=True, nogil=True)
def decode(matrix, first, rows, k, chunks, scales, to, far, apart, kind):
    """As `decoding.decode_anywhere`."""
    call_block(matrix, first, scales, (rows, k // CHUNK, chunks, to, far, apart, kind))


@njit(cache=True, nogil=True)
def add_steps(matrix, first, k, count, scales, slots, inputs, wide, ahead):
    """Decodes and multiplies steps of `HIGH` rows from column `k` on; the last is still to be multiplied.

    Args:
        count: steps, at least two, the first of them decoded in the first slot.
        scales: as `decoding.prepare_rows` says.
        slots: address of two.
        inputs: address of up to 16 tokens' inputs for column `k` on, `wide` bytes from one pair to the next.
        ahead: address of what is read next.
    """
    call_steps(matrix, first, scales, (k // CHUNK, count, slots, inputs, wide, ahead))
