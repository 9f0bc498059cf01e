"""The sum over a token's experts inside a jitted program, by a loop of our own.

XLA computes such a sum anew wherever it is read, together with what is done there, and so may round it
otherwise in one program than in another. What lies between two calls of ours is the same in all programs that
go through a layer: so a whole step in one program has the bits of one layer a program.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from numba import carray, types

from layerscope_jax.kernels import crew
from layerscope_jax.kernels.foreign import (
    ARGUMENTS,
    ARGUMENTS_NUMBER,
    FLOAT32,
    NUMBER,
    RANK,
    RESULTS,
    SIZES,
    TYPE,
    buffer,
    int_at,
    is_of,
    long_at,
    target,
)
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.numbers import pointer, rounded, taken, widened
from layerscope_jax.models import experts as compute
from layerscope_jax.support.njit import cfunc, njit

# Of a job of sums (`crew`): INPUTS are hidden states, WEIGHTS those of the router, ROWS are T, DEPTH is D.
EXPERTS, CHOICES = range(9, 11)

PIECE = 64
"""Tokens that a thread takes at a time."""


@njit(cache=True, nogil=True, fastmath={"contract"})
def add_choices(hidden, rows, weights, sums, outputs):
    """Adds to a token's hidden state [D] its experts' rows [K, D], each times its weight; into outputs [D].

    The sum of rows is kept in float32, in the order of the choices, and rounded once; `sums` [D] is its room.
    """
    width = np.uint64(len(hidden))
    for d in range(width):
        sums[d] = 0
    for choice in range(len(rows)):
        weight, row = weights[choice], rows[choice]
        for d in range(width):
            sums[d] += weight * widened(row[d])
    for d in range(width):
        outputs[d] = rounded(widened(hidden[d]) + widened(rounded(sums[d], outputs)), outputs)


@functools.cache
def tokens(words: Any) -> Any:
    """A C function: a thread's share of a job of sums, as of `crew.products`."""

    @cfunc(types.void(types.int64), cache=True)
    def add_tokens(address):
        job = carray(pointer(address), crew.SIZE, np.int64)
        count, width, choices = job[crew.ROWS], job[crew.DEPTH], job[CHOICES]
        hidden = carray(pointer(job[crew.INPUTS]), (count, width), words)
        rows = carray(pointer(job[EXPERTS]), (count, choices, width), words)
        weights = carray(pointer(job[crew.WEIGHTS]), (count, choices), np.float32)
        outputs = carray(pointer(job[crew.OUTPUTS]), (count, width), words)
        sums = np.empty(width, np.float32)
        while True:
            part = taken(address + 8 * crew.TAKEN)
            if part >= job[crew.PARTS]:
                break
            for token in range(part * PIECE, min(part * PIECE + PIECE, count)):
                add_choices(hidden[token], rows[token], weights[token], sums, outputs[token])

    return add_tokens


@njit(cache=True, nogil=True)
def fit_sums(call):
    """Whether a call that `fits` is one of `compute_sums`."""
    if long_at(call + ARGUMENTS_NUMBER) != 4 or long_at(call + NUMBER) != 1:
        return False
    buffers = long_at(call + ARGUMENTS)
    hidden, rows, weights = long_at(buffers), long_at(buffers + 8), long_at(buffers + 16)
    outputs = long_at(long_at(call + RESULTS))
    if long_at(hidden + RANK) != 2 or long_at(outputs + RANK) != 2 or not is_of(weights, FLOAT32, 2):
        return False
    if not is_of(rows, int_at(hidden + TYPE), 2):
        return False
    of_hidden, of_rows, of_weights = long_at(hidden + SIZES), long_at(rows + SIZES), long_at(weights + SIZES)
    tokens, width, of_outputs = long_at(of_hidden), long_at(of_hidden + 8), long_at(outputs + SIZES)
    if long_at(of_outputs) != tokens or long_at(of_outputs + 8) != width:
        return False
    if long_at(of_weights) != tokens or long_at(of_rows + 8) != width:
        return False
    return long_at(of_rows) >= tokens * long_at(of_weights + 8)


@njit(cache=True, nogil=True)
def compute_sums(call, do, size):
    """Of hidden [T, D], experts' rows [T * K or more, D], weights [T, K] and a table, into [T, D]."""
    hidden, sizes = buffer(call, ARGUMENTS, 0)
    rows, _ = buffer(call, ARGUMENTS, 1)
    weights, choices = buffer(call, ARGUMENTS, 2)
    known, _ = buffer(call, ARGUMENTS, 3)
    outputs, _ = buffer(call, RESULTS, 0)
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS], job[crew.OUTPUTS] = do, hidden, weights, outputs
    job[crew.ROWS], job[crew.DEPTH] = long_at(sizes), long_at(sizes + 8)
    job[EXPERTS], job[CHOICES] = rows, long_at(choices + 8)
    job[crew.PARTS] = (job[crew.ROWS] + PIECE - 1) // PIECE
    work = job[crew.ROWS] * (job[CHOICES] + 2) * job[crew.DEPTH] * size
    crew.share_out(pool_at(long_at(known)), job, work)


def combine(table: jax.Array | None, hidden: jax.Array, outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """`compute.combine`, inside a jitted program.

    Args:
        table: any layer's (`Inside`); None for XLA's sum.
        hidden: [T, D] the residual stream.
        outputs: [T * K or more, D] unweighted expert outputs, token after token.
        weights: [T, K] router weights, float32.

    Returns:
        [T, D].
    """
    count, choices = weights.shape
    ours = hidden.dtype == outputs.dtype and hidden.dtype.name in ("float32", "bfloat16")
    if table is not None and ours:
        words: Any = np.float32 if hidden.dtype == np.float32 else np.uint16
        name = target(f"layerscope_sums_{np.dtype(words).name}", compute_sums, tokens, words, fit_sums)
        if name is not None:
            shape = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)
            return jax.ffi.ffi_call(name, shape)(hidden, outputs, weights, table)
    return compute.combine(hidden, outputs[: count * choices].reshape(count, choices, -1), weights)


def add_experts(
    hidden: jax.Array, outputs: jax.Array, weights: jax.Array, table: jax.Array | None
) -> jax.Array:
    """Hidden states [B, S, D] with the experts' rows added; see `combine`."""
    return combine(table, hidden.reshape(len(weights), -1), outputs, weights).reshape(hidden.shape)
