"""What packed weights stand for, written by registers of AVX-512 or AVX2 (`wide_codes.py`): for LLVM.

Either it is written where products read it, or tiles of AMX (`tiles.py`) multiply what was written just
before, while the next is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from layerscope_jax.formats.small_floats import E2M1_VALUES
from layerscope_jax.kernels.encodings import (
    ALONG,
    BYTES_APART,
    CHUNK,
    CODE,
    COLUMNS,
    DEPTH,
    ENTRIES,
    FP8,
    INT4_BFLOAT16,
    INT4_FLOAT16,
    INT8,
    MXFP4,
    NVFP4,
    ROWS,
    SCALES,
    SHARED,
    TABLE,
    THIRD,
    row_of,
)
from layerscope_jax.kernels.numbers import as_float32
from layerscope_jax.kernels.scales import ALL, prepare_rows
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.tiles import TILE, emit
from layerscope_jax.kernels.vectors import LONG, fetch, read
from layerscope_jax.kernels.wide_codes import BYTES, KINDS, WITH_LEAST, Codes, Rows, tables, write_table
from layerscope_jax.kernels.wide_registers import (
    FLOAT,
    HALF,
    NUMBERS,
    bfloat16s,
    picked,
    read_at,
    spread,
    write,
)
from layerscope_jax.support.njit import njit


def block(codes_of: Codes) -> Any:
    """A function that writes chunks of some rows.

    It takes the rows (`Rows`); how many, the first chunk and how many; where to write, and bytes from one row
    to the next, and from one chunk to the next; what is to be asked for meanwhile, as many bytes for each row
    as it has, and bytes from one row's to the next one's. At last, an array of the type that is written
    (`decoding.decode_anywhere`).
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *places, count, begin, chunks, to, far, apart, ahead, beyond, _ = arguments
        kind, rows = signature.args[-1].dtype, Rows(*places)

        def of_row(number: Any, _: list[Any]) -> list[Any]:
            row = rows.row(builder, number, codes_of.width)
            to_at = builder.add(to, builder.mul(number, far))
            asked = builder.add(ahead, builder.mul(number, beyond))

            def of_chunk(turn: Any, _: list[Any]) -> list[Any]:
                chunk = builder.mul(turn, LONG(codes_of.together))
                fetch(builder, builder.add(asked, builder.mul(chunk, LONG(codes_of.bytes))))
                place = builder.add(to_at, builder.mul(chunk, apart))
                number = builder.add(begin, chunk)
                if kind is types.uint32:
                    registers = codes_of.widened(builder, row, number)
                else:
                    registers = codes_of.decoded(builder, row, number, kind is not types.float32)
                size = len(registers) // codes_of.together  # registers of a chunk
                wide = 2 * CHUNK // size if kind.bitwidth == 16 else 4 * CHUNK // size  # bytes of one
                for index, register in enumerate(registers):
                    distance = builder.add(
                        builder.mul(apart, LONG(index // size)), LONG(wide * (index % size))
                    )
                    write(builder, register, builder.add(place, distance))
                return []

            return repeat(builder, builder.sdiv(chunks, LONG(codes_of.together)), [], of_chunk)

        repeat(builder, count, [], of_row)
        return context.get_dummy_value()

    def typed(typing, a, b, c, d, e, f, g, count, begin, chunks, to, far, apart, ahead, beyond, kind):
        return types.void(*[types.int64] * 15, kind), build

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
    for meanwhile, and 1 if the scales behind these are to be, else 0.
    """
    lines = STEP * codes_of.bytes // 64

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *places, begin, count, slots, inputs, wide, ahead, more = arguments
        add, mul, rows = builder.add, builder.mul, Rows(*places)
        beside = []  # of scales and points: address of what is to come, and bytes of it for each chunk
        if codes_of.entries:
            scales = mul(rows.along, LONG(HIGH))
            each = builder.sdiv(mul(scales, LONG(codes_of.bytes)), rows.size)
            behind = mul(scales, more)
            width = LONG(codes_of.width)
            beside.append((add(rows.scales, mul(behind, width)), mul(each, width)))
            if codes_of.zeros:
                beside.append((add(rows.points, behind), each))

        def step(before: Any, _: list[Any]) -> list[Any]:
            number = add(before, LONG(1))
            full = add(slots, mul(builder.and_(before, LONG(1)), LONG(SLOT)))
            empty = add(slots, mul(builder.and_(number, LONG(1)), LONG(SLOT)))
            chunk = add(begin, mul(number, LONG(STEP)))

            def turn(multiplied: Any, _: list[Any]) -> list[Any]:
                index = add(mul(before, LONG(STEP)), multiplied)
                for address, size in beside:
                    fetch(builder, add(address, mul(add(begin, index), size)))
                first = mul(multiplied, LONG(TURN))
                start = rows.row(builder, first, codes_of.width)

                # A line is asked for with each row, not many at once: there are few places for them.
                def of_row(_: Any, state: list[Any]) -> list[Any]:
                    codes, scales, points, to, asked = state
                    row = start._replace(codes=codes, scales=scales, points=points)
                    for line in range(lines):
                        fetch(builder, add(asked, LONG(64 * line)))
                    for part in range(0, STEP, codes_of.together):
                        registers = codes_of.decoded(builder, row, add(chunk, LONG(part)), True)
                        for number, register in enumerate(registers, part):
                            write(builder, register, add(to, LONG(PART * number)))
                    below = row.row(builder, LONG(1), codes_of.width)
                    following = add(to, LONG(2 * CHUNK)), add(asked, LONG(64 * lines))
                    return [below.codes, below.scales, below.points, *following]

                to, asked = add(empty, mul(first, LONG(2 * CHUNK))), mul(index, LONG(64 * lines * TURN))
                state = [start.codes, start.scales, start.points, to, add(ahead, asked)]
                repeat(builder, LONG(TURN), state, of_row)
                x = add(inputs, mul(mul(index, LONG(CHUNK // 2)), wide))
                weights = add(full, mul(multiplied, LONG(PART)))
                emit(builder, "tileloadd64", [7], [x, wide])
                for tile in range(2):
                    at = add(weights, LONG(PART // 2 * tile))
                    emit(builder, "tileloadd64", [4 + tile], [at, LONG(2 * CHUNK)])
                    emit(builder, "tdpbf16ps", [tile, 4 + tile, 7])
                return []

            repeat(builder, LONG(STEP), [], turn)
            return []

        repeat(builder, builder.sub(count, LONG(1)), [], step)
        return context.get_dummy_value()

    def typed(typing, a, b, c, d, e, f, g, begin, count, slots, inputs, wide, ahead, more):
        return types.void(*[types.int64] * 14), build

    return intrinsic(typed)


def tabling(integers: bool) -> Any:
    """A function that writes a table for `wide_codes.looked_up`, given the addresses of a scale and of it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scale, to = arguments
        write_table(builder, read(builder, scale, FLOAT, 4), to, integers)
        return context.get_dummy_value()

    return intrinsic(lambda typing, scale, to: (types.void(*[types.int64] * 2), build))


tabled, tabled_integers = tabling(False), tabling(True)


@intrinsic
def tabled_codes(typing: Any, scales: Any, count: Any, to: Any) -> Any:
    """Writes `ENTRIES` bfloat16 for each of some scales, given addresses: of E2M1 numbers in turn."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scales, count, to = arguments

        def of_scale(turn: Any, _: list[Any]) -> list[Any]:
            scale = spread(builder, read_at(builder, scales, turn, FLOAT, 4))
            numbers = builder.fmul(NUMBERS(E2M1_VALUES.tolist()), scale)
            words = bfloat16s(builder, numbers, numbers)
            half = picked(builder, words, words, range(ENTRIES))
            if BYTES_APART:
                both = builder.bitcast(half, HALF)
                half = picked(builder, both, both, [*range(0, 2 * ENTRIES, 2), *range(1, 2 * ENTRIES, 2)])
            write(builder, half, builder.add(to, builder.mul(turn, LONG(2 * ENTRIES))))
            return []

        repeat(builder, count, [], of_scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), build


@njit(cache=True, nogil=True)
def write_tables(scales, to):
    """As `decoding.write_tables_anywhere`."""
    tabled_codes(scales.ctypes.data, len(scales), to)
    scales[0] = scales[0]  # kept until here


TABLES = tables()

WORTH_TABLES = 40
"""Chunks of a row from which on it gets a table of its own. In a Xeon's nearest cache that was even with
multiplying them by its scale somewhere between 16 and 64; tables leave products more of the CPU."""


@njit(cache=True, nogil=True)
def prepare(matrix, first, rows, k, chunks, room, kind):
    """As `scales.prepare_rows`; of 8 bits that become bfloat16 it writes tables, if so few are needed.

    Args:
        room: also for as many tables as `SPAN` chunks, or `rows`, can need, of `WITH_LEAST` bytes.

    Returns:
        the same of tables, and 1.
    """
    scales = prepare_rows(matrix, first, rows, k, chunks, room, kind)
    begin = k // CHUNK
    if not TABLES or as_float32(kind) or (begin | chunks) % 2:
        return scales
    where, along, shared, _ = scales
    if matrix[CODE] == INT8 and chunks >= WORTH_TABLES:
        for row in range(rows):
            tabled_integers(where + along * row, room + WITH_LEAST * row)
        return room, np.int64(WITH_LEAST), shared, np.int64(1)
    if matrix[CODE] != FP8:
        return scales
    if shared == ALL:
        for row in range(rows if along else 1):
            tabled(where + along * row, room + BYTES * row)
        return room, np.int64(BYTES if along else 0), shared, np.int64(1)
    power = np.int64(0)
    while CHUNK << power < matrix[COLUMNS]:
        power += 1
    if along or power == 0 or CHUNK << power != matrix[COLUMNS]:
        return scales
    at = matrix[SCALES] + 4 * matrix[ALONG] * (first // matrix[ROWS])
    for block in range(begin >> power, ((begin + chunks - 1) >> power) + 1):
        tabled(at + 4 * block, room + BYTES * (block - (begin >> power)))
    return room - BYTES * (begin >> power), np.int64(0), power, np.int64(1)


def by_code(made: Callable[[Codes], Any]) -> Any:
    """A compiled function that calls that which was made for a matrix's encoding.

    It takes the matrix, the first row, its scales as `prepare` returns them, and a tuple of the others'
    arguments.
    """
    int8, fp8, float16, bfloat16, float16_zeros, bfloat16_zeros, mxfp4, nvfp4, *tabled = map(made, KINDS)
    fp8_tables, int8_tables = tabled

    @njit(cache=True, nogil=True)
    def call(matrix, first, prepared, others):
        code, along, points = matrix[CODE], matrix[ALONG], matrix[THIRD]
        at, size = row_of(matrix, matrix[DEPTH], first)
        width = 2 if code in (INT4_FLOAT16, INT4_BFLOAT16) else 1
        scales, shared, looked_up = matrix[SCALES] + width * along * first, matrix[SHARED], np.int64(0)
        if code in (INT8, FP8):
            scales, along, shared, looked_up = prepared
        places = (at, scales, points + along * first, size, along, shared, matrix[TABLE])
        if code == INT8 and looked_up:
            int8_tables(*places, *others)
        elif code == INT8:
            int8(*places, *others)
        elif code == FP8 and looked_up:
            fp8_tables(*places, *others)
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
def decode(matrix, first, rows, k, chunks, scales, to, far, apart, ahead, beyond, kind):
    """As `decoding.decode_anywhere`."""
    call_block(matrix, first, scales, (rows, k // CHUNK, chunks, to, far, apart, ahead, beyond, kind))


@njit(cache=True, nogil=True)
def add_steps(matrix, first, k, count, scales, slots, inputs, wide, ahead, more):
    """Decodes and multiplies steps of `HIGH` rows from column `k` on; the last is still to be multiplied.

    Args:
        count: steps, at least two, the first of them decoded in the first slot.
        scales: as `prepare` returns them.
        slots: address of two.
        inputs: address of up to 16 tokens' inputs for column `k` on, `wide` bytes from one pair to the next.
        ahead: address of what is read next.
        more: 1 if that is of the same matrix, behind these rows, else 0.
    """
    call_steps(matrix, first, scales, (k // CHUNK, count, slots, inputs, wide, ahead, more))
