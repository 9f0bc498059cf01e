"""Latent attention inside a jitted program by our own loops: heads share one row of numbers a position.

For one token a row, a piece of some positions is read once for many heads: their scores are dot products with
the rows, and the rows' first numbers are added up right after, while they are in the cache. Pieces are the
same whoever else is in the batch and however many threads there are; their sums are put together in order.
Many tokens a row go the way of `prefill_attention`, with the rows as the keys and values of a single head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import carray, types

from layerscope_jax.kernels import crew
from layerscope_jax.kernels.attention import attend_by_loops, attention_target, clear
from layerscope_jax.kernels.dots import dot_products
from layerscope_jax.kernels.host_kernels import WORDS
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.numbers import exp, pointer, rounded, taken, widened
from layerscope_jax.kernels.registry import Kernel, Work, built_in, choose
from layerscope_jax.kernels.softmax import raised
from layerscope_jax.kernels.vectors import COLUMNS, ROWS
from layerscope_jax.kernels.weighted_sums import BLOCK, STRIDE, add_product
from layerscope_jax.kernels.xla_calls import ARGUMENTS, RESULTS, buffer, layout, long_at, matches, within
from layerscope_jax.kernels.xla_ffi import Unavailable, register
from layerscope_jax.support.njit import cfunc, njit

PIECE = 128
"""Positions of a piece: their rows are to stay in the second-level cache."""

GROUP = 16
"""Most heads that a thread computes at once for a piece."""

# Of a job (`crew`): INPUTS are queries, WEIGHTS rows; ROWS are B, DEPTH is R + E, WIDTH P. Each row's
# positions, where its pieces begin, scale, sums of pieces; whether these are to be put together.
LASTS, STARTS, SCALE, SUMS, HEADS, RANK, GATHERS = range(9, 16)

SPARE = 16
"""Numbers behind each head's sums of a piece: the highest score, and the sum of shares."""


