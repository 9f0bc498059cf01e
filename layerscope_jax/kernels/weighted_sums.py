"""Rows of a matrix, weighted and added up, for a few tokens: scores times values, of attention.

A matrix `[K, N]` is read some rows at a time, whole rows, in the order they lie in, and added to the sums of
all tokens, which stay in the cache (`vectors.py` has a step of it). A sum runs over the rows in one order.
"""

from __future__ import annotations

from layerscope_jax.kernels.vectors import COLUMNS, ROWS, adding
from layerscope_jax.support.njit import njit

BLOCK = 4096
"""Columns of a matrix whose sums are kept at once. Most rows whole: memory is fastest read in order."""

STRIDE = BLOCK + 16 * 17
"""Floats from one token's sums to the next one's. Were it a multiple of a page, or little more, CPUs would
take sums of two tokens for one another, and let one's reading wait for the other's writing."""

FAR = 4 * STRIDE

add1, add2, add4, add8 = (adding(tokens) for tokens in (1, 2, 4, 8))


@njit(cache=True, nogil=True, fastmath={"contract"})
def add_rest(x, weights, sums):
    """Adds `x @ weights` number by number."""
    for m in range(len(x)):
        for f in range(weights.shape[1]):
            total = sums[m, f]
            for j in range(len(weights)):
                total += x[m, j] * weights[j, f]
            sums[m, f] = total


@njit(cache=True, nogil=True, inline="always")
def add_rows(x, weights, high, first, last, sums):
    """Adds `x [M, :high] @ weights[:high, first:last]` to sums, whole rows after whole rows.

    `high` and `last - first` are multiples of `vectors.ROWS` and `COLUMNS`.
    """
    row, deep = weights.strides[0], x.strides[0]
    for k in range(0, high, ROWS):
        begin = weights.ctypes.data + row * k + 4 * first
        m, ahead = 0, ROWS * row
        while m < len(x):
            sums_at, inputs = sums.ctypes.data + FAR * m, x.ctypes.data + deep * m + 4 * k
            left = len(x) - m
            for c in range(0, last - first, COLUMNS):
                at, to = begin + 4 * c, sums_at + 4 * c
                if left >= 8:
                    add8(at, row, ahead, to, FAR, inputs, deep)
                elif left >= 4:
                    add4(at, row, ahead, to, FAR, inputs, deep)
                elif left >= 2:
                    add2(at, row, ahead, to, FAR, inputs, deep)
                else:
                    add1(at, row, ahead, to, FAR, inputs, deep)
            m += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
            ahead = 0


@njit(cache=True, nogil=True)
def add_product(x, weights, first, last, sums):
    """Adds `x [M, K] @ weights[:, first:last]` to `sums [M, STRIDE]`."""
    depth = x.shape[1]
    high, columns = depth - depth % ROWS, last - first
    wide = columns - columns % COLUMNS
    add_rows(x, weights, high, first, first + wide, sums)
    if high < depth:
        add_rest(x[:, high:], weights[high:, first : first + wide], sums[:, :wide])
    if wide < columns:  # all of x as a slice, the same kind of array as above: it compiles once
        add_rest(x[:, 0:], weights[:, first + wide : last], sums[:, wide:columns])
