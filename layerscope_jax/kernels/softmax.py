"""The softmax of a row of scores in float32, in registers: numbers that do not fill one come by themselves.

A row's bits depend on its scores alone, and on how many there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from layerscope_jax.kernels.numbers import (
    HIGHEST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    LOWEST,
    ONE,
    P0,
    P1,
    P2,
    P3,
    P4,
    P5,
    ROUND,
    exp,
    rounded,
    widened,
)
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.vectors import BITS, INT, LANES, LONG, NUMBERS, add_product, read
from layerscope_jax.support.njit import njit


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def weigh(scores, sink, kind):
    """Scores to their softmax, rounded to the type of `kind`.

    Args:
        sink: a score more that takes its share; minus infinity where there is none.
    """
    high, total = raised(scores, sink)
    total += exp(sink - high)  # of minus infinity less than changes a sum of 1 or more
    share = ONE / total  # dividing each would take as long as the exponentials
    for index in range(np.uint64(len(scores))):
        scores[index] = widened(rounded(scores[index] * share, kind))


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def raised(scores, high):
    """Scores to `e^(score - highest)`; the highest, no lower than `high`, and the sum of all."""
    begin, registers, total = scores.ctypes.data, len(scores) // LANES, np.float32(0)
    count, whole = np.uint64(len(scores)), np.uint64(registers * LANES)
    if registers > 0:
        high = max(high, highest(begin, registers))
    for index in range(whole, count):
        high = max(high, scores[index])
    if registers > 0:
        total = raise_all(begin, registers, high)
    for index in range(whole, count):
        scores[index] = exp(scores[index] - high)
        total += scores[index]
    return high, total


@intrinsic
def highest(typing: Any, begin: Any, registers: Any) -> Any:
    """The highest of some registers of numbers, given the address of the first; at least one."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, registers = arguments

        def step(turn: Any, values: list[Any]) -> list[Any]:
            at = builder.add(begin, builder.mul(turn, LONG(4 * LANES)))
            return [larger(builder, read(builder, at, NUMBERS, 4), values[0])]

        (value,) = repeat(builder, registers, [read(builder, begin, NUMBERS, 4)], step)
        return over_lanes(builder, larger, value)

    return types.float32(types.int64, types.int64), build


@intrinsic
def raise_all(typing: Any, begin: Any, registers: Any, high: Any) -> Any:
    """Numbers to `e^(number - high)`, in some registers from an address on, at least one; their sum."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, registers, high = arguments
        nothing = ir.Constant(NUMBERS, ir.Undefined)
        first = builder.insert_element(nothing, high, INT(0))
        highs = builder.shuffle_vector(first, nothing, ir.VectorType(INT, LANES)([0] * LANES))

        def step(turn: Any, values: list[Any]) -> list[Any]:
            at = builder.add(begin, builder.mul(turn, LONG(4 * LANES)))
            power = exp_of(builder, builder.fsub(read(builder, at, NUMBERS, 4), highs))
            builder.store(power, builder.inttoptr(at, NUMBERS.as_pointer()), align=4)
            return [builder.fadd(values[0], power)]

        (value,) = repeat(builder, registers, [everywhere(0)], step)
        return over_lanes(builder, lambda builder, *halves: builder.fadd(*halves), value)

    return types.float32(types.int64, types.int64, types.float32), build


def exp_of(builder: Any, x: Any) -> Any:
    """`numbers.exp` of a register."""
    for limit, sign in ((LOWEST, "<"), (HIGHEST, ">")):
        x = builder.select(builder.fcmp_ordered(sign, x, everywhere(limit)), everywhere(limit), x)
    shifted = add_product(builder, x, everywhere(LOG2_E), everywhere(ROUND))
    n = builder.fsub(shifted, everywhere(ROUND))
    for part in (LN2_HIGH, LN2_LOW):
        x = add_product(builder, n, everywhere(-part), x)
    p = everywhere(P0)
    for factor in (P1, P2, P3, P4, P5):
        p = add_product(builder, p, x, everywhere(factor))
    ones = builder.add(builder.bitcast(shifted, BITS), BITS([127] * LANES))
    power = builder.bitcast(builder.shl(ones, BITS([23] * LANES)), NUMBERS)
    rest = builder.fadd(add_product(builder, builder.fmul(p, x), x, x), everywhere(1))
    return builder.fmul(rest, power)


def everywhere(number: Any) -> Any:
    """A register with a number in all lanes."""
    return ir.Constant(NUMBERS, [float(number)] * LANES)


def larger(builder: Any, first: Any, second: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", first, second), first, second)


def over_lanes(builder: Any, combine: Any, value: Any) -> Any:
    """What the lanes of a register come to: halves combined with each other, until one is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        order = ir.VectorType(INT, lanes)
        halves = [
            builder.shuffle_vector(value, value, order(list(range(at, at + lanes)))) for at in (0, lanes)
        ]
        value = combine(builder, *halves)
    return builder.extract_element(value, INT(0))