@njit(cache=True, nogil=True, inline="always")
def attend_piece(queries, rows, scale, first, last, outputs):
    """Queries [H, R + E] see rows [P, R + E] from `first` to `last`: sums [H, R + SPARE], not yet divided."""
    heads, width = queries.shape
    rank = outputs.shape[1] - SPARE
    x = np.zeros((heads, width), np.float32)
    for head in range(heads):
        for c in range(np.uint64(width)):
            x[head, c] = widened(queries[head, c])
    # To the edge of what is added at once: a few positions more, which have a share of zero.
    until = min(first + (last - first + ROWS - 1) // ROWS * ROWS, len(rows))
    scores, sums = np.empty((len(x), until - first), np.float32), np.empty((heads, STRIDE), np.float32)
    dot_products(x, rows, first, until, scores)
    for head in range(heads):
        for index in range(np.uint64(last - first)):
            scores[head, index] *= scale
        outputs[head, rank], outputs[head, rank + 1] = raised(scores[head, : last - first], scores[head, 0])
        for index in range(np.uint64(last - first), np.uint64(until - first)):
            scores[head, index] = 0
    for begin in range(0, rank, BLOCK):
        end = min(begin + BLOCK, rank)
        clear(sums, end - begin)
        add_product(scores[:heads], rows[first:until], begin, end, sums)
        for head in range(heads):
            for index in range(np.uint64(end - begin)):
                outputs[head, np.uint64(begin) + index] = sums[head, index]


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def gather(pieces, total, output):
    """Puts the sums of a head's pieces [N, R + SPARE] together in `total [R]`, and rounds them."""
    rank = len(output)
    high = pieces[0, rank]
    for piece in range(1, len(pieces)):
        high = max(high, pieces[piece, rank])
    shares = np.float32(0)
    clear(total, rank)
    for piece in range(len(pieces)):
        factor = exp(pieces[piece, rank] - high)
        shares += factor * pieces[piece, rank + 1]
        for index in range(np.uint64(rank)):
            total[0, index] += factor * pieces[piece, index]
    for index in range(np.uint64(rank)):
        output[index] = rounded(total[0, index] / shares, output)


@functools.cache
def pieces(words: Any) -> Any:
    """A C function: a thread's share of a job of latent attention, as of `crew.products`."""

    @cfunc(types.void(types.int64), cache=True)
    def attend_pieces(address):
        job = carray(pointer(address), crew.SIZE, np.int64)
        count, heads, rank = job[crew.ROWS], job[HEADS], job[RANK]
        queries = carray(pointer(job[crew.INPUTS]), (count, heads, job[crew.DEPTH]), words)
        rows = carray(pointer(job[crew.WEIGHTS]), (count, job[crew.WIDTH], job[crew.DEPTH]), np.float32)
        outputs = carray(pointer(job[crew.OUTPUTS]), (count, heads, rank), words)
        lasts = carray(pointer(job[LASTS]), count, np.int32)
        starts = carray(pointer(job[STARTS]), count + 1, np.int64)
        scale = carray(pointer(job[SCALE]), 1, np.float32)[0]
        sums = carray(pointer(job[SUMS]), (starts[count], heads, rank + SPARE), np.float32)
        groups = (heads + GROUP - 1) // GROUP
        total = np.empty((1, rank), np.float32)
        while True:
            part = taken(address + 8 * crew.TAKEN)
            if part >= job[crew.PARTS]:
                break
            if job[GATHERS]:
                row, head = part // heads, part % heads
                if starts[row] < starts[row + 1]:
                    gather(sums[starts[row] : starts[row + 1], head], total, outputs[row, head])
                else:
                    outputs[row, head] = 0
                continue
            piece, head, row = part // groups, part % groups * GROUP, 0
            while piece >= starts[row + 1]:
                row += 1
            first, end = (piece - starts[row]) * PIECE, min(head + GROUP, heads)
            last = min(first + PIECE, lasts[row])
            attend_piece(queries[row, head:end], rows[row], scale, first, last, sums[piece, head:end])

    return attend_pieces


# Of a batch B: query heads H of C numbers, positions P, of whose rows the first R are mixed.
BATCH, LENGTH, _, SINGLE, POSITIONS, MIXED = range(6)  # letters, in their order
ONE = layout("x B H C, float32 B P C, int32 B, float32 N", "x B H R")


@njit(cache=True, nogil=True)
def fit_latent_attention(call):
    """Whether a call that `fits` is one of latent attention, and no row has more positions than there are."""
    like, sizes = matches(call, ONE)
    fit = like and sizes[SINGLE] == 1 and sizes[MIXED] <= sizes[LENGTH]
    return fit and within(call, 2, sizes[BATCH], sizes[POSITIONS])


@njit(cache=True, nogil=True)
def compute_latent_attention(call, do, size):
    """Of queries [B, H, R + E], rows, positions [B] that each sees, the scale and a table, into [B, H, R]."""
    queries, sizes = buffer(call, ARGUMENTS, 0)
    count, heads, width = long_at(sizes), long_at(sizes + 8), long_at(sizes + 16)
    rows, of_rows = buffer(call, ARGUMENTS, 1)
    lasts_at, _ = buffer(call, ARGUMENTS, 2)
    scale, _ = buffer(call, ARGUMENTS, 3)
    table_at, _ = buffer(call, ARGUMENTS, 4)
    outputs, of_outputs = buffer(call, RESULTS, 0)
    rank, pool = long_at(of_outputs + 16), pool_at(long_at(table_at))
    lasts = carray(pointer(lasts_at), count, np.int32)
    starts, positions = np.zeros(count + 1, np.int64), 0
    for row in range(count):
        starts[row + 1] = starts[row] + (lasts[row] + PIECE - 1) // PIECE
        positions += lasts[row]
    sums = np.empty((starts[count], heads, rank + SPARE), np.float32)
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS], job[crew.OUTPUTS] = do, queries, rows, outputs
    job[crew.ROWS], job[crew.DEPTH], job[crew.WIDTH] = count, width, long_at(of_rows + 8)
    job[LASTS], job[STARTS], job[SCALE] = lasts_at, starts.ctypes.data, scale
    job[SUMS], job[HEADS], job[RANK] = sums.ctypes.data, heads, rank
    job[crew.PARTS] = starts[count] * ((heads + GROUP - 1) // GROUP)
    # The arithmetic of many heads takes longer than reading what they share: it is what counts.
    crew.share_out(pool, job, positions * heads * width)
    job[crew.TAKEN], job[GATHERS], job[crew.PARTS] = 0, 1, count * heads
    crew.share_out(pool, job, 4 * starts[count] * heads * rank)
    job[LASTS] = starts.size + sums.size  # kept until here


def latent_attention(
    table: jax.Array, query: jax.Array, rows: jax.Array, positions: jax.Array, rank: int, scale: float
) -> jax.Array | None:
    """`latent_attention.latent_attend`, inside a jitted program.

    Args:
        table: any layer's (`Inside`).
        query: [B, S, H, R + E] float32 or bfloat16.
        rows: [B, P, R + E] float32.
        positions: [B, S] of the tokens, whose rows are there; those of none are past all others.
        rank: R.
        scale: what scores are multiplied with.

    Returns:
        [B, S, H, R], zeros where there is no token. None where no kernel suits: several tokens in shapes with
        a rest, and all where our own loops cannot be compiled.
    """
    sizes = (query.shape[1], query.shape[3], rows.shape[1], rank)
    kernel = choose(Work("latent_attention", rows.dtype.name, np.dtype(query.dtype), sizes))
    return None if kernel is None else kernel.run(table, query, rows, positions, rank, scale)


def suits(work: Work) -> bool:
    tokens, *others = work.sizes
    even = tokens == 1 or not any(size % COLUMNS for size in others)
    return even and work.format == "float32" and work.dtype.name in WORDS


def latent_target(dtype: np.dtype) -> str:
    """XLA's name for the function of latent attention of one token a row.

    Raises:
        Unavailable: if there can be none.
    """
    words: Any = WORDS[dtype.name].type
    name = f"layerscope_latent_attention_{dtype.name}"
    return register(name, compute_latent_attention, lambda: pieces(words), dtype, fit_latent_attention)


def obstacle(work: Work) -> str | None:
    try:
        latent_target(work.dtype) if work.sizes[0] == 1 else attention_target(work.dtype, False)
    except Unavailable as error:
        return str(error)
    return None


def attend_by_pieces(
    table: jax.Array, query: jax.Array, rows: jax.Array, positions: jax.Array, rank: int, scale: float
) -> jax.Array:
    """`latent_attention` by our own loops."""
    batch, length, heads, _ = query.shape
    if length > 1:
        keys, values = rows.swapaxes(1, 2)[:, None], rows[:, None]
        mixed = attend_by_loops(table, query, keys, values, positions, None, scale, None, value_size=rank)
        return mixed.reshape(batch, length, heads, rank)
    last = jnp.where(positions[:, 0] < rows.shape[1], positions[:, 0] + 1, 0)
    call = jax.ffi.ffi_call(
        latent_target(np.dtype(query.dtype)), jax.ShapeDtypeStruct((batch, heads, rank), query.dtype)
    )
    return call(query[:, 0], rows, last, jnp.full(1, scale, jnp.float32), table)[:, None]


built_in(Kernel("loops", "latent_attention", suits, attend_by_pieces, obstacle))
