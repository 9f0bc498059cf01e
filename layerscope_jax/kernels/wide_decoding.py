"""What packed weights stand for, 32 numbers of a row at a time in registers of AVX-512: for LLVM.

Codes of 4 bits are looked up: 16 values, scaled and rounded as the format is defined
(`formats.encoding.Encoding`), in a register, for the numbers that share the scale. Either they are written
where products read them, or tiles of AMX (`tiles.py`) multiply those that were written just before, while the
next ones are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from layerscope_jax.formats.small_floats import E2M1_VALUES
from layerscope_jax.kernels.encodings import (
    APART,
    CHUNK,
    CODE,
    DEPTH,
    FP8,
    INT4,
    INT8,
    MXFP4,
    SPAN,
    THIRD,
    row_of,
)
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.tiles import TILE, emit
from layerscope_jax.kernels.vectors import INT, LONG, WIDE, WORD, external, fetch, read
from layerscope_jax.support.njit import njit
from layerscope_jax.support.target import features

BYTE, FLOAT = ir.IntType(8), ir.FloatType()
LANES = 16
NUMBERS, INTEGERS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
WORDS = ir.VectorType(WORD, 2 * LANES)


def able() -> bool:
    """Whether numba may compile for this CPU what is used here."""
    return WIDE and {"avx512bw", "avx512vl"} <= features()


def picked(builder: Any, first: Any, second: Any, order: Sequence[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.VectorType(INT, len(order))(list(order)))


def bfloat16s(builder: Any, low: Any, high: Any) -> Any:
    """Twice 16 float32 as 32 bfloat16, rounded to the nearest, ties to even.

    AVX512_BF16 takes numbers below 2 ** -126 for zero, which no product can tell.
    """
    if "avx512bf16" in features():
        # By its assembler name, as in `vectors.add_pairs`.
        function = ir.FunctionType(WORDS, [NUMBERS, NUMBERS])
        return builder.call(ir.InlineAsm(function, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v"), [low, high])

    def rounded(numbers: Any) -> Any:
        bits, shift = builder.bitcast(numbers, INTEGERS), INTEGERS([16] * LANES)
        odd = builder.and_(builder.lshr(bits, shift), INTEGERS([1] * LANES))
        nearest = builder.add(builder.add(bits, INTEGERS([0x7FFF] * LANES)), odd)
        return builder.trunc(builder.lshr(nearest, shift), ir.VectorType(WORD, LANES))

    first, second = rounded(low), low is high or rounded(high)
    return picked(builder, first, first if low is high else second, range(2 * LANES))


def spread(builder: Any, address: Any) -> Any:
    """The float32 that lies at an address, in 16 lanes."""
    nothing = ir.Constant(NUMBERS, ir.Undefined)
    value = builder.insert_element(nothing, read(builder, address, FLOAT, 4), INT(0))
    return picked(builder, value, nothing, [0] * LANES)


def write(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)


@dataclass(frozen=True)
class Codes:
    """What chunks are decoded from.

    Attributes:
        entries: what the 16 codes of 4 bits stand for, unscaled; none of 8 bits.
        scales: of a chunk.
        zeros: whether there are zero points, which are taken off the entries.
        small_float: whether 8 bits are E4M3, not integers.
    """

    entries: tuple[float, ...] = ()
    scales: int = 1
    zeros: bool = False
    small_float: bool = False

    @property
    def bytes(self) -> int:
        """Of a chunk."""
        return CHUNK // 2 if self.entries else CHUNK

    def decoded(self, builder: Any, codes: Any, scales: Any, words: bool) -> list[Any]:
        """Returns the 32 numbers of a chunk, as registers.

        Args:
            codes, scales: addresses of the chunk's.
            words: whether they are to be bfloat16, not float32.
        """
        if not self.entries:
            numbers = self._of_bytes(builder, codes, scales)
            return [bfloat16s(builder, *numbers)] if words else numbers
        tables = [self._table(builder, builder.add(scales, LONG(4 * part))) for part in range(self.scales)]
        tables *= 2 // self.scales
        if not words:
            return [
                self._floats(builder, builder.add(codes, LONG(CHUNK // 4 * half)), table)
                for half, table in enumerate(tables)
            ]
        packed = read(builder, codes, ir.VectorType(BYTE, CHUNK // 2), 1)
        pairs = picked(builder, packed, packed, [number // 4 for number in range(2 * CHUNK)])
        index = builder.lshr(builder.bitcast(pairs, WORDS), WORDS([0, 4] * LANES))
        if self.scales == 2:  # the fifth bit says which table, else both are the same
            index = builder.and_(index, WORDS([15] * CHUNK))
            index = builder.or_(index, WORDS([0] * LANES + [16] * LANES))
        name = "llvm.x86.avx512.permvar.hi.512"
        function = external(builder, name, WORDS, [WORDS] * 2)
        return [builder.call(function, [bfloat16s(builder, *tables), index])]

    def _table(self, builder: Any, scale: Any) -> Any:
        table: Any = NUMBERS(list(self.entries))
        if self.zeros:
            table = builder.fsub(table, spread(builder, builder.add(scale, LONG(4 * SPAN))))
        return builder.fmul(table, spread(builder, scale))

    @staticmethod
    def _floats(builder: Any, codes: Any, table: Any) -> Any:
        packed = read(builder, codes, ir.VectorType(BYTE, LANES // 2), 1)
        pairs = picked(builder, packed, packed, [number // 8 for number in range(4 * LANES)])
        index = builder.lshr(builder.bitcast(pairs, INTEGERS), INTEGERS([0, 4] * (LANES // 2)))
        function = external(builder, "llvm.x86.avx512.permvar.sf.512", NUMBERS, [NUMBERS, INTEGERS])
        return builder.call(function, [table, index])

    def _of_bytes(self, builder: Any, codes: Any, scale: Any) -> list[Any]:
        factor = spread(builder, scale)
        if not self.small_float:
            kind = ir.VectorType(BYTE, LANES)
            halves = [read(builder, builder.add(codes, LONG(LANES * half)), kind, 1) for half in range(2)]
            numbers = [builder.sitofp(builder.sext(half, INTEGERS), NUMBERS) for half in halves]
            return [builder.fmul(number, factor) for number in numbers]
        # As float16 of the same bits, whose exponents are 8 less.
        factor = builder.fmul(factor, NUMBERS([256.0] * LANES))
        bits = builder.zext(read(builder, codes, ir.VectorType(BYTE, CHUNK), 1), WORDS)
        sign = builder.and_(builder.shl(bits, WORDS([8] * CHUNK)), WORDS([0x8000] * CHUNK))
        size = builder.and_(builder.shl(bits, WORDS([7] * CHUNK)), WORDS([0x3F80] * CHUNK))
        infinite = builder.icmp_unsigned("==", size, WORDS([0x3F80] * CHUNK))  # no number: all bits are set
        size = builder.select(infinite, WORDS([0x7F80] * CHUNK), size)
        small = builder.bitcast(builder.or_(sign, size), ir.VectorType(ir.HalfType(), CHUNK))
        numbers = []
        for half in range(2):
            some = picked(builder, small, small, range(LANES * half, LANES * half + LANES))
            numbers.append(builder.fmul(builder.fpext(some, NUMBERS), factor))
        return numbers


def block(codes_of: Codes) -> Any:
    """A function that writes chunks of some rows.

    It takes addresses and distances in bytes: of the first row's codes, and from one row to the next; of its
    scales; rows, chunks; where to write, from one row to the next, and from one chunk to the next. At last,
    an array of the type that is written: float32, or bfloat16 as its bits.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, size, scales, rows, chunks, to, far, apart, _ = arguments
        words = signature.args[-1].dtype is not types.float32

        def row(number: Any, _: list[Any]) -> list[Any]:
            codes_at = builder.add(codes, builder.mul(number, size))
            scales_at = builder.add(scales, builder.mul(number, LONG(4 * APART)))
            to_at = builder.add(to, builder.mul(number, far))

            def chunk(turn: Any, _: list[Any]) -> list[Any]:
                registers = codes_of.decoded(
                    builder,
                    builder.add(codes_at, builder.mul(turn, LONG(codes_of.bytes))),
                    builder.add(scales_at, builder.mul(turn, LONG(4 * codes_of.scales))),
                    words,
                )
                place = builder.add(to_at, builder.mul(turn, apart))
                for index, register in enumerate(registers):
                    write(builder, register, builder.add(place, LONG(64 * index)))
                return []

            return repeat(builder, chunks, [], chunk)

        repeat(builder, rows, [], row)
        return context.get_dummy_value()

    def typed(typing, codes, size, scales, rows, chunks, to, far, apart, kind):
        return types.void(*[types.int64] * 8, kind), build

    return intrinsic(typed)


