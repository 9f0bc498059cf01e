"""Experts and products in bfloat16 by tiles of Intel's server CPUs (AMX), for any number of tokens.

Sums come by output and token (`tile_products.py`): activations are computed of all tokens at once, and woven
into the tiles of inputs of the next product. A token's result has the same bits in any company and thread.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray

from layerscope_jax.kernels.activations import SILU, gate_row
from layerscope_jax.kernels.loops import plain_bias
from layerscope_jax.kernels.numbers import pointer, rounded, taken, widened
from layerscope_jax.kernels.tile_activations import gate_all, gate_tile
from layerscope_jax.kernels.tile_products import FEW_ROWS, STAGED, product, row_of
from layerscope_jax.kernels.tiles import (
    DEPTH,
    TILE,
    available,
    columns,
    load_shapes,
    shape_tiles,
    store_shapes,
    weave,
    write_rows,
)
from layerscope_jax.support.njit import njit

PIECE = 256
"""Most tokens at a time, so that their sums stay in the cache."""


@functools.cache
def suit(dtype: np.dtype, width: int, hidden: int) -> bool:
    """Whether experts [width, hidden] can be computed here."""
    return dtype.name == "bfloat16" and width % DEPTH == 0 == hidden % DEPTH and available()


@functools.cache
def suit_products(dtype: np.dtype, depth: int, *widths: int) -> bool:
    """Whether products of inputs [..., depth] with matrices [width, depth] can be computed here."""
    whole = depth % DEPTH == 0 and not any(width % TILE for width in widths)
    return dtype.name == "bfloat16" and whole and available()


@njit(cache=True, nogil=True)
def rows_at_once(tokens):
    """Rows of a matrix whose sums stay in the cache."""
    return max(FEW_ROWS, (1 << 16) // columns(tokens) // FEW_ROWS * FEW_ROWS)


@njit(cache=True, nogil=True)
def scratch_parts(tokens, width, hidden):
    """Where in scratch: staged weights, inputs, inner activations, two blocks of sums, its end."""
    wide = columns(tokens)
    most = min(rows_at_once(tokens), max(width, hidden))
    inputs = 128 + STAGED
    inner = inputs + 2 * wide * width
    sums = inner + 2 * wide * hidden
    more = sums + 4 * wide * most
    return 128, inputs, inner, sums, more, more + 4 * wide * most


@njit(cache=True, nogil=True)
def scratch_bytes(firsts, lasts, width, hidden):
    """That `run_experts` needs for any of these experts."""
    size = 0
    for expert in range(len(firsts)):
        size = max(size, scratch_parts(lasts[expert] - firsts[expert], width, hidden)[5])
    return size


@njit(cache=True, nogil=True)
def add_bias(sums, bias, first):
    """Adds biases, from the first on, to rows of sums; nothing where there are none."""
    if len(bias) > 0:
        for n in range(len(sums)):
            number, row = widened(bias[first + n]), sums[n]
            for m in range(np.uint64(len(row))):
                row[m] += number


@njit(cache=True, nogil=True)
def activate(gates, ups, tokens, hidden, first, to, activation, limit, kind):
    """Gated numbers of some rows of sums [F, columns], woven into tiles of inputs.

    Args:
        first: the row of the whole that they begin with.
        to: address of the tiles.
        kind: an array of bfloat16, as its bits.
    """
    wide, row = min(tokens, TILE), gates.strides[0]
    if activation == SILU and tokens > TILE:
        for tile in range(0, gates.shape[1], TILE):
            begin, place = 4 * tile, to + 2 * tile * hidden + 2 * TILE * first
            gate_tile(gates.ctypes.data + begin, ups.ctypes.data + begin, row, len(gates) // 2, place)
        return
    if activation == SILU:  # whole registers: rows are a multiple of 32
        gate_all(gates.ctypes.data, ups.ctypes.data, gates.size // TILE)
    else:
        gate_row(gates.reshape(-1), ups.reshape(-1), gates.size, activation, limit)
    for tile in range(0, gates.shape[1], TILE):
        pairs = carray(pointer(to + 2 * tile * hidden + 2 * wide * first), (len(gates) // 2, wide), np.uint32)
        for f in range(np.uint64(len(pairs))):
            even, odd, pair = gates[2 * f], gates[2 * f + 1], pairs[f]
            for m in range(np.uint64(wide)):
                low, high = rounded(even[tile + m], kind), rounded(odd[tile + m], kind)
                pair[m] = np.uint32(low) | (np.uint32(high) << np.uint32(16))


def experts_by(matrix_of: Any, bias_of: Any, row_of: Any, product: Any) -> Any:
    """A compiled function that computes experts of bfloat16 activations, however their matrices are stored.

    Args:
        matrix_of, bias_of: compiled, as of `loops.experts_by`.
        row_of: compiled, as that of plain matrices.
        product: compiled, as that of plain matrices.
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
        """As that of `loops.experts_by`.

        Args:
            firsts, lasts: at most `PIECE` apart.
            scratch: address of `scratch_bytes` that no other thread uses, aligned to 64.
        """
        width = outputs.shape[1]
        read = carray(pointer(inputs), (len(outputs) // choices, width), outputs.dtype)
        store_shapes(scratch + 64)  # another user of tiles in this thread may count on theirs
        while True:
            expert = taken(counter)
            if expert >= len(firsts):
                break
            slots, arrays = order[firsts[expert] : lasts[expert]], addresses[expert]
            tokens = len(slots)
            wide, block = columns(tokens), rows_at_once(tokens)
            parts = scratch_parts(tokens, width, hidden)
            staged, x, y = scratch + parts[0], scratch + parts[1], scratch + parts[2]
            sums, more = scratch + parts[3], scratch + parts[4]
            gate, up = matrix_of(arrays, 0, hidden, width, kind), matrix_of(arrays, 1, hidden, width, kind)
            down, bias = matrix_of(arrays, 2, width, hidden, kind), bias_of(arrays, width, hidden, kind)
            shape_tiles(scratch, tokens)
            rows = np.empty(tokens, np.int64)
            for m in range(tokens):
                rows[m] = read[slots[m] // choices].ctypes.data
            weave(rows, tokens, width, x)
            for first in range(0, hidden, block):
                last = min(first + block, hidden)
                coming = row_of(gate, width, last)[0] if last < hidden else row_of(down, hidden, 0)[0]
                ahead = row_of(up, width, first)[0]
                product(x, width, gate, first, last, tokens, sums, staged, ahead, kind)
                product(x, width, up, first, last, tokens, more, staged, coming, kind)
                gates = carray(pointer(sums), (last - first, wide), np.float32)
                ups = carray(pointer(more), (last - first, wide), np.float32)
                add_bias(gates, bias, first)
                add_bias(ups, bias, hidden + first)
                activate(gates, ups, tokens, hidden, first, y, activation, limit, kind)
            for first in range(0, width, block):
                last = min(first + block, width)
                ahead = row_of(down, hidden, min(last, width - 1))[0]
                product(y, hidden, down, first, last, tokens, sums, staged, ahead, kind)
                totals = carray(pointer(sums), (last - first, wide), np.float32)
                add_bias(totals, bias, 2 * hidden + first)
                write_rows(totals, outputs, slots, first, last)
        load_shapes(scratch + 64)

    return run_experts


@njit(cache=True, nogil=True, inline="always")
def plain_address(addresses, which, rows, depth, kind):
    return addresses[which]


run_experts = experts_by(plain_address, plain_bias, row_of, product)


def products_by(matrix_of: Any, row_of: Any, product: Any) -> Any:
    """A compiled function of products with bfloat16 inputs, however the matrix is stored.

    Args:
        matrix_of: compiled: what is given of the weights -> the matrix.
        row_of, product: compiled, as of `experts_by`.
    """

    @njit(cache=True, nogil=True)
    def multiply(x, weights, outputs, first, last):
        """`x [M, K] @ weights [N, K]^T` into the columns `first` to `last` of `outputs`, all of bfloat16."""
        depth, matrix = x.shape[1], matrix_of(weights)
        piece, block = min(len(x), PIECE), rows_at_once(min(len(x), PIECE))
        wide, most = columns(piece), min(block, last - first)
        memory = np.empty(64 + 128 + STAGED + 2 * wide * depth + 4 * wide * most, np.uint8)
        scratch = (memory.ctypes.data + 63) // 64 * 64
        staged = scratch + 128
        inputs = staged + STAGED
        sums = inputs + 2 * wide * depth
        store_shapes(scratch + 64)
        for start in range(0, len(x), PIECE):
            tokens = min(PIECE, len(x) - start)
            shape_tiles(scratch, tokens)
            rows = np.arange(start, start + tokens)
            weave(x.ctypes.data + x.strides[0] * rows, tokens, depth, inputs)
            for begin in range(first, last, most):
                end = min(begin + most, last)
                ahead = row_of(matrix, depth, min(end, last - 1))[0]
                product(inputs, depth, matrix, begin, end, tokens, sums, staged, ahead, outputs)
                totals = carray(pointer(sums), (end - begin, columns(tokens)), np.float32)
                write_rows(totals, outputs, rows, begin, end)
        load_shapes(scratch + 64)
        memory[0] = 0  # kept until here

    return multiply


@njit(cache=True, nogil=True, inline="always")
def address_of(weights):
    return weights.ctypes.data


multiply = products_by(address_of, row_of, product)
