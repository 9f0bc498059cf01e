"""What packed weights stand for, written where products read it: 32 numbers of a row at a time, for LLVM.

Codes of 4 bits are looked up: 16 values, scaled and rounded as the format is defined
(`formats.encoding.Encoding`), stay in a register for the numbers that share the scale. A matrix is a row of
numbers (`MATRIX`), so that one compiled loop reads every encoding.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from layerscope_jax.formats.quantised import QuantisedFormat
from layerscope_jax.kernels.numbers import float_of, pointer
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.vectors import INT, LONG, WIDE, WORD, external, read
from layerscope_jax.support.njit import njit
from layerscope_jax.support.target import features

CHUNK = 32
"""Numbers of a row that are written at once."""

PART = 256
"""Fewest numbers of a row that a product asks for: no scale is shared by numbers of several parts."""

# Of a matrix: its encoding; addresses of codes, scales and what is third; K; columns and rows that share a
# scale, and scales in a row.
CODE, CODES, SCALES, THIRD, DEPTH, COLUMNS, ROWS, ALONG = range(8)
MATRIX = 8

INT8, FP8, INT4_FLOAT16, INT4_BFLOAT16, MXFP4, NVFP4 = range(6)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BYTE = ir.IntType(8)
FLOAT = ir.FloatType()
LANES = 16


def able() -> bool:
    """Whether numba may compile for this CPU what is used here."""
    return WIDE and {"avx512bw", "avx512vl"} <= features()


def bfloat16_of(builder: Any, numbers: Any) -> Any:
    """16 float32 as bfloat16, rounded to the nearest, ties to even.

    AVX512_BF16 takes numbers below 2 ** -126 for zero, which no product can tell.
    """
    if "avx512bf16" in features():
        # By its assembler name, as in `vectors.add_pairs`.
        function = ir.FunctionType(ir.VectorType(WORD, LANES), [numbers.type])
        return builder.call(ir.InlineAsm(function, "vcvtneps2bf16 $1, $0", "=v,v"), [numbers])
    kind = ir.VectorType(INT, LANES)
    bits, shift = builder.bitcast(numbers, kind), kind([16] * LANES)
    odd = builder.and_(builder.lshr(bits, shift), kind([1] * LANES))
    nearest = builder.add(builder.add(bits, kind([0x7FFF] * LANES)), odd)
    return builder.trunc(builder.lshr(nearest, shift), ir.VectorType(WORD, LANES))


def spread(builder: Any, number: Any) -> Any:
    """A float32 in 16 lanes."""
    kind = ir.VectorType(FLOAT, LANES)
    nothing = ir.Constant(kind, ir.Undefined)
    value = builder.insert_element(nothing, number, INT(0))
    return builder.shuffle_vector(value, nothing, ir.VectorType(INT, LANES)([0] * LANES))


def write(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)


def looked_up(builder: Any, table: Any, codes: Any, to: Any, words: bool, count: int) -> None:
    """Writes what 16 or 32 codes of 4 bits, from an address on, stand for in a table of 16 float32."""
    half = count // 2
    packed = read(builder, codes, ir.VectorType(BYTE, half), 1)
    if words:  # of each 32 bits the lower half begins with the first code, the upper one with the second
        kind = ir.VectorType(INT, half)
        pairs = builder.zext(packed, kind)
        pairs = builder.or_(pairs, builder.shl(pairs, kind([12] * half)))
        entries = bfloat16_of(builder, table)
        order = list(range(LANES)) * (count // LANES)
        entries = builder.shuffle_vector(entries, entries, ir.VectorType(INT, count)(order))
        index = builder.bitcast(pairs, entries.type)
        name = f"llvm.x86.avx512.permvar.hi.{16 * count}"
        found = builder.call(external(builder, name, entries.type, [entries.type] * 2), [entries, index])
        write(builder, found, to)
        return
    for part in range(count // LANES):
        order = ir.VectorType(INT, 8)(list(range(8 * part, 8 * part + 8)))
        some = builder.shuffle_vector(packed, packed, order) if half > 8 else packed
        kind = ir.VectorType(LONG, 8)
        pairs = builder.zext(some, kind)
        pairs = builder.or_(pairs, builder.shl(pairs, kind([28] * 8)))
        index = builder.bitcast(pairs, ir.VectorType(INT, LANES))
        name = "llvm.x86.avx512.permvar.sf.512"
        found = builder.call(external(builder, name, table.type, [table.type, index.type]), [table, index])
        write(builder, found, builder.add(to, LONG(4 * LANES * part)))


def four_bits(entries: list[float], zeros: bool, parts: int, step: int = 4) -> Any:
    """A function that writes chunks of numbers of 4 bits.

    It takes addresses: of the codes, of a float32 scale for each `parts`-th part of a chunk, and of a float32
    zero point each where there are any; the number of chunks; where to write, and bytes from one chunk to the
    next. At last, an array of the type that is written: float32, or bfloat16 as its bits.

    Args:
        entries: what the 16 codes stand for.
        zeros: whether zero points are taken off these.
        parts: of a chunk, each with a scale.
        step: bytes from a scale to the next one; 0 for one scale of all chunks.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, scales, offsets, chunks, to, far, _ = arguments
        words = signature.args[-1].dtype is not types.float32
        kind = ir.VectorType(FLOAT, LANES)

        def chunk(turn: Any, _: list[Any]) -> list[Any]:
            at, out = (
                builder.add(base, builder.mul(turn, step)) for base, step in ((codes, LONG(16)), (to, far))
            )
            for part in range(parts):
                place = builder.add(builder.mul(turn, LONG(step * parts)), LONG(step * part))
                table: Any = kind(entries)
                if zeros:
                    table = builder.fsub(
                        table, spread(builder, read(builder, builder.add(offsets, place), FLOAT, 4))
                    )
                table = builder.fmul(
                    table, spread(builder, read(builder, builder.add(scales, place), FLOAT, 4))
                )
                size = (2 if words else 4) * CHUNK // parts
                looked_up(
                    builder,
                    table,
                    builder.add(at, LONG(16 // parts * part)),
                    builder.add(out, LONG(size * part)),
                    words,
                    CHUNK // parts,
                )
            return []

        repeat(builder, chunks, [], chunk)
        return context.get_dummy_value()

    def typed(typing, codes, scales, offsets, chunks, to, far, kind):
        return types.void(*[types.int64] * 6, kind), build

    return intrinsic(typed)


def eight_bits(small_float: bool) -> Any:
    """The same of 8 bits: int8, or E4M3. It takes no zero points, and one float32 scale for all chunks."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, scale, chunks, to, far, _ = arguments
        words = signature.args[-1].dtype is not types.float32
        numbers, integers = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
        factor = spread(builder, scale)

        def value(at: Any) -> Any:
            packed = read(builder, at, ir.VectorType(BYTE, LANES), 1)
            if not small_float:
                return builder.sitofp(builder.sext(packed, integers), numbers)
            # As float16 of the same bits, whose exponents are 8 less.
            halves = ir.VectorType(WORD, LANES)
            bits = builder.zext(packed, halves)
            sign = builder.shl(builder.and_(bits, halves([0x80] * LANES)), halves([8] * LANES))
            size = builder.and_(bits, halves([0x7F] * LANES))
            small = builder.or_(sign, builder.shl(size, halves([7] * LANES)))
            wide = builder.fpext(builder.bitcast(small, ir.VectorType(ir.HalfType(), LANES)), numbers)
            wide = builder.fmul(wide, numbers([256.0] * LANES))
            none = builder.icmp_unsigned("==", size, halves([0x7F] * LANES))
            return builder.select(none, numbers([float("nan")] * LANES), wide)

        def chunk(turn: Any, _: list[Any]) -> list[Any]:
            at = builder.add(codes, builder.mul(turn, LONG(CHUNK)))
            out = builder.add(to, builder.mul(turn, far))
            for part in range(CHUNK // LANES):
                number = builder.fmul(value(builder.add(at, LONG(LANES * part))), factor)
                if words:
                    write(builder, bfloat16_of(builder, number), builder.add(out, LONG(2 * LANES * part)))
                else:
                    write(builder, number, builder.add(out, LONG(4 * LANES * part)))
            return []

        repeat(builder, chunks, [], chunk)
        return context.get_dummy_value()

    def typed(typing, codes, scale, chunks, to, far, kind):
        long = types.int64
        return types.void(long, types.float32, long, long, long, kind), build

    return intrinsic(typed)


write_int4 = four_bits([float(code - 8) for code in range(16)], zeros=False, parts=1)
write_int4_group = four_bits([float(code) for code in range(16)], zeros=True, parts=1, step=0)
write_mxfp4 = four_bits([*E2M1, *(-value for value in E2M1)], zeros=False, parts=1)
write_nvfp4 = four_bits([*E2M1, *(-value for value in E2M1)], zeros=False, parts=2)
write_int8, write_fp8 = eight_bits(small_float=False), eight_bits(small_float=True)


@intrinsic
def float_of_half(typing: Any, bits: Any) -> Any:
    """The float16 with these bits, as float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), FLOAT)

    return types.float32(types.uint16), build


