"""Packed weights as registers of AVX-512 or AVX2: 32 numbers of a row at a time, for LLVM.

Codes of 4 bits are looked up: 16 values, scaled and rounded as the format is defined
(`formats.encoding.Encoding`), in a register. For bfloat16 they come from a table of all scales
(`encodings.table_of`), for float32 they are computed for the numbers that share the scale. AVX2 looks up
bytes: there a table has the low bytes of its entries first, and then the high ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from llvmlite import ir

from layerscope_jax.formats.small_floats import E2M1_VALUES, E4M3_VALUES
from layerscope_jax.kernels.encodings import BYTES_APART, CHUNK, ENTRIES, MOST_POINT
from layerscope_jax.kernels.vectors import BYTE, INT, LONG, WORD, everywhere, external, read
from layerscope_jax.kernels.wide_registers import (
    EIGHT,
    EIGHT_INTEGERS,
    FLOAT,
    HALF,
    HALF_WORDS,
    INTEGERS,
    LANES,
    LINE,
    NUMBERS,
    WORDS,
    bfloat16s,
    interleaved,
    nearest,
    picked,
    read_at,
    spread,
    write,
)
from layerscope_jax.support.target import features

MAGNITUDES = 128
"""8-bit numbers without their signs."""

BYTES = 2 * MAGNITUDES
"""Of a table of them, in bfloat16."""

WITH_LEAST = BYTES + 64
"""Of a table of integers: behind it, what -128 stands for, which has no magnitude in it."""


def able() -> bool:
    """Whether numba may compile for this CPU what is used here."""
    return not BYTES_APART or {"avx2", "f16c"} <= features()


def tables() -> bool:
    """Whether 8-bit numbers can be looked up."""
    return not BYTES_APART and "avx512vbmi" in features()


class Rows(NamedTuple):
    """Where a matrix's rows lie: values of what is built.

    Attributes:
        codes, scales, points: addresses of the first row's; zero points are 0 where there are none.
        size: bytes from one row's codes to the next one's.
        along: scales of a row; of 8 bits, bytes from one row's scales, or tables, to the next one's.
        shared: chunks that share a scale, as a power of two.
        table: address of the matrix's table.
    """

    codes: Any
    scales: Any
    points: Any
    size: Any
    along: Any
    shared: Any
    table: Any

    def row(self, builder: Any, number: Any, width: int) -> Rows:
        """Returns those that begin with another row, of scales of so many bytes."""
        distance = builder.mul(number, self.along)
        return self._replace(
            codes=builder.add(self.codes, builder.mul(number, self.size)),
            scales=builder.add(self.scales, builder.mul(distance, LONG(width))),
            points=builder.add(self.points, distance),
        )


@dataclass(frozen=True)
class Codes:
    """What chunks are decoded from.

    Attributes:
        entries: what the 16 codes of 4 bits stand for, unscaled; none of 8 bits.
        scale: of which kind scales are: "float16", "bfloat16", "e8m0", "table" (of float32, for float32), or
            "" of 8 bits, float32.
        parts: scales of a chunk.
        zeros: whether there are zero points, which are taken off the entries.
        small_float: whether 8 bits are E4M3, not integers.
        looked_up: whether 8 bits are looked up in tables of what they stand for (`wide_decoding.prepare`).
    """

    entries: tuple[float, ...] = ()
    scale: str = ""
    parts: int = 1
    zeros: bool = False
    small_float: bool = False
    looked_up: bool = False

    @property
    def together(self) -> int:
        """Chunks that are decoded at once."""
        return 2 if self.looked_up else 1

    @property
    def bytes(self) -> int:
        """Of a chunk."""
        return CHUNK // 2 if self.entries else CHUNK

    @property
    def width(self) -> int:
        """Bytes of a scale; of 8 bits, 1, as `Rows.along` counts bytes."""
        return {"float16": 2, "bfloat16": 2}.get(self.scale, 1)

    def decoded(self, builder: Any, row: Rows, chunk: Any, words: bool) -> list[Any]:
        """Returns the 32 numbers of a chunk of a row, or of as many as are decoded `together`, as registers.

        Args:
            words: whether they are to be bfloat16, not float32.
        """
        codes = self._codes(builder, row, chunk)
        if self.looked_up:
            table = builder.mul(self._place(builder, row, chunk, 0), LONG(BYTES))
            return looked_up(builder, codes, builder.add(row.scales, table), not self.small_float)
        if not self.entries:
            place = self._place(builder, row, chunk, 0)
            factor = spread(builder, read_at(builder, row.scales, place, FLOAT, 4))
            numbers = self._of_bytes(builder, codes, factor)
            return [bfloat16s(builder, *numbers)] if words else numbers
        if not words:
            tables = [self._scaled(builder, row, chunk, part) for part in range(self.parts)] * 2
            return [
                self._floats(builder, builder.add(codes, LONG(CHUNK // 4 * half)), tables[half])
                for half in range(2)
            ]
        if BYTES_APART:
            return self._by_bytes(builder, row, chunk)
        packed = read(builder, codes, ir.VectorType(BYTE, CHUNK // 2), 1)
        pairs = picked(builder, packed, packed, [number // 4 for number in range(2 * CHUNK)])
        index = builder.lshr(builder.bitcast(pairs, WORDS), WORDS([0, 4] * LANES))
        tables = [self._tabled(builder, row, chunk, part) for part in range(self.parts)] * 2
        if self.parts == 2:  # the fifth bit says which table, else both are the same
            index = builder.and_(index, WORDS([15] * CHUNK))
            index = builder.or_(index, WORDS([0] * LANES + [16] * LANES))
        table = picked(builder, tables[0], tables[1], range(CHUNK))
        function = external(builder, "llvm.x86.avx512.permvar.hi.512", WORDS, [WORDS] * 2)
        return [builder.call(function, [table, index])]

    def _place(self, builder: Any, row: Rows, chunk: Any, part: int) -> Any:
        """Which of its row's scales a part of a chunk has."""
        if self.parts > 1:
            return builder.add(builder.mul(chunk, LONG(self.parts)), LONG(part))
        return builder.lshr(chunk, row.shared)

    def widened(self, builder: Any, row: Rows, chunk: Any) -> list[Any]:
        """Returns the same numbers rounded to bfloat16, as float32."""
        if not self.entries and not self.looked_up:
            factor = spread(
                builder, read_at(builder, row.scales, self._place(builder, row, chunk, 0), FLOAT, 4)
            )
            numbers = self._of_bytes(builder, self._codes(builder, row, chunk), factor)
            whole = INTEGERS([0xFFFF0000] * LANES)
            return [builder.bitcast(builder.and_(nearest(builder, some), whole), NUMBERS) for some in numbers]
        if self.parts == 1 and BYTES_APART:
            return self._by_bytes(builder, row, chunk, widened=True)
        results = []
        for words in self.decoded(builder, row, chunk, words=True):
            for first in range(0, CHUNK, LANES):
                some = picked(builder, words, words, range(first, first + LANES))
                bits = builder.shl(builder.zext(some, INTEGERS), INTEGERS([16] * LANES))
                results.append(builder.bitcast(bits, NUMBERS))
        return results

    def _codes(self, builder: Any, row: Rows, chunk: Any) -> Any:
        """Where a chunk's codes begin."""
        return builder.add(row.codes, builder.mul(chunk, LONG(self.bytes)))

    def _by_bytes(self, builder: Any, row: Rows, chunk: Any, widened: bool = False) -> list[Any]:
        """32 codes of 4 bits as bfloat16, whose bytes are looked up one after the other."""
        packed = read(builder, self._codes(builder, row, chunk), ir.VectorType(BYTE, CHUNK // 2), 1)
        if widened:  # numbers by fours in turns: each half of a register is woven by itself below
            order = [4 * four + byte for half in (0, 2) for four in range(4) for byte in (half, half + 1)]
            packed = picked(builder, packed, packed, order)
        fifteen, four = packed.type([15] * (CHUNK // 2)), packed.type([4] * (CHUNK // 2))
        low, high = builder.and_(packed, fifteen), builder.lshr(packed, four)
        index = picked(builder, low, high, interleaved(range(CHUNK // 2), CHUNK // 2))
        places = [self._entries(builder, row, chunk, part) for part in range(self.parts)]
        shuffled, found = external(builder, "llvm.x86.avx2.pshuf.b", HALF, [HALF] * 2), []
        for byte in range(2):
            begin = LONG(byte * ENTRIES * (1 + self.zeros))
            tables = [read(builder, builder.add(at, begin), packed.type, 1) for at in places] * 2
            table = picked(builder, tables[0], tables[1], range(CHUNK))
            found.append(builder.call(shuffled, [table, index]))
        low, high = found
        if not widened:
            return [builder.bitcast(picked(builder, low, high, interleaved(range(CHUNK), CHUNK)), WORDS)]
        results = []
        for first in (0, 8):
            eights = [*range(first, first + 8), *range(first + 16, first + 24)]
            words = builder.bitcast(picked(builder, low, high, interleaved(eights, CHUNK)), HALF_WORDS)
            nothing = HALF_WORDS([0] * LANES)
            for start in (0, 4):
                fours = [*range(start, start + 4), *range(start + 8, start + 12)]
                numbers = picked(builder, nothing, words, interleaved(fours, LANES))
                results.append(builder.bitcast(numbers, EIGHT))
        return results

    def _tabled(self, builder: Any, row: Rows, chunk: Any, part: int) -> Any:
        """16 bfloat16 of the matrix's table, which the codes of a part of a chunk stand for."""
        place = self._entries(builder, row, chunk, part)
        return read(builder, place, ir.VectorType(WORD, ENTRIES), 2)

    def _entries(self, builder: Any, row: Rows, chunk: Any, part: int) -> Any:
        """Where the entries of a part of a chunk begin in the matrix's table."""
        place = self._place(builder, row, chunk, part)
        code = read_at(builder, row.scales, place, ir.IntType(8 * self.width), self.width)
        offset = builder.mul(builder.zext(code, LONG), LONG(2 * ENTRIES * (1 + self.zeros)))
        if self.zeros:
            point = builder.zext(read_at(builder, row.points, place, BYTE, 1), LONG)
            size = LONG(1 if BYTES_APART else 2)
            offset = builder.add(offset, builder.mul(builder.sub(LONG(MOST_POINT), point), size))
        return builder.add(row.table, offset)

    def _scaled(self, builder: Any, row: Rows, chunk: Any, part: int) -> Any:
        """16 float32, which the codes of a part of a chunk stand for."""
        place = self._place(builder, row, chunk, part)
        if self.scale == "float16":
            scale = builder.fpext(read_at(builder, row.scales, place, ir.HalfType(), 2), FLOAT)
        elif self.scale == "bfloat16":
            bits = builder.zext(read_at(builder, row.scales, place, WORD, 2), INT)
            scale = builder.bitcast(builder.shl(bits, INT(16)), FLOAT)
        elif self.scale == "e8m0":  # of 0, 2 ** -127, which has leading zeros in its fraction
            bits = builder.shl(builder.zext(read_at(builder, row.scales, place, BYTE, 1), INT), INT(23))
            least = INT(0x00400000)
            bits = builder.select(builder.icmp_unsigned("<", bits, least), least, bits)
            scale = builder.bitcast(bits, FLOAT)
        else:
            code = builder.zext(read_at(builder, row.scales, place, BYTE, 1), LONG)
            scale = read_at(builder, row.table, code, FLOAT, 4)
        table: Any = NUMBERS(list(self.entries))
        if self.zeros:
            point = builder.uitofp(read_at(builder, row.points, place, BYTE, 1), FLOAT)
            table = builder.fsub(table, spread(builder, point))
        return builder.fmul(table, spread(builder, scale))

    @staticmethod
    def _floats(builder: Any, codes: Any, table: Any) -> Any:
        """16 codes of 4 bits, looked up."""
        packed = read(builder, codes, ir.VectorType(BYTE, LANES // 2), 1)
        pairs = picked(builder, packed, packed, [number // 8 for number in range(4 * LANES)])
        index = builder.lshr(builder.bitcast(pairs, INTEGERS), INTEGERS([0, 4] * (LANES // 2)))
        if not BYTES_APART:
            function = external(builder, "llvm.x86.avx512.permvar.sf.512", NUMBERS, [NUMBERS, INTEGERS])
            return builder.call(function, [table, index])
        function = external(builder, "llvm.x86.avx2.permps", EIGHT, [EIGHT, EIGHT_INTEGERS])
        halves = [picked(builder, table, table, range(first, first + 8)) for first in (0, 8)]
        numbers = []
        for first in (0, 8):  # of the index, three bits count in a half of the table, the fourth says which
            some = picked(builder, index, index, range(first, first + 8))
            low, high = (builder.call(function, [half, some]) for half in halves)
            eighth = builder.and_(some, EIGHT_INTEGERS([8] * 8))
            which = builder.icmp_unsigned("==", eighth, EIGHT_INTEGERS([0] * 8))
            numbers.append(builder.select(which, low, high))
        return picked(builder, numbers[0], numbers[1], range(LANES))

    def _of_bytes(self, builder: Any, codes: Any, factor: Any) -> list[Any]:
        if not self.small_float:
            kind = ir.VectorType(BYTE, LANES)
            halves = [read(builder, builder.add(codes, LONG(LANES * half)), kind, 1) for half in range(2)]
            numbers = [builder.sitofp(builder.sext(half, INTEGERS), NUMBERS) for half in halves]
            return [builder.fmul(number, factor) for number in numbers]
        # As float16 of the same bits, whose exponents are 8 less.
        factor = builder.fmul(factor, NUMBERS([256.0] * LANES))
        bits = builder.sext(read(builder, codes, ir.VectorType(BYTE, CHUNK), 1), WORDS)
        bits = builder.and_(builder.shl(bits, WORDS([7] * CHUNK)), WORDS([0xBF80] * CHUNK))
        size = builder.and_(bits, WORDS([0x3F80] * CHUNK))
        none = builder.sext(builder.icmp_unsigned("==", size, WORDS([0x3F80] * CHUNK)), WORDS)
        whole = builder.and_(none, WORDS([0x4000] * CHUNK))  # all bits of the exponent: no number
        bits = builder.or_(bits, whole)
        small = builder.bitcast(bits, ir.VectorType(ir.HalfType(), CHUNK))
        numbers = []
        for half in range(2):
            some = picked(builder, small, small, range(LANES * half, LANES * half + LANES))
            numbers.append(builder.fmul(builder.fpext(some, NUMBERS), factor))
        return numbers


def write_table(builder: Any, scale: Any, to: Any, integers: bool = False) -> None:
    """Writes what 8-bit numbers without a sign stand for with a scale: the low bytes, and the high ones.

    Args:
        scale: float32.
        to: address.
        integers: whether they are integers, not E4M3; then the two bytes of 128 follow, four times each.
    """
    factor, words = spread(builder, scale), []
    values = [*map(float, range(MAGNITUDES))] if integers else E4M3_VALUES[:MAGNITUDES].tolist()
    for first in range(0, MAGNITUDES, 2 * LANES):
        halves = [NUMBERS(values[at : at + LANES]) for at in (first, first + LANES)]
        both = bfloat16s(builder, *(builder.fmul(half, factor) for half in halves))
        words.append(builder.bitcast(both, LINE))
    for high in range(2):
        for pair in range(0, len(words), 2):
            some = picked(builder, words[pair], words[pair + 1], range(high, 4 * CHUNK, 2))
            write(builder, some, builder.add(to, LONG(MAGNITUDES * high + CHUNK * pair)))
    if integers:
        most = builder.fmul(factor, NUMBERS([float(MAGNITUDES)] * LANES))
        line = builder.bitcast(bfloat16s(builder, most, most), LINE)
        write(builder, picked(builder, line, line, [0] * 4 + [1] * 4), builder.add(to, LONG(BYTES)))


def looked_up(builder: Any, codes: Any, table: Any, integers: bool) -> list[Any]:
    """64 E4M3 numbers, or integers, as bfloat16, given the address of what `write_table` wrote."""
    # In the order in which bytes are woven below: 8 of each half in turns.
    eights = read(builder, codes, ir.VectorType(LONG, 8), 1)
    signed = builder.bitcast(picked(builder, eights, eights, [0, 4, 1, 5, 2, 6, 3, 7]), LINE)
    function = external(builder, "llvm.x86.avx512.vpermi2var.qi.512", LINE, [LINE] * 3)
    least, sizes = LINE([0x80] * 64), signed
    if integers:
        absolute = external(builder, "llvm.abs.v64i8", LINE, [LINE, ir.IntType(1)])
        sizes = builder.call(absolute, [signed, ir.IntType(1)(0)])
    low, high = (
        builder.call(
            function,
            [
                read(builder, builder.add(table, LONG(MAGNITUDES * part)), LINE, 1),
                sizes,  # of which the highest bit does not count
                read(builder, builder.add(table, LONG(MAGNITUDES * part + 64)), LINE, 1),
            ],
        )
        for part in range(2)
    )
    if integers:
        is_least = builder.icmp_signed("==", signed, least)
        places = (builder.add(table, LONG(BYTES + 4 * part)) for part in range(2))
        instead = (
            builder.bitcast(everywhere(builder, at), LINE) for at in places
        )  # four bytes, over and over
        low, high = (
            builder.select(is_least, other, one) for one, other in zip((low, high), instead, strict=True)
        )
    high = builder.xor(high, builder.and_(signed, least))
    begins = (0, 16, 32, 48)
    orders = [
        [begin + at + which for begin in begins for at in range(first, first + 8) for which in (0, 64)]
        for first in (0, 8)
    ]
    return [builder.bitcast(picked(builder, low, high, order), WORDS) for order in orders]


EVEN, WHOLE = tuple(map(float, range(-8, 8))), tuple(map(float, range(16)))
KINDS = (
    Codes(),
    Codes(small_float=True),
    Codes(EVEN, "float16"),
    Codes(EVEN, "bfloat16"),
    Codes(WHOLE, "float16", zeros=True),
    Codes(WHOLE, "bfloat16", zeros=True),
    Codes(tuple(E2M1_VALUES.tolist()), "e8m0"),
    Codes(tuple(E2M1_VALUES.tolist()), "table", parts=2),
    Codes(small_float=True, looked_up=tables()),
    Codes(looked_up=tables()),
)
"""Of int8, fp8, int4 with scales in float16 and bfloat16, the same two with zero points, mxfp4 and nvfp4; fp8
and int8 by tables."""
