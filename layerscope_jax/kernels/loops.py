"""Experts and products on the CPU by compiled loops: each output is the dot product of a row of weights.

Weights lie as they are published, [out, in], and are read once, some rows at a time, in the order they lie in
(`dots.py`). How they are read follows from their own type, never from that of activations. A row of the
result has the same bits whatever other rows or experts are computed with it, and on whichever thread: its
sums run over the inputs in one fixed order.
"""

from __future__ import annotations

from typing import Any

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


def products_by(dots: Any) -> Any:
    """A compiled function of products, however the matrix is stored.

    Args:
        dots: compiled, as `plain_dots`, of such matrices.
    """

    @njit(cache=True, nogil=True)
    def multiply(x, matrix, outputs, first, last, kind):
        """`x [M, K]` times `matrix [N, K]`, into columns `first` to `last` of `outputs`, of its type."""
        for start in range(0, len(x), PIECE):
            piece = room(min(PIECE, len(x) - start), x.shape[1], kind)
            for m in range(len(piece)):
                for k in range(np.uint64(x.shape[1])):
                    piece[m, k] = as_input(x[start + m, k], kind)
            sums = np.empty((len(piece), APART), np.float32)
            for begin in range(first, last, BLOCK):
                end = min(begin + BLOCK, last)
                dots(piece, matrix, begin, end, sums, kind)
                for m in range(len(piece)):
                    round_row(sums[m], outputs[start + m, begin:end])

    return multiply


@njit(cache=True, nogil=True)
def no_scratch(firsts, lasts, width, hidden):
    """Bytes of scratch that `run_experts` needs."""
    return 0


def experts_by(matrix_of: Any, bias_of: Any, dots: Any) -> Any:
    """A compiled function that computes experts, however their matrices are stored.

    Args:
        matrix_of: compiled: (addresses of an expert, which matrix, its N and K, kind) -> the matrix.
        bias_of: compiled: (addresses of an expert, D, F, kind) -> its biases [2 F + D], or [0].
        dots: compiled, as `plain_dots`, of such matrices.
    """

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
            addresses: [N, A] of each expert.
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
            slots, arrays = order[firsts[expert] : lasts[expert]], addresses[expert]
            tokens = len(slots)
            x, inner = room(tokens, width, kind), room(tokens, hidden, kind)
            for m in range(tokens):
                row = read[slots[m] // choices]
                for d in range(np.uint64(width)):
                    x[m, d] = as_input(row[d], kind)
            gate, up = matrix_of(arrays, 0, hidden, width, kind), matrix_of(arrays, 1, hidden, width, kind)
            down, bias = matrix_of(arrays, 2, width, hidden, kind), bias_of(arrays, width, hidden, kind)
            gates, ups = np.empty((tokens, APART), np.float32), np.empty((tokens, APART), np.float32)
            for first in range(0, hidden, BLOCK):
                last = min(first + BLOCK, hidden)
                dots(x, gate, first, last, gates, kind)
                dots(x, up, first, last, ups, kind)
                add_bias(gates, bias, first, last)
                add_bias(ups, bias, hidden + first, hidden + last)
                for m in range(tokens):
                    activate(gates[m], ups[m], inner[m, first:last], outputs, kind, activation, limit)
            for first in range(0, width, BLOCK):
                last = min(first + BLOCK, width)
                dots(inner, down, first, last, gates, kind)
                add_bias(gates, bias, 2 * hidden + first, 2 * hidden + last)
                for m in range(tokens):
                    round_row(gates[m], outputs[slots[m], first:last])

    return run_experts


@njit(cache=True, nogil=True, inline="always")
def plain_matrix(addresses, which, rows, depth, kind):
    return carray(pointer(addresses[which]), (rows, depth), kind.dtype)


@njit(cache=True, nogil=True, inline="always")
def plain_bias(addresses, width, hidden, kind):
    return carray(pointer(addresses[3]), biases(addresses[3], width, hidden), kind.dtype)


@njit(cache=True, nogil=True, inline="always")
def plain_dots(x, matrix, first, last, outputs, kind):
    """`dot_products` with a matrix `[N, K]` of the type of `kind`."""
    dot_products(x, matrix, first, last, outputs)


run_experts = experts_by(plain_matrix, plain_bias, plain_dots)
by_plain_dots = products_by(plain_dots)


@njit(cache=True, nogil=True)
def multiply(x, weights, outputs, first, last):
    """As that of `products_by`, of a matrix [N, K] of the type that it is read as."""
    by_plain_dots(x, weights, outputs, first, last, weights)