SMALLEST = np.uint32(0x00400000)
"""Bits of 2 ** -127."""


@njit(cache=True, nogil=True)
def scales_of(matrix, row, k, chunks, scales, zeros):
    """Writes the float32 scales, and zero points, of chunks of a row of numbers of 4 bits.

    Args:
        scales: [chunks], or twice as many for NVFP4.
    """
    code, along, each = matrix[CODE], matrix[ALONG], matrix[COLUMNS]
    if code == NVFP4:
        codes = carray(pointer(matrix[SCALES] + along * row + k // 16), 2 * chunks, np.uint8)
        whole = carray(pointer(matrix[THIRD]), 1, np.float32)[0]
        for index in range(np.uint64(2 * chunks)):
            size = np.uint16(codes[index] & np.uint8(0x7F))
            sign = np.uint16(codes[index] & np.uint8(0x80)) << np.uint16(8)
            value = float_of_half(sign | (size << np.uint16(7))) * np.float32(256)
            scales[index] = (np.float32(np.nan) if size == np.uint16(0x7F) else value) * whole
        return
    if code == MXFP4:
        codes = carray(pointer(matrix[SCALES] + along * row + k // CHUNK), chunks, np.uint8)
        for index in range(np.uint64(chunks)):
            bits = np.uint32(codes[index]) << np.uint32(23)
            scales[index] = float_of(SMALLEST if bits == np.uint32(0) else bits)
        return
    first, repeats = k // each, each // CHUNK  # groups are whole in a row, and K is cut where they end
    count = (chunks + repeats - 1) // repeats
    halves = carray(pointer(matrix[SCALES] + 2 * (along * row + first)), count, np.uint16)
    if code == INT4_FLOAT16:
        for group in range(np.uint64(count)):
            scales[group] = float_of_half(halves[group])
    else:
        for group in range(np.uint64(count)):
            scales[group] = float_of(np.uint32(halves[group]) << np.uint32(16))
    if matrix[THIRD] != 0:
        points = carray(pointer(matrix[THIRD] + along * row + first), count, np.uint8)
        for group in range(np.uint64(count)):
            zeros[group] = np.float32(points[group])
    else:
        for group in range(np.uint64(count)):
            zeros[group] = np.float32(8)


@njit(cache=True, nogil=True)
def decode(matrix, row, k, chunks, scratch, to, far, kind):
    """Writes what chunks of a row of a matrix stand for, from column `k` on.

    Args:
        matrix: [MATRIX] of it.
        k: a multiple of the numbers that share a scale.
        scratch: [2, 2 * chunks] float32.
        to: address of the first number.
        far: bytes from one chunk to the next.
        kind: an array of the type that is written: float32, or bfloat16 as its bits.
    """
    code = matrix[CODE]
    if code == INT8 or code == FP8:
        at, begin = matrix[CODES] + matrix[DEPTH] * row, 0
        block = matrix[COLUMNS]
        scales = carray(
            pointer(matrix[SCALES] + 4 * matrix[ALONG] * (row // matrix[ROWS])), matrix[ALONG], np.float32
        )
        while begin < chunks:
            column = k + CHUNK * begin
            count = min(chunks - begin, (block - column % block) // CHUNK)
            scale, codes, out = scales[column // block], at + column, to + far * begin
            if code == INT8:
                write_int8(codes, scale, count, out, far, kind)
            else:
                write_fp8(codes, scale, count, out, far, kind)
            begin += count
        return
    scales_of(matrix, row, k, chunks, scratch[0], scratch[1])
    at = matrix[CODES] + (matrix[DEPTH] * row + k) // 2
    scales, zeros = scratch[0].ctypes.data, scratch[1].ctypes.data
    if code == MXFP4:
        write_mxfp4(at, scales, 0, chunks, to, far, kind)
    elif code == NVFP4:
        write_nvfp4(at, scales, 0, chunks, to, far, kind)
    else:
        repeats = matrix[COLUMNS] // CHUNK
        for group in range(1 if repeats == 1 and matrix[THIRD] == 0 else (chunks + repeats - 1) // repeats):
            if repeats == 1 and matrix[THIRD] == 0:
                write_int4(at, scales, 0, chunks, to, far, kind)
            else:
                count = min(repeats, chunks - group * repeats)
                write_int4_group(at, scales + 4 * group, zeros + 4 * group, count, to, far, kind)
            at, to = at + CHUNK // 2 * repeats, to + far * repeats


@functools.cache
def suit(format: QuantisedFormat, width: int, hidden: int) -> bool:
    """Whether experts [width, hidden] of a format can be computed here."""
    return able() and None not in (facts_of(format, hidden, width), facts_of(format, width, hidden))


def facts_of(format: QuantisedFormat, rows: int, depth: int) -> tuple[int, int, int, int] | None:
    """Returns CODE, COLUMNS, ROWS, ALONG of matrices [rows, depth]; None where `decode` cannot read them."""
    encoding: Any = format.encoding
    kind = type(encoding).__name__
    if depth % CHUNK:
        return None
    if kind == "Int8":
        return INT8, depth, 1, 1
    if kind == "Fp8":
        high, wide = encoding.block(rows, depth)
        wide = min(wide, -(-depth // CHUNK) * CHUNK)
        return None if wide % CHUNK else (FP8, wide, high, -(-depth // wide))
    if kind == "Int4":
        code = INT4_FLOAT16 if encoding.scale == "float16" else INT4_BFLOAT16
        if depth % encoding.group or PART % encoding.group:
            return None
        return code, encoding.group, 1, depth // encoding.group
    if kind == "Mxfp4":
        return MXFP4, CHUNK, 1, depth // CHUNK
    if kind == "Nvfp4":
        return NVFP4, CHUNK // 2, 1, depth // (CHUNK // 2)
    return None
