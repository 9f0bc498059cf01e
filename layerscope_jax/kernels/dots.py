"""Dot products of inputs with rows of weights, which lie number by number as they are summed: for LLVM.

Each lane of a register has a part of a sum; the parts are added in one fixed order at the end, four sums in
one go. Long rows are summed `DEEP` numbers at a time. How weights are multiplied is a kind, told by the type
of their array:

- float32: multiplied and added, rounded once.
- uint16: bfloat16, widened to float32 first.
- int16: bfloat16 too, by `VDPBF16PS` (AVX512_BF16): each lane gets the products of two neighbouring inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from layerscope_jax.kernels.numbers import widened
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.vectors import (
    BITS,
    LANES,
    LONG,
    NUMBERS,
    WIDE,
    WORD,
    add_pairs,
    add_product,
    fetch,
    read,
)
from layerscope_jax.support.njit import njit

HIGH = 4
"""Rows of a tile."""

DEEP = 1024
"""Numbers of a row that are summed at once: those of four rows stay in the nearest cache."""

LINE = 64
"""Bytes that caches fetch at once."""

QUARTER = ir.VectorType(ir.FloatType(), 4)


def numbers_of_step(kind: Any) -> int:
    """Numbers of a row that are multiplied in one step."""
    return 2 * LANES if kind is types.int16 else LANES


def step_of(weights: Any) -> Any:
    """`numbers_of_step` inside compiled functions, of an array of weights."""


@overload(step_of)
def _step_of(weights):
    step = numbers_of_step(weights.dtype)
    return lambda weights: step


def weights_at(builder: Any, kind: Any, address: Any) -> Any:
    """A register of weights, as they are multiplied."""
    if kind is types.int16:
        return read(builder, address, BITS, 2)
    if kind is types.uint16:
        words = read(builder, address, ir.VectorType(WORD, LANES), 2)
        return builder.bitcast(builder.shl(builder.zext(words, BITS), BITS([16] * LANES)), NUMBERS)
    return read(builder, address, NUMBERS, 4)


def tile(inputs: int, asking: int = 0) -> Callable:
    """A function that adds the products of `HIGH` rows with so many inputs to what lies where they go.

    It takes addresses and distances in bytes: of the first row, and from one to the next one; of the first
    input, and from one to the next one; steps; of the first product, and from one input's to the next one's;
    of what is to be asked for meanwhile. At last, an array of the kind of the weights. The products of an
    input with all rows lie side by side.

    Args:
        inputs: of a tile.
        asking: tiles that ask for what comes next, each for its part of it; 0 to ask for nothing.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row, x, depth, steps, outputs, far, coming, _ = arguments
        kind = signature.args[-1].dtype
        pairs, count = kind is types.int16, numbers_of_step(kind)
        add = add_pairs if pairs else add_product
        size = count * kind.bitwidth // 8  # bytes of a row that a step reads
        moved = lambda base, distance, times: builder.add(base, builder.mul(distance, LONG(times)))  # noqa: E731
        rows_at = [moved(rows, row, number) for number in range(HIGH)]
        inputs_at = [moved(x, depth, number) for number in range(inputs)]

        def step(turn: Any, totals: list[Any]) -> list[Any]:
            at, x_at = builder.mul(turn, LONG(size)), builder.mul(turn, LONG(4 * LANES))
            if asking:
                part = HIGH * size // asking
                line = builder.add(coming, builder.mul(turn, LONG(part)))
                for number in range(max(1, part // LINE)):
                    fetch(builder, builder.add(line, LONG(LINE * number)))
            numbers = [weights_at(builder, kind, builder.add(begin, at)) for begin in rows_at]
            results = []
            for index, begin in enumerate(inputs_at):
                value = read(builder, builder.add(begin, x_at), BITS if pairs else NUMBERS, 2 if pairs else 4)
                sums = totals[HIGH * index :][:HIGH]
                results += [add(builder, *each) for each in zip(numbers, [value] * HIGH, sums, strict=True)]
            return results

        nothing = ir.Constant(NUMBERS, [0.0] * LANES)
        totals = repeat(builder, steps, [nothing] * (HIGH * inputs), step)
        for index in range(inputs):
            place = builder.inttoptr(moved(outputs, far, index), QUARTER.as_pointer())
            sums = four_sums(builder, totals[HIGH * index :][:HIGH])
            builder.store(builder.fadd(builder.load(place, align=4), sums), place, align=4)
        return context.get_dummy_value()

    def typed(typing, rows, row, x, depth, steps, outputs, far, coming, kind):
        return types.void(*[types.int64] * 8, kind), build

    return intrinsic(typed)


MOST = 6 if WIDE else 2
"""Inputs of the largest tile: as many as keep their sums, and a step of the rows, in registers."""

tile1, tile2, tile4, tile6 = (tile(min(inputs, MOST)) for inputs in (1, 2, 4, 6))
first1, first2, first4, first6 = (tile(min(inputs, MOST), asking=1) for inputs in (1, 2, 4, 6))
half6, quarter6 = (tile(MOST, asking) for asking in (2, 4))


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
def add_tiles(rows, row, x, steps, outputs, coming, kind):
    """Adds the products of `HIGH` rows of weights, from an address on, with all inputs `x [M, ...]`.

    What is read next is asked for by as many tiles as there are, up to four: a core has few places for lines
    that are on the way, and waits where more are asked for.

    Args:
        outputs: [M, ...] of each input, the products with these rows first.
        coming: address of what is read next; 0 to ask for nothing.
    """
    depth, far, m = x.strides[0], outputs.strides[0], 0
    if MOST == 6 and coming and len(x) >= 12:
        asking = 4 if len(x) >= 24 else 2
        part = HIGH * steps * step_of(kind) * kind.itemsize // asking
        for number in range(asking):
            begin, to = x.ctypes.data + depth * m, outputs.ctypes.data + far * m
            if asking == 4:
                quarter6(rows, row, begin, depth, steps, to, far, coming + part * number, kind)
            else:
                half6(rows, row, begin, depth, steps, to, far, coming + part * number, kind)
            m += 6
    while m < len(x):
        begin, to, left = x.ctypes.data + depth * m, outputs.ctypes.data + far * m, len(x) - m
        if left >= 6 and MOST == 6:
            if m == 0 and coming:
                first6(rows, row, begin, depth, steps, to, far, coming, kind)
            else:
                tile6(rows, row, begin, depth, steps, to, far, coming, kind)
            m += 6
        elif left >= 4 and MOST == 6:
            if m == 0 and coming:
                first4(rows, row, begin, depth, steps, to, far, coming, kind)
            else:
                tile4(rows, row, begin, depth, steps, to, far, coming, kind)
            m += 4
        elif left >= 2:
            if m == 0 and coming:
                first2(rows, row, begin, depth, steps, to, far, coming, kind)
            else:
                tile2(rows, row, begin, depth, steps, to, far, coming, kind)
            m += 2
        else:
            if m == 0 and coming:
                first1(rows, row, begin, depth, steps, to, far, coming, kind)
            else:
                tile1(rows, row, begin, depth, steps, to, far, coming, kind)
            m += 1


@njit(cache=True, nogil=True)
def dot_products(x, rows, first, last, outputs):
    """Products of inputs `x [M, K ...]` with `rows [P, K]` from `first` to `last`, into `outputs [M, ...]`.

    A product has the same bits whichever others are computed with it.

    Args:
        x: float32, or bfloat16 as its bits for `rows` of int16.
        outputs: float32; of each input the first `last - first` numbers are overwritten.
    """
    row, step, size, depth = rows.strides[0], step_of(rows), rows.itemsize, rows.shape[1]
    steps = depth // step
    spare = np.empty((len(x), HIGH), np.float32)
    count = last - first
    whole = count - count % HIGH
    outputs[:, :count] = 0
    for p in range(0, whole, HIGH):
        at = rows.ctypes.data + row * (first + p)
        for k in range(0, steps * step, DEEP):
            begin, part = size * k, min(DEEP // step, steps - k // step)
            add_tiles(at + begin, row, x[:, k:], part, outputs[:, p:], at + HIGH * (row + begin), rows)
    for p in range(whole, count):  # the same row, as all of a tile
        at = rows.ctypes.data + row * (first + p)
        spare[:] = 0
        for k in range(0, steps * step, DEEP):
            begin, part = at + size * k, min(DEEP // step, steps - k // step)
            add_tiles(begin, np.int64(0), x[:, k:], part, spare, begin, rows)
        outputs[:, p] = spare[:, 0]
    for k in range(steps * step, depth):
        for m in range(len(x)):
            for p in range(count):
                outputs[m, p] += widened(x[m, k]) * widened(rows[first + p, k])
