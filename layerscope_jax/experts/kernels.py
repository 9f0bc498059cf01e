"""Experts on the CPU by compiled loops that read every weight once.

For a few rows in bfloat16 XLA's CPU products reach a third of the memory's speed. Here a matrix is
streamed row by row, four rows at a time, widened to float32 for up to four tokens at once, and added to sums
that stay in the cache. A row of the result has the same bits whatever other rows or experts are computed with
it, and on whichever thread: its sums run over the matrix in one fixed order, of multiply-adds rounded once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload

from layerscope_jax.njit import njit

BLOCK = 4096
"""Columns of a matrix whose sums are kept at once. Most rows whole: memory is fastest read in order."""

STRIDE = BLOCK + 16
"""Floats from one row of scratch to the next. A constant, so that the compiler sees that rows do not overlap
and computes many columns at once; no power of two, which would put all rows in the same cache lines."""

# Of an index that may be negative the compiler makes no loop over many columns at once.
ROW1, ROW2, ROW3 = np.uint64(STRIDE), np.uint64(2 * STRIDE), np.uint64(3 * STRIDE)


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer that `carray` takes."""

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def taken(typing: Any, counter: Any) -> Any:
    """The next number of a counter that threads share, given its address."""

    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), build


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def bits_of(typing: Any, number: Any) -> Any:
    """The bits of a float32."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


def widened(word):
    """A weight or input as float32; bfloat16 comes as its 16 bits."""


@overload(widened, inline="always")
def _widened(word):
    if word is types.uint16:
        return lambda word: float_of(np.uint32(word) << np.uint32(16))
    return lambda word: word


def rounded(number, kind):
    """A float32 to the nearest value of the type of the array `kind`, ties to even."""


@overload(rounded, inline="always")
def _rounded(number, kind):
    if kind.dtype is types.uint16:

        def nearest(number, kind):
            bits = bits_of(number)
            return np.uint16(
                (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )

        return nearest
    return lambda number, kind: number


# e^x = 2^n e^r with |r| <= ln 2 / 2, and a polynomial for e^r (as in Cephes' expf): the library's function is
# called number by number. ROUND's last bit counts ones.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND, LOWEST, HIGHEST, ONE = np.float32(1.5 * 2**23), np.float32(-87), np.float32(88), np.float32(1)
P0, P1, P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
P3, P4, P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


@njit(cache=True, nogil=True, fastmath={"contract"})
def silu(x):
    """`x / (1 + e^-x)` of a float32, in steps that the compiler takes for many numbers at once."""
    y = -x
    if y < LOWEST:
        y = LOWEST
    if y > HIGHEST:
        y = HIGHEST
    shifted = y * LOG2_E + ROUND
    n = shifted - ROUND
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    p = ((((P0 * r + P1) * r + P2) * r + P3) * r + P4) * r + P5
    power = float_of((bits_of(shifted) + np.uint32(127)) << np.uint32(23))
    return x / (ONE + (p * r * r + r + ONE) * power)


@njit(cache=True, nogil=True, fastmath={"contract"})
def add_to_one(x0, x1, x2, x3, w0, w1, w2, w3, sums, row):
    """Adds four rows of a matrix to the sums of one token, straight from memory."""
    start = np.uint64(row * STRIDE)
    for f in range(np.uint64(len(w0))):
        total = sums[start + f] + x0 * widened(w0[f])
        total = total + x1 * widened(w1[f])
        total = total + x2 * widened(w2[f])
        sums[start + f] = total + x3 * widened(w3[f])


@njit(cache=True, nogil=True, fastmath={"contract"})
def add_to_four(x, k, m, w0, w1, w2, w3, sums):
    """`add_to_one` for four tokens: each row is read and widened once for all."""
    a0, a1, a2, a3 = x[m, k], x[m, k + 1], x[m, k + 2], x[m, k + 3]
    b0, b1, b2, b3 = x[m + 1, k], x[m + 1, k + 1], x[m + 1, k + 2], x[m + 1, k + 3]
    c0, c1, c2, c3 = x[m + 2, k], x[m + 2, k + 1], x[m + 2, k + 2], x[m + 2, k + 3]
    d0, d1, d2, d3 = x[m + 3, k], x[m + 3, k + 1], x[m + 3, k + 2], x[m + 3, k + 3]
    start = np.uint64(m * STRIDE)
    for f in range(np.uint64(len(w0))):
        r0, r1, r2, r3 = widened(w0[f]), widened(w1[f]), widened(w2[f]), widened(w3[f])
        a = sums[start + f] + a0 * r0
        b = sums[start + ROW1 + f] + b0 * r0
        c = sums[start + ROW2 + f] + c0 * r0
        d = sums[start + ROW3 + f] + d0 * r0
        a, b, c, d = a + a1 * r1, b + b1 * r1, c + c1 * r1, d + d1 * r1
        a, b, c, d = a + a2 * r2, b + b2 * r2, c + c2 * r2, d + d2 * r2
        sums[start + f] = a + a3 * r3
        sums[start + ROW1 + f] = b + b3 * r3
        sums[start + ROW2 + f] = c + c3 * r3
        sums[start + ROW3 + f] = d + d3 * r3


@njit(cache=True, nogil=True, fastmath={"contract"})
def add_product(x, weights, first, last, sums):
    """Adds `x [M, K] @ weights[:, first:last]` to M rows of `sums`, `STRIDE` apart."""
    tokens, depth = x.shape
    width, four, fours = last - first, depth - depth % 4, tokens - tokens % 4
    for k in range(0, four, 4):
        w0, w1 = weights[k, first:last], weights[k + 1, first:last]
        w2, w3 = weights[k + 2, first:last], weights[k + 3, first:last]
        for m in range(0, fours, 4):
            add_to_four(x, k, m, w0, w1, w2, w3, sums)
        for m in range(fours, tokens):
            add_to_one(x[m, k], x[m, k + 1], x[m, k + 2], x[m, k + 3], w0, w1, w2, w3, sums, m)
    for k in range(four, depth):
        w0 = weights[k, first:last]
        for m in range(tokens):
            for f in range(width):
                sums[m * STRIDE + f] += x[m, k] * widened(w0[f])


@njit(cache=True, nogil=True)
def swiglu(x, gate, up, down, out):
    """`(silu(x gate) * (x up)) down` for x [M, D] float32 into out [M, D] float32."""
    tokens, width = x.shape
    hidden = gate.shape[1]
    inner = np.empty((tokens, hidden), np.float32)
    gates, ups = np.empty(tokens * STRIDE, np.float32), np.empty(tokens * STRIDE, np.float32)
    for first in range(0, hidden, BLOCK):
        last = min(first + BLOCK, hidden)
        for m in range(tokens):
            gates[m * STRIDE : m * STRIDE + last - first] = 0
            ups[m * STRIDE : m * STRIDE + last - first] = 0
        add_product(x, gate, first, last, gates)
        add_product(x, up, first, last, ups)
        for m in range(tokens):
            for f in range(last - first):
                value = silu(gates[m * STRIDE + f]) * ups[m * STRIDE + f]
                inner[m, first + f] = widened(rounded(value, gate))
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        for m in range(tokens):
            gates[m * STRIDE : m * STRIDE + last - first] = 0
        add_product(inner, down, first, last, gates)
        for m in range(tokens):
            out[m, first:last] = gates[m * STRIDE : m * STRIDE + last - first]


@njit(cache=True, nogil=True)
def run_experts(addresses, firsts, lasts, order, choices, inputs, hidden, outputs, counter):
    """Those of N experts that no other thread takes first.

    Args:
        addresses: [N, 3] of each expert's gate, up and down, of the type of `outputs`.
        firsts, lasts: [N] where each expert's slots begin and end in `order`.
        order: [A] slots `token * choices + choice`.
        choices: K.
        inputs: address of [T, D] of the type of `outputs`.
        hidden: F.
        outputs: [T * K + 1, D], bfloat16 as uint16, a row for each slot; those of these experts are written.
        counter: address of the number of experts taken so far.
    """
    width = outputs.shape[1]
    read = carray(pointer(inputs), (len(outputs) // choices, width), outputs.dtype)
    while True:
        expert = taken(counter)
        if expert >= len(firsts):
            break
        slots = order[firsts[expert] : lasts[expert]]
        x = np.empty((len(slots), width), np.float32)
        out = np.empty((len(slots), width), np.float32)
        for m in range(len(slots)):
            row = read[slots[m] // choices]
            for d in range(width):
                x[m, d] = widened(row[d])
        gate = carray(pointer(addresses[expert, 0]), (width, hidden), outputs.dtype)
        up = carray(pointer(addresses[expert, 1]), (width, hidden), outputs.dtype)
        down = carray(pointer(addresses[expert, 2]), (hidden, width), outputs.dtype)
        swiglu(x, gate, up, down, out)
        for m in range(len(slots)):
            row = outputs[slots[m]]
            for d in range(width):
                row[d] = rounded(out[m, d], outputs)
