"""Products with a layer's own weights inside a jitted program, by the loops that compute experts."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from layerscope_jax.kernels import crew, vectors
from layerscope_jax.kernels import experts as kernels
from layerscope_jax.kernels.foreign import (
    ARGUMENTS,
    ARGUMENTS_NUMBER,
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
from layerscope_jax.models.experts import matmuls
from layerscope_jax.support.njit import njit


@njit(cache=True, nogil=True)
def fit_products(call):
    """Whether a call that `fits` is one of `multiply`."""
    count, buffers = long_at(call + NUMBER), long_at(call + ARGUMENTS)
    x, results = long_at(buffers), long_at(call + RESULTS)
    if long_at(call + ARGUMENTS_NUMBER) != count + 2 or long_at(x + RANK) != 2:
        return False
    rows, depth = long_at(long_at(x + SIZES)), long_at(long_at(x + SIZES) + 8)
    for index in range(count):
        weights, result = long_at(buffers + 8 * (index + 1)), long_at(results + 8 * index)
        if not is_of(weights, int_at(x + TYPE), 2) or long_at(result + RANK) != 2:
            return False
        sizes, of_result = long_at(weights + SIZES), long_at(result + SIZES)
        if long_at(sizes) != depth or long_at(of_result) != rows:
            return False
        if long_at(of_result + 8) != long_at(sizes + 8):
            return False
    return True


@njit(cache=True, nogil=True)
def multiply(call, do, size):
    """`x [M, K] @ weights [K, N]` of some weights, helped by a crew: the last argument is its address."""
    x, sizes = buffer(call, ARGUMENTS, 0)
    count = long_at(call + NUMBER)
    known, _ = buffer(call, ARGUMENTS, count + 1)
    pool = pool_at(long_at(known))
    matrices, all_columns = np.empty((count, 3), np.int64), 0
    for index in range(count):
        matrices[index, 0], sizes_of = buffer(call, ARGUMENTS, index + 1)
        matrices[index, 1] = long_at(sizes_of + 8)
        matrices[index, 2], _ = buffer(call, RESULTS, index)
        all_columns += matrices[index, 1]
    rows, depth = long_at(sizes), long_at(sizes + 8)
    work = depth * all_columns * size * max(1, rows // vectors.TOKENS)
    threads = max(1, min(pool[crew.HELPERS] + 1, work // pool[crew.WORTH]))
    height, columns = rows, (all_columns + threads - 1) // threads
    if rows >= threads * kernels.PIECE:  # each thread has tokens enough to take all columns
        height, columns = kernels.PIECE, all_columns
    columns = (columns + vectors.COLUMNS - 1) // vectors.COLUMNS * vectors.COLUMNS
    beside = 0
    for index in range(count):
        beside += (matrices[index, 1] + columns - 1) // columns
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS] = do, x, matrices.ctypes.data
    job[crew.ROWS], job[crew.DEPTH], job[crew.COUNT] = rows, depth, count
    job[crew.COLUMNS], job[crew.HEIGHT], job[crew.BESIDE] = columns, height, beside
    job[crew.PARTS] = beside * ((rows + height - 1) // height)
    crew.share_out(pool, job, work)
    job[crew.COUNT] = matrices.size  # kept until here


def products(table: jax.Array, x: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    """`compute.dense` of x [..., K] and weights [K, N], inside a jitted program, with any layer's table."""
    depth, widths = x.shape[-1], [one.shape[1] for one in weights]
    if x.dtype == np.float32:
        words: Any = np.float32
    else:
        pairs = all(vectors.suit_pairs(np.dtype(x.dtype), depth, width) for width in widths)
        words = np.int16 if pairs else np.uint16
    odd = depth % vectors.ROWS or any(width % vectors.COLUMNS for width in widths)
    odd = odd or any(one.dtype != x.dtype for one in weights)
    name = None
    if not odd:
        name = target(
            f"layerscope_products_{np.dtype(words).name}", multiply, crew.products, words, fit_products
        )
    if name is None:
        return matmuls(x, *weights)
    flat = x.reshape(-1, depth)
    shapes = [jax.ShapeDtypeStruct((len(flat), width), x.dtype) for width in widths]
    found = jax.ffi.ffi_call(name, shapes)(flat, *weights, table)
    return [one.reshape(*x.shape[:-1], -1) for one in found]
