"""Registers of 512 bits, for LLVM, which makes halves of them where a CPU has none so wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llvmlite import ir

from layerscope_jax.kernels.vectors import BYTE, INT, LONG, WORD, read
from layerscope_jax.support.target import features

FLOAT = ir.FloatType()
LANES = 16
NUMBERS, INTEGERS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
WORDS, LINE = ir.VectorType(WORD, 2 * LANES), ir.VectorType(BYTE, 4 * LANES)
EIGHT, EIGHT_INTEGERS = ir.VectorType(FLOAT, LANES // 2), ir.VectorType(INT, LANES // 2)
HALF, HALF_WORDS = ir.VectorType(BYTE, 2 * LANES), ir.VectorType(WORD, LANES)


def picked(builder: Any, first: Any, second: Any, order: Sequence[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.VectorType(INT, len(order))(list(order)))


def nearest(builder: Any, numbers: Any) -> Any:
    """The bits of 16 float32, of which those above the lowest 16 are the nearest bfloat16, ties to even."""
    bits = builder.bitcast(numbers, INTEGERS)
    odd = builder.and_(builder.lshr(bits, INTEGERS([16] * LANES)), INTEGERS([1] * LANES))
    return builder.add(builder.add(bits, INTEGERS([0x7FFF] * LANES)), odd)


def bfloat16s(builder: Any, low: Any, high: Any) -> Any:
    """Twice 16 float32 as 32 bfloat16, rounded to the nearest, ties to even.

    AVX512_BF16 takes numbers below 2 ** -126 for zero, which no product can tell.
    """
    if "avx512bf16" in features():
        # By its assembler name, as in `vectors.add_pairs`.
        function = ir.FunctionType(WORDS, [NUMBERS, NUMBERS])
        return builder.call(ir.InlineAsm(function, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v"), [low, high])

    def rounded(numbers: Any) -> Any:
        bits = builder.lshr(nearest(builder, numbers), INTEGERS([16] * LANES))
        return builder.trunc(bits, ir.VectorType(WORD, LANES))

    first, second = rounded(low), low is high or rounded(high)
    return picked(builder, first, first if low is high else second, range(2 * LANES))


def spread(builder: Any, number: Any) -> Any:
    """A float32 in 16 lanes."""
    nothing = ir.Constant(NUMBERS, ir.Undefined)
    value = builder.insert_element(nothing, number, INT(0))
    return picked(builder, value, nothing, [0] * LANES)


def interleaved(places: Iterable[int], size: int) -> list[int]:
    """Lanes of two registers of a size in turns, for `picked`."""
    return [place + size * which for place in places for which in (0, 1)]


def read_at(builder: Any, address: Any, index: Any, kind: Any, width: int) -> Any:
    """What lies at an index of an array of numbers of so many bytes."""
    return read(builder, builder.add(address, builder.mul(index, LONG(width))), kind, 1)


def write(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)