STEP = 4
"""Chunks of a row that are decoded one after the other: of 4 bits, a line of memory."""

HIGH = 2 * TILE
"""Rows of two tiles, whose sums are kept meanwhile."""

SLOT = STEP * 2 * HIGH * CHUNK
"""Bytes of a step's weights of two tiles in bfloat16: chunk by chunk, row by row."""

TURNS = HIGH // STEP
"""Rows that are decoded for each chunk of the step before that is multiplied."""


def steps(codes_of: Codes) -> Any:
    """A function that decodes steps of two tiles' rows, all but the first, and multiplies all but the last.

    It takes addresses and distances in bytes: of the first row's codes, and from one row to the next; of its
    scales; steps, at least two; of two slots, the first of them full; of the inputs (`tiles.add_few`), and
    from one pair to the next; of what is to be asked for meanwhile.
    """
    asked = max(1, STEP * TURNS * codes_of.bytes // 64)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, size, scales, count, slots, inputs, wide, ahead = arguments
        add, mul = builder.add, builder.mul

        def step(before: Any, _: list[Any]) -> list[Any]:
            number = add(before, LONG(1))
            codes_at = add(codes, mul(number, LONG(STEP * codes_of.bytes)))
            scales_at = add(scales, mul(number, LONG(4 * STEP * codes_of.scales)))
            full = add(slots, mul(builder.and_(before, LONG(1)), LONG(SLOT)))
            to = add(slots, mul(builder.and_(number, LONG(1)), LONG(SLOT)))

            def turn(chunk: Any, _: list[Any]) -> list[Any]:
                line = add(ahead, mul(add(mul(before, LONG(STEP)), chunk), LONG(64 * asked)))
                for index in range(asked):
                    fetch(builder, add(line, LONG(64 * index)))
                first = mul(chunk, LONG(TURNS))
                for row in range(TURNS):
                    number = add(first, LONG(row))
                    codes_of_row = add(codes_at, mul(number, size))
                    scales_of_row = add(scales_at, mul(number, LONG(4 * APART)))
                    place = add(to, mul(number, LONG(2 * CHUNK)))
                    for part in range(STEP):
                        (register,) = codes_of.decoded(
                            builder,
                            add(codes_of_row, LONG(codes_of.bytes * part)),
                            add(scales_of_row, LONG(4 * codes_of.scales * part)),
                            words=True,
                        )
                        write(builder, register, add(place, LONG(2 * HIGH * CHUNK * part)))
                x = add(inputs, mul(mul(add(mul(before, LONG(STEP)), chunk), LONG(CHUNK // 2)), wide))
                weights = add(full, mul(chunk, LONG(2 * HIGH * CHUNK)))
                emit(builder, "tileloadd64", [7], [x, wide])
                for tile in range(2):
                    at = add(weights, LONG(2 * TILE * CHUNK * tile))
                    emit(builder, "tileloadd64", [4 + tile], [at, LONG(2 * CHUNK)])
                    emit(builder, "tdpbf16ps", [tile, 4 + tile, 7])
                return []

            return repeat(builder, LONG(STEP), [], turn)

        repeat(builder, builder.sub(count, LONG(1)), [], step)
        return context.get_dummy_value()

    def typed(typing, codes, size, scales, count, slots, inputs, wide, ahead):
        return types.void(*[types.int64] * 8), build

    return intrinsic(typed)


EVEN, E2M1 = tuple(map(float, range(-8, 8))), tuple(E2M1_VALUES.tolist())
KINDS = {
    "int8": Codes(),
    "fp8": Codes(small_float=True),
    "int4": Codes(EVEN),
    "int4_zeros": Codes(tuple(map(float, range(16))), zeros=True),
    "mxfp4": Codes(E2M1),
    "nvfp4": Codes(E2M1, scales=2),
}
block_int8, block_fp8, block_int4, block_zeros, block_mxfp4, block_nvfp4 = map(block, KINDS.values())
steps_int8, steps_fp8, steps_int4, steps_zeros, steps_mxfp4, steps_nvfp4 = map(steps, KINDS.values())


@njit(cache=True, nogil=True)
def decode(matrix, first, rows, k, chunks, scales, to, far, apart, kind):
    """As `decoding.decode_anywhere`."""
    code = matrix[CODE]
    at, size = row_of(matrix, matrix[DEPTH], first)
    at += size * k // matrix[DEPTH]
    if code == INT8:
        block_int8(at, size, scales, rows, chunks, to, far, apart, kind)
    elif code == FP8:
        block_fp8(at, size, scales, rows, chunks, to, far, apart, kind)
    elif code == INT4 and matrix[THIRD] == 0:
        block_int4(at, size, scales, rows, chunks, to, far, apart, kind)
    elif code == INT4:
        block_zeros(at, size, scales, rows, chunks, to, far, apart, kind)
    elif code == MXFP4:
        block_mxfp4(at, size, scales, rows, chunks, to, far, apart, kind)
    else:
        block_nvfp4(at, size, scales, rows, chunks, to, far, apart, kind)


@njit(cache=True, nogil=True)
def add_steps(matrix, first, k, count, scales, slots, inputs, wide, ahead):
    """Multiplies steps of `HIGH` rows from column `k` on, and decodes them: the last is still to be multiplied.

    Args:
        count: steps, at least two, the first of them decoded in the first slot.
        scales: address of their scales (`encodings.write_scales`).
        slots: address of two.
        inputs: address of up to 16 tokens' inputs for column `k` on, `wide` bytes from one pair to the next.
        ahead: address of what is read next.
    """
    code = matrix[CODE]
    at, size = row_of(matrix, matrix[DEPTH], first)
    at += size * k // matrix[DEPTH]
    if code == INT8:
        steps_int8(at, size, scales, count, slots, inputs, wide, ahead)
    elif code == FP8:
        steps_fp8(at, size, scales, count, slots, inputs, wide, ahead)
    elif code == INT4 and matrix[THIRD] == 0:
        steps_int4(at, size, scales, count, slots, inputs, wide, ahead)
    elif code == INT4:
        steps_zeros(at, size, scales, count, slots, inputs, wide, ahead)
    elif code == MXFP4:
        steps_mxfp4(at, size, scales, count, slots, inputs, wide, ahead)
    else:
        steps_nvfp4(at, size, scales, count, slots, inputs, wide, ahead)
