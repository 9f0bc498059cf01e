"""Experts and products on the CPU by compiled loops: each output is the dot product of a row of weights.

Weights lie as they are published, [out, in], and are read once, some rows at a time, in the order they lie in
(`dots.py`). How they are read follows from their own type, never from that of activations. A row of the
result has the same bits whatever other rows or experts are computed with it, and on whichever thread: its
sums run over the inputs in one fixed order.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from layerscope_jax.kernels.activations import activate, add_bias, biases
from layerscope_jax.kernels.dots import dot_products
from layerscope_jax.kernels.numbers import as_input, pointer, room, round_row, taken
from layerscope_jax.models.experts import BiasedWeights
from layerscope_jax.support.njit import njit

ARRAYS = len(BiasedWeights._fields)
"""Addresses of an expert: of gate, up, down and biases, 0 where it has none."""

PIECE = 128
"""Most rows of an expert at a time, so that they and their sums stay in the cache."""

BLOCK = 512
"""Outputs whose sums are kept at once."""

APART = BLOCK + 16 * 17
"""Floats from one token's sums to the next one's. Were it a multiple of a page, or little more, CPUs would
take sums of two tokens for one another, and let one's reading wait for the other's writing."""


@njit(cache=True, nogil=True)
def ffn(x, gate, up, down, bias, outputs, slots, activation, limit):
    """`(silu(x gate) * (x up)) down` of M rows, into the `slots` of `outputs`, or with another body.

    Args:
        gate, up: [F, D].
        down: [D, F].
        bias: [2 F + D] those of gate, up and down; [0] without.
        activation, limit: as of `activate`.
    """
    tokens, (hidden, width) = len(x), gate.shape
    inner = room(tokens, hidden, down)
    gates, ups = np.empty((tokens, APART), np.float32), np.empty((tokens, APART), np.float32)
    for first in range(0, hidden, BLOCK):
        last = min(first + BLOCK, hidden)
        dot_products(x, gate, first, last, gates)
        dot_products(x, up, first, last, ups)
        add_bias(gates, bias, first, last)
        add_bias(ups, bias, hidden + first, hidden + last)
        for m in range(tokens):
            activate(gates[m], ups[m], inner[m, first:last], outputs, down, activation, limit)
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        dot_products(inner, down, first, last, gates)
        add_bias(gates, bias, 2 * hidden + first, 2 * hidden + last)
        for m in range(tokens):
            round_row(gates[m], outputs[slots[m], first:last])


@njit(cache=True, nogil=True)
def multiply(x, weights, outputs, first, last):
    """`x [M, K]` times `weights [N, K]`, into columns `first` to `last` of `outputs`, of the type of `x`."""
    for start in range(0, len(x), PIECE):
        piece = room(min(PIECE, len(x) - start), x.shape[1], weights)
        for m in range(len(piece)):
            for k in range(np.uint64(x.shape[1])):
                piece[m, k] = as_input(x[start + m, k], weights)
        sums = np.empty((len(piece), APART), np.float32)
        for begin in range(first, last, BLOCK):
            end = min(begin + BLOCK, last)
            dot_products(piece, weights, begin, end, sums)
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
        kind: an array of the type of the weights, whatever it holds (`dots.py`).
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
        gate = carray(pointer(addresses[expert, 0]), (hidden, width), kind.dtype)
        up = carray(pointer(addresses[expert, 1]), (hidden, width), kind.dtype)
        down = carray(pointer(addresses[expert, 2]), (width, hidden), kind.dtype)
        bias = carray(pointer(addresses[expert, 3]), biases(addresses[expert, 3], width, hidden), kind.dtype)
        ffn(x, gate, up, down, bias, outputs, slots, activation, limit)
