"""Dot products of rows that lie number by number as they are summed: a tile of them at once, for LLVM.

`vectors` adds whole rows of a matrix to sums. Here a sum runs along the rows: each lane of a register has a
part of it, and the parts are added in one fixed order at the end, four sums in one go.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.vectors import LANES, LONG, NUMBERS, WIDE, add_product, read
from layerscope_jax.support.njit import njit

HIGH = 4
"""Rows of a tile."""

WIDTH = 4 if WIDE else 2
"""Inputs of a tile: as many as keep their sums, and a step of the rows, in registers."""

QUARTER = ir.VectorType(ir.FloatType(), 4)


@intrinsic
def dot_tile(typing: Any, rows: Any, row: Any, x: Any, depth: Any, steps: Any, outputs: Any, far: Any) -> Any:
    """Writes the products of `HIGH` rows with `WIDTH` inputs, over so many whole registers of each.

    Takes addresses and distances in bytes: of the first row, and from one to the next one; of the first
    input, and from one to the next one; registers; of the first product, and from one input's to the next
    one's. Those of one input with all rows lie side by side.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row, x, depth, steps, outputs, far = arguments
        moved = lambda base, distance, times: builder.add(base, builder.mul(distance, LONG(times)))  # noqa: E731
        rows_at = [moved(rows, row, number) for number in range(HIGH)]
        inputs_at = [moved(x, depth, number) for number in range(WIDTH)]

        def step(turn: Any, totals: list[Any]) -> list[Any]:
            at = builder.mul(turn, LONG(4 * LANES))
            numbers = [read(builder, builder.add(one, at), NUMBERS, 4) for one in rows_at]
            results = []
            for index, one in enumerate(inputs_at):
                value = read(builder, builder.add(one, at), NUMBERS, 4)
                results += [
                    add_product(builder, number, value, totals[HIGH * index + place])
                    for place, number in enumerate(numbers)
                ]
            return results

        nothing = ir.Constant(NUMBERS, [0.0] * LANES)
        totals = repeat(builder, steps, [nothing] * (HIGH * WIDTH), step)
        for index in range(WIDTH):
            place = builder.inttoptr(moved(outputs, far, index), QUARTER.as_pointer())
            builder.store(four_sums(builder, totals[HIGH * index :][:HIGH]), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), build


def four_sums(builder: Any, registers: list[Any]) -> Any:
    """The sums over the lanes of four registers, side by side."""

    def woven(first: Any, second: Any, orders: list[list[int]]) -> Any:
        """Lanes of both, side by side, of which the second order's are added to the first one's."""
        low, high = (
            [4 * quarter + lane for quarter in range(LANES // 4) for lane in order] for order in orders
        )
        return builder.fadd(picked(builder, first, second, low), picked(builder, first, second, high))

    # Of each quarter of two registers: lanes in turns, and halves; the second register's lanes come behind.
    turns = [[0, LANES, 1, LANES + 1], [2, LANES + 2, 3, LANES + 3]]
    halves = [[0, 1, LANES, LANES + 1], [2, 3, LANES + 2, LANES + 3]]
    first, second, third, fourth = registers
    total = woven(woven(first, second, turns), woven(third, fourth, turns), halves)
    lanes = LANES
    while lanes > 4:
        lanes //= 2
        low, high = (picked(builder, total, total, list(range(at, at + lanes))) for at in (0, lanes))
        total = builder.fadd(low, high)
    return total


def picked(builder: Any, first: Any, second: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.VectorType(ir.IntType(32), len(order))(order))


@njit(cache=True, nogil=True)
def dot_products(x, rows, first, last, outputs):
    """Products of inputs `x [M, K]` with `rows [P, K]` from `first` to `last`, into `[M, last - first]`.

    M is a multiple of `WIDTH`. A product has the same bits whichever others are computed with it.
    """
    depth, row, far = x.strides[0], rows.strides[0], outputs.strides[0]
    steps = x.shape[1] // LANES
    spare = np.zeros((WIDTH, HIGH), np.float32)
    count = last - first
    whole = count - count % HIGH
    for p in range(0, whole, HIGH):
        at, to = rows.ctypes.data + row * (first + p), outputs.ctypes.data + 4 * p
        for m in range(0, len(x), WIDTH):
            if steps > 0:
                dot_tile(at, row, x.ctypes.data + depth * m, depth, steps, to + far * m, far)
            else:
                for index in range(m, m + WIDTH):
                    for place in range(HIGH):
                        outputs[index, p + place] = 0
    for p in range(whole, count):  # the same row, as all of a tile
        for m in range(0, len(x), WIDTH):
            if steps > 0:
                at = rows.ctypes.data + row * (first + p)
                dot_tile(
                    at, np.int64(0), x.ctypes.data + depth * m, depth, steps, spare.ctypes.data, 4 * HIGH
                )
            for index in range(WIDTH):
                outputs[m + index, p] = spare[index, 0]
    for k in range(LANES * steps, x.shape[1]):
        for m in range(len(x)):
            for p in range(count):
                outputs[m, p] += x[m, k] * rows[first + p, k]
