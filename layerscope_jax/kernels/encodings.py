"""What packed weights stand for, written where products read it: 32 numbers of a row at a time, for LLVM.

Codes of 4 bits are looked up: 16 values, scaled and rounded as the format is defined
(`formats.encoding.Encoding`), stay in a register for the numbers that share the scale. A matrix is a row of
numbers (`MATRIX`), so that one compiled loop reads every encoding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from layerscope_jax.formats.fp8 import Fp8
from layerscope_jax.formats.int4 import Int4
from layerscope_jax.formats.int8 import Int8
from layerscope_jax.formats.mxfp4 import Mxfp4
from layerscope_jax.formats.nvfp4 import Nvfp4
from layerscope_jax.formats.quantised import QuantisedFormat
from layerscope_jax.formats.small_floats import E2M1_VALUES
from layerscope_jax.kernels.numbers import pointer
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.vectors import INT, LONG, WIDE, WORD, external, read
from layerscope_jax.support.njit import njit
from layerscope_jax.support.target import features

CHUNK = 32
"""Numbers of a row that are written at once."""

PART = 256
"""Fewest numbers of a row that a product asks for: no scale is shared by numbers of several parts."""

# Of a matrix: addresses of codes, scales and what is third; K; its encoding; columns and rows that share a
# scale, scales in a row; chunks that share one, as a power of two.
CODES, SCALES, THIRD, DEPTH, CODE, COLUMNS, ROWS, ALONG, SHARED = range(9)
MATRIX = 9

INT8, FP8, INT4_FLOAT16, INT4_BFLOAT16, MXFP4, NVFP4 = range(6)

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


def scale_at(builder: Any, kind: str, address: Any) -> Any:
    """The scale of a kind that lies at an address, as float32."""
    if kind == "float16":
        return builder.fpext(read(builder, address, ir.HalfType(), 2), FLOAT)
    if kind == "bfloat16":
        bits = builder.zext(read(builder, address, WORD, 2), INT)
        return builder.bitcast(builder.shl(bits, INT(16)), FLOAT)
    code = read(builder, address, BYTE, 1)
    if kind == "e8m0":  # of 0, 2 ** -127, which has leading zeros in its fraction
        bits = builder.shl(builder.zext(code, INT), INT(23))
        least = INT(0x00400000)
        return builder.bitcast(builder.select(builder.icmp_unsigned("<", bits, least), least, bits), FLOAT)
    size = builder.zext(builder.and_(code, BYTE(0x7F)), WORD)
    sign = builder.shl(builder.zext(builder.and_(code, BYTE(0x80)), WORD), WORD(8))
    small = builder.bitcast(builder.or_(sign, builder.shl(size, WORD(7))), ir.HalfType())
    value = builder.fmul(builder.fpext(small, FLOAT), FLOAT(256.0))
    return builder.select(builder.icmp_unsigned("==", size, WORD(0x7F)), FLOAT(float("nan")), value)


def four_bits(entries: Sequence[float], scale: str, zeros: bool = False, parts: int = 1) -> Any:
    """A function that writes chunks of numbers of 4 bits.

    It takes addresses of the codes, of their scales, and of zero points, of 8 bits; how many chunks share a
    scale, as a power of two; a float32 that all scales are multiplied with; chunks; where to write, and bytes
    from one chunk to the next. At last, an array of the type that is written: float32 or bits of bfloat16.

    Args:
        entries: what the 16 codes stand for.
        scale: of which kind scales are (`scale_at`).
        zeros: whether there are zero points, which are taken off these.
        parts: scales of a chunk.
    """
    bits = {"float16": 16, "bfloat16": 16}.get(scale, 8)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, scales, points, shared, factor, chunks, to, far, _ = arguments
        words = signature.args[-1].dtype is not types.float32
        kind = ir.VectorType(FLOAT, LANES)

        def chunk(turn: Any, _: list[Any]) -> list[Any]:
            at = builder.add(codes, builder.mul(turn, LONG(16)))
            out = builder.add(to, builder.mul(turn, far))
            group = builder.lshr(turn, shared) if parts == 1 else builder.mul(turn, LONG(parts))
            for part in range(parts):
                index = builder.add(group, LONG(part))
                table: Any = kind([float(entry) for entry in entries])
                if zeros:
                    point = read(builder, builder.add(points, index), BYTE, 1)
                    table = builder.fsub(table, spread(builder, builder.uitofp(point, FLOAT)))
                place = builder.add(scales, builder.mul(index, LONG(bits // 8)))
                number = scale_at(builder, scale, place)
                if scale == "e4m3":
                    number = builder.fmul(number, factor)
                table = builder.fmul(table, spread(builder, number))
                looked_up(
                    builder,
                    table,
                    builder.add(at, LONG(16 // parts * part)),
                    builder.add(out, LONG((2 if words else 4) * CHUNK // parts * part)),
                    words,
                    CHUNK // parts,
                )
            return []

        repeat(builder, chunks, [], chunk)
        return context.get_dummy_value()

    def typed(typing, codes, scales, points, shared, factor, chunks, to, far, kind):
        long = types.int64
        return types.void(long, long, long, long, types.float32, long, long, long, kind), build

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


INTEGERS, FLOATS = range(-8, 8), E2M1_VALUES.tolist()

write_float16, write_bfloat16 = (four_bits(INTEGERS, scale) for scale in ("float16", "bfloat16"))
write_float16_zeros, write_bfloat16_zeros = (
    four_bits(range(16), scale, zeros=True) for scale in ("float16", "bfloat16")
)
write_mxfp4, write_nvfp4 = four_bits(FLOATS, "e8m0"), four_bits(FLOATS, "e4m3", parts=2)
write_int8, write_fp8 = eight_bits(small_float=False), eight_bits(small_float=True)


@njit(cache=True, nogil=True)
def decode(matrix, row, k, chunks, to, far, kind):
    """Writes what chunks of a row of a matrix stand for, from column `k` on.

    Args:
        matrix: [MATRIX] of it.
        k: a multiple of the numbers that share a scale.
        to: address of the first number.
        far: bytes from one chunk to the next.
        kind: an array of the type that is written: float32, or bfloat16 as its bits.
    """
    code, along = matrix[CODE], matrix[ALONG]
    if code in (INT8, FP8):
        at, begin, block = matrix[CODES] + matrix[DEPTH] * row, 0, matrix[COLUMNS]
        first = matrix[SCALES] + 4 * along * (row // matrix[ROWS] if matrix[ROWS] > 1 else row)
        while begin < chunks:
            column, index, count = k + CHUNK * begin, 0, chunks - begin
            if along > 1:
                index = column // block
                count = min(count, (block * (index + 1) - column) // CHUNK)
            scale = carray(pointer(first + 4 * index), 1, np.float32)[0]
            if code == INT8:
                write_int8(at + column, scale, count, to + far * begin, far, kind)
            else:
                write_fp8(at + column, scale, count, to + far * begin, far, kind)
            begin += count
        return
    at, shared, one = matrix[CODES] + (matrix[DEPTH] * row + k) // 2, matrix[SHARED], np.float32(1)
    if code == NVFP4:
        scales, whole = matrix[SCALES] + along * row + k // 16, carray(pointer(matrix[THIRD]), 1, np.float32)
        write_nvfp4(at, scales, 0, shared, whole[0], chunks, to, far, kind)
        return
    first = along * row + (k // CHUNK >> shared)
    if code == MXFP4:
        write_mxfp4(at, matrix[SCALES] + first, 0, shared, one, chunks, to, far, kind)
        return
    scales, points = matrix[SCALES] + 2 * first, matrix[THIRD] + first
    if code == INT4_FLOAT16:
        if matrix[THIRD] == 0:
            write_float16(at, scales, points, shared, one, chunks, to, far, kind)
        else:
            write_float16_zeros(at, scales, points, shared, one, chunks, to, far, kind)
    elif matrix[THIRD] == 0:
        write_bfloat16(at, scales, points, shared, one, chunks, to, far, kind)
    else:
        write_bfloat16_zeros(at, scales, points, shared, one, chunks, to, far, kind)


@functools.cache
def suit(format: QuantisedFormat, width: int, hidden: int) -> bool:
    """Whether experts [width, hidden] of a format can be computed here."""
    return able() and None not in (facts_of(format, hidden, width), facts_of(format, width, hidden))


def facts_of(format: QuantisedFormat, rows: int, depth: int) -> tuple[int, ...] | None:
    """Returns CODE to SHARED of matrices [rows, depth]; None where `decode` cannot read them."""
    encoding = format.encoding
    if depth % CHUNK:
        return None
    if isinstance(encoding, Int8):
        return INT8, depth, 1, 1, 0
    if isinstance(encoding, Fp8):
        high, wide = encoding.block(rows, depth)
        along = -(-depth // wide)
        return None if along > 1 and wide % CHUNK else (FP8, wide, high, along, 0)
    if isinstance(encoding, Int4):
        group = encoding.group
        if depth % group or PART % group:
            return None
        code = INT4_FLOAT16 if encoding.scale == "float16" else INT4_BFLOAT16
        return code, group, 1, depth // group, (group // CHUNK).bit_length() - 1
    if isinstance(encoding, Mxfp4):
        return MXFP4, CHUNK, 1, depth // CHUNK, 0
    if isinstance(encoding, Nvfp4):
        return NVFP4, CHUNK // 2, 1, depth // (CHUNK // 2), 0
    return None
