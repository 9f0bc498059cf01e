"""Experts and products on the CPU by compiled loops that read every weight once, in the order it lies in.

A matrix is streamed some rows at a time, whole rows, and added to the sums of all tokens, which stay in the
cache (`vectors.py` has one step of it, and says how weights are multiplied); for many tokens panel by panel
(`panels.py`). How weights are read follows from their own type, never from that of activations. A row of the
result has the same bits whatever other rows or experts are computed with it, and on whichever thread: its
sums run over the matrix in one fixed order.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from layerscope_jax.kernels.activations import activate, add_bias, biases
from layerscope_jax.kernels.numbers import as_input, pointer, room, round_row, taken, widened
from layerscope_jax.kernels.panels import ffn_of_many, multiply_many
from layerscope_jax.kernels.strips import MANY
from layerscope_jax.kernels.vectors import COLUMNS, ROWS, adding
from layerscope_jax.models.experts import BiasedWeights
from layerscope_jax.support.njit import njit

ARRAYS = len(BiasedWeights._fields)
"""Addresses of an expert: of gate, up, down and biases, 0 where it has none."""

PIECE = 128
"""Most rows of an expert at a time, so that their sums stay in the cache."""

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
                total += widened(x[m, j]) * widened(weights[j, f])
            sums[m, f] = total


@njit(cache=True, nogil=True)
def are_many(tokens, depth, columns):
    """Whether a product is one for `panels`: many tokens, and a matrix without a rest."""
    return tokens >= MANY and depth % ROWS == 0 and columns % COLUMNS == 0


@njit(cache=True, nogil=True, inline="always")
def add_rows(x, weights, high, first, last, sums):
    """Adds `x [M, :high] @ weights[:high, first:last]` to sums, whole rows after whole rows.

    `high` and `last - first` are multiples of `vectors.ROWS` and `COLUMNS`.
    """
    row, deep = weights.strides[0], x.strides[0]
    for k in range(0, high, ROWS):
        begin = weights.ctypes.data + row * k + weights.itemsize * first
        m, ahead = 0, ROWS * row
        while m < len(x):
            sums_at, inputs = sums.ctypes.data + FAR * m, x.ctypes.data + deep * m + x.itemsize * k
            left = len(x) - m
            for c in range(0, last - first, COLUMNS):
                at, to = begin + weights.itemsize * c, sums_at + 4 * c
                if left >= 8:
                    add8(at, row, ahead, to, FAR, inputs, deep, weights)
                elif left >= 4:
                    add4(at, row, ahead, to, FAR, inputs, deep, weights)
                elif left >= 2:
                    add2(at, row, ahead, to, FAR, inputs, deep, weights)
                else:
                    add1(at, row, ahead, to, FAR, inputs, deep, weights)
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


@njit(cache=True, nogil=True, inline="always")
def ffn(x, gate, up, down, bias, outputs, slots, activation, limit):
    """`(silu(x gate) * (x up)) down` of M rows, into the `slots` of `outputs`, or with another body.

    Args:
        bias: [2 F + D] those of gate, up and down; [0] without.
        activation, limit: as of `activate`.
    """
    tokens, width = x.shape
    hidden = gate.shape[1]
    if are_many(tokens, width, hidden) and are_many(tokens, hidden, width):
        ffn_of_many(x, gate, up, down, bias, outputs, slots, activation, limit)
        return
    inner = room(tokens, hidden, down)
    gates, ups = np.empty((tokens, STRIDE), np.float32), np.empty((tokens, STRIDE), np.float32)
    for first in range(0, hidden, BLOCK):
        last = min(first + BLOCK, hidden)
        gates[:, : last - first] = 0
        ups[:, : last - first] = 0
        add_product(x, gate, first, last, gates)
        add_product(x, up, first, last, ups)
        add_bias(gates, bias, first, last)
        add_bias(ups, bias, hidden + first, hidden + last)
        for m in range(tokens):
            activate(gates[m], ups[m], inner[m, first:last], outputs, down, activation, limit)
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        gates[:, : last - first] = 0
        add_product(inner, down, first, last, gates)
        add_bias(gates, bias, 2 * hidden + first, 2 * hidden + last)
        for m in range(tokens):
            round_row(gates[m], outputs[slots[m], first:last])


@njit(cache=True, nogil=True)
def multiply(x, weights, outputs, first, last):
    """`x [M, K] @ weights [K, N]` into the columns `first` to `last` of `outputs`, of the type of `x`."""
    for start in range(0, len(x), PIECE):
        piece = room(min(PIECE, len(x) - start), x.shape[1], weights)
        for m in range(len(piece)):
            for k in range(np.uint64(x.shape[1])):
                piece[m, k] = as_input(x[start + m, k], weights)
        if are_many(len(piece), x.shape[1], last - first):
            multiply_many(piece, weights, outputs, start, first, last)
            continue
        sums = np.empty((len(piece), STRIDE), np.float32)
        for begin in range(first, last, BLOCK):
            end = min(begin + BLOCK, last)
            sums[:, : end - begin] = 0
            add_product(piece, weights, begin, end, sums)
            for m in range(len(piece)):
                round_row(sums[m], outputs[start + m, begin:end])


@njit(cache=True, nogil=True)
def no_scratch(firsts, lasts, width, hidden):
    """Bytes of scratch that `run_experts` needs."""
    return 0


@njit(cache=True, nogil=True)
def run_experts(
    addresses,
    firsts,
    lasts,
    order,
    choices,
    inputs,
    hidden,
    activation,
    limit,
    outputs,
    kind,
    counter,
    scratch,
):
    """Computes those of N experts that no other thread takes first.

    Args:
        addresses: [N, ARRAYS] of each expert.
        firsts, lasts: [N] where each expert's slots begin and end in `order`.
        order: [A] slots `token * choices + choice`.
        choices: K.
        inputs: address of [T, D] of the type of `outputs`.
        hidden: F.
        activation, limit: of the experts' body (`activations.facts_of`).
        outputs: [T * K + 1, D], a row for each slot; those of these experts are written.
        kind: an array of the type of the weights, whatever it holds (`vectors.py`).
        counter: address of the number of experts taken so far.
        scratch: address of scratch, of which none is needed here.
    """
    width = outputs.shape[1]
    read = carray(pointer(inputs), (len(outputs) // choices, width), outputs.dtype)
    while True:
        expert = taken(counter)
        if expert >= len(firsts):
            break
        slots = order[firsts[expert] : lasts[expert]]
        x = room(len(slots), width, kind)
        for m in range(len(slots)):
            row = read[slots[m] // choices]
            for d in range(np.uint64(width)):
                x[m, d] = as_input(row[d], kind)
        gate = carray(pointer(addresses[expert, 0]), (width, hidden), kind.dtype)
        up = carray(pointer(addresses[expert, 1]), (width, hidden), kind.dtype)
        down = carray(pointer(addresses[expert, 2]), (hidden, width), kind.dtype)
        bias = carray(pointer(addresses[expert, 3]), biases(addresses[expert, 3], width, hidden), kind.dtype)
        ffn(x, gate, up, down, bias, outputs, slots, activation, limit)
