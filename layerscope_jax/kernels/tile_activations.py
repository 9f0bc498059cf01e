"""SiLU of sums of tiles, times the other sums, in registers of AVX-512, and woven into tiles of inputs.

What is multiplied by tiles is bfloat16: so `1 / (1 + e^-x)` is the CPU's estimate of a quotient, one step of
Newton's better, which takes a third of the time of dividing.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from layerscope_jax.kernels.numbers import LOG2_E, ROUND
from layerscope_jax.kernels.softmax import everywhere
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.vectors import LONG, WORD, add_product, external, read
from layerscope_jax.kernels.wide_registers import (
    INTEGERS,
    LANES,
    NUMBERS,
    bfloat16s,
    interleaved,
    picked,
    write,
)

POWERS = (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
"""Of 2^r with |r| <= 1/2, highest first: those of its series, as of e^(r ln 2)."""

FARTHEST = 126.0
"""Exponents beyond are taken for it: of a sum below -87 is left what it is over 2^126."""

LEAST = 2.0**-126
"""What is smaller is zero where two registers become bfloat16 (`bfloat16s`), and so it is for few tokens."""


def gated(builder: Any, gate: Any, up: Any) -> Any:
    """A register of `silu(gate) * up`."""
    power = builder.fmul(gate, everywhere(-LOG2_E))
    for name, limit in (("minnum", FARTHEST), ("maxnum", -FARTHEST)):
        function = external(builder, f"llvm.{name}.v16f32", NUMBERS, [NUMBERS] * 2)
        power = builder.call(function, [power, everywhere(limit)])
    shifted = builder.fadd(power, everywhere(ROUND))  # whose last bit counts ones
    rest = builder.fsub(power, builder.fsub(shifted, everywhere(ROUND)))
    value = everywhere(POWERS[0])
    for factor in POWERS[1:]:
        value = add_product(builder, value, rest, everywhere(factor))
    exponent = builder.add(builder.bitcast(shifted, INTEGERS), INTEGERS([127] * LANES))
    whole = builder.bitcast(builder.shl(exponent, INTEGERS([23] * LANES)), NUMBERS)
    total = add_product(builder, value, whole, everywhere(1))
    estimate = external(builder, "llvm.x86.avx512.rcp14.ps.512", NUMBERS, [NUMBERS, NUMBERS, WORD])
    near = builder.call(estimate, [total, everywhere(0), WORD(-1)])
    error = add_product(builder, builder.fneg(total), near, everywhere(2))
    return builder.fmul(builder.fmul(gate, builder.fmul(near, error)), up)


@intrinsic
def gate_all(typing: Any, gates: Any, ups: Any, registers: Any) -> Any:
    """Puts `silu(gate) * up` in the place of some registers of gates, at least one, given addresses."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        gates, ups, registers = arguments

        def step(turn: Any, _: list[Any]) -> list[Any]:
            distance = builder.mul(turn, LONG(4 * LANES))
            places = [builder.add(begin, distance) for begin in (gates, ups)]
            value = gated(builder, *(read(builder, at, NUMBERS, 4) for at in places))
            size = builder.call(external(builder, "llvm.fabs.v16f32", NUMBERS, [NUMBERS]), [value])
            small = builder.fcmp_ordered("<", size, everywhere(LEAST))
            nothing = builder.fmul(value, everywhere(0))  # of the same sign
            write(builder, builder.select(small, nothing, value), places[0])
            return []

        repeat(builder, registers, [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), build


@intrinsic
def gate_tile(typing: Any, gates: Any, ups: Any, row: Any, pairs: Any, to: Any) -> Any:
    """Writes `silu(gate) * up` of 16 tokens as a tile of inputs: of each pair of rows a line.

    Takes the addresses of the first row of gates and of ups; bytes from one row to the next; pairs of rows,
    at least one; where to write.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        gates, ups, row, pairs, to = arguments

        def step(turn: Any, _: list[Any]) -> list[Any]:
            distance = builder.mul(turn, builder.mul(row, LONG(2)))
            numbers = []
            for far in (distance, builder.add(distance, row)):
                parts = (read(builder, builder.add(begin, far), NUMBERS, 4) for begin in (gates, ups))
                numbers.append(gated(builder, *parts))
            words = bfloat16s(builder, *numbers)
            line = picked(builder, words, words, interleaved(range(LANES), LANES))
            write(builder, line, builder.add(to, builder.mul(turn, LONG(4 * LANES))))
            return []

        repeat(builder, pairs, [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build
