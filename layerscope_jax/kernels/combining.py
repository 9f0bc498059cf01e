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
from layerscope_jax.kernels.host_kernels import WORDS
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.numbers import pointer, rounded, taken, widened
from layerscope_jax.kernels.registry import Kernel, Work, built_in, choose
from layerscope_jax.kernels.xla_calls import ARGUMENTS, RESULTS, buffer, layout, long_at, matches
from layerscope_jax.kernels.xla_ffi import Unavailable, register
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


_, CHOICES_OF, ROWS, TOKENS = range(4)  # letters, in their order
SUMS = layout("x T D, x R D, float32 T K", "x T D")


@njit(cache=True, nogil=True)
def fit_sums(call):
    """Whether a call that `fits` is one of `compute_sums`."""
    like, sizes = matches(call, SUMS)
    return like and sizes[ROWS] >= sizes[TOKENS] * sizes[CHOICES_OF]


@njit(cache=True, nogil=True)
def compute_sums(call, do, size):
    """Of hidden [T, D], experts' rows [T * K or more, D], weights [T, K] and a table, into [T, D]."""
    hidden, sizes = buffer(call, ARGUMENTS, 0)
    rows, _ = buffer(call, ARGUMENTS, 1)
    weights, choices = buffer(call, ARGUMENTS, 2)
    table_at, _ = buffer(call, ARGUMENTS, 3)
    outputs, _ = buffer(call, RESULTS, 0)
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS], job[crew.OUTPUTS] = do, hidden, weights, outputs
    job[crew.ROWS], job[crew.DEPTH] = long_at(sizes), long_at(sizes + 8)
    job[EXPERTS], job[CHOICES] = rows, long_at(choices + 8)
    job[crew.PARTS] = (job[crew.ROWS] + PIECE - 1) // PIECE
    work = job[crew.ROWS] * (job[CHOICES] + 2) * job[crew.DEPTH] * size
    crew.share_out(pool_at(long_at(table_at)), job, work)


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
    if table is not None:
        dtype = np.dtype(hidden.dtype)
        kernel = choose(Work("sums", outputs.dtype.name, dtype, hidden.shape[1:]))
        if kernel is not None:
            return kernel.run(table, hidden, outputs, weights)
    return compute.combine(hidden, outputs[: count * choices].reshape(count, choices, -1), weights)


def suits(work: Work) -> bool:
    return work.format == work.dtype.name and work.dtype.name in WORDS


def sums_target(dtype: np.dtype) -> str:
    """XLA's name for the function of sums.

    Raises:
        Unavailable: if there can be none.
    """
    words: Any = WORDS[dtype.name].type
    return register(f"layerscope_sums_{dtype.name}", compute_sums, lambda: tokens(words), dtype, fit_sums)


def obstacle(work: Work) -> str | None:
    try:
        sums_target(work.dtype)
    except Unavailable as error:
        return str(error)
    return None


def combine_by_loops(
    table: jax.Array, hidden: jax.Array, outputs: jax.Array, weights: jax.Array
) -> jax.Array:
    """`combine` by our own loop."""
    shape = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)
    return jax.ffi.ffi_call(sums_target(np.dtype(hidden.dtype)), shape)(hidden, outputs, weights, table)


built_in(Kernel("loops", "sums", suits, combine_by_loops, obstacle))


def add_experts(
    hidden: jax.Array, outputs: jax.Array, weights: jax.Array, table: jax.Array | None
) -> jax.Array:
    """Hidden states [B, S, D] with the experts' rows added; see `combine`."""
    return combine(table, hidden.reshape(len(weights), -1), outputs, weights).reshape(hidden.shape)
