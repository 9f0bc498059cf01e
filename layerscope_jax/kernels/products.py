"""Products with a layer's own weights inside a jitted program, by the loops that compute experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from layerscope_jax.kernels import amx, crew, loops, vectors
from layerscope_jax.kernels.host_kernels import WORDS
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.registry import Kernel, Work, built_in, choose
from layerscope_jax.kernels.xla_calls import (
    ARGUMENTS,
    ARGUMENTS_NUMBER,
    NUMBER,
    RANK,
    RESULTS,
    SIZES,
    TYPE,
    buffer,
    description,
    int_at,
    long_at,
)
from layerscope_jax.kernels.xla_ffi import Unavailable, register
from layerscope_jax.models.experts import matmuls
from layerscope_jax.models.matrices import Int8Matrix
from layerscope_jax.support.njit import njit

TOGETHER = amx.FEW_ROWS
"""Columns of a result that are computed at once, whichever way."""


@njit(cache=True, nogil=True)
def fit_products(call):
    """Whether a call that `fits` is one of `multiply`."""
    count, x = long_at(call + NUMBER), description(call, ARGUMENTS, 0)
    if long_at(call + ARGUMENTS_NUMBER) != count + 2 or long_at(x + RANK) != 2:
        return False
    for index in range(count):
        weights, result = description(call, ARGUMENTS, index + 1), description(call, RESULTS, index)
        if (
            int_at(weights + TYPE) != int_at(x + TYPE)
            or long_at(weights + RANK) != 2
            or long_at(result + RANK) != 2
        ):
            return False
        of_x, of_weights, of_result = long_at(x + SIZES), long_at(weights + SIZES), long_at(result + SIZES)
        if long_at(of_weights + 8) != long_at(of_x + 8) or long_at(of_result) != long_at(of_x):
            return False
        if long_at(of_result + 8) != long_at(of_weights):
            return False
    return True


@njit(cache=True, nogil=True)
def multiply(call, do, size):
    """`x [M, K]` times each of some weights `[N, K]`, helped by a crew: the last argument is its address."""
    count = long_at(call + NUMBER)
    matrices = np.empty((count, 3), np.int64)
    for index in range(count):
        matrices[index, 0], sizes = buffer(call, ARGUMENTS, index + 1)
        matrices[index, 1] = long_at(sizes)
        matrices[index, 2], _ = buffer(call, RESULTS, index)
    share_products(call, do, matrices, size)


@njit(cache=True, nogil=True)
def share_products(call, do, matrices, size):
    """Has a crew compute products of the first argument with some matrices; the last one is the crew's table.

    Args:
        matrices: [count, ...] of each: the address of its weights, N, the address of the outputs, and more.
        size: bytes that are read of a weight.
    """
    x, sizes = buffer(call, ARGUMENTS, 0)
    rows, depth = long_at(sizes), long_at(sizes + 8)
    table_at, _ = buffer(call, ARGUMENTS, long_at(call + ARGUMENTS_NUMBER) - 1)
    pool = pool_at(long_at(table_at))
    count, all_columns = len(matrices), 0
    for index in range(count):
        all_columns += matrices[index, 1]
    work = depth * all_columns * size * max(1, rows // vectors.TOKENS)
    threads = max(1, min(pool[crew.HELPERS] + 1, work // pool[crew.WORTH]))
    height, columns = rows, (all_columns + threads - 1) // threads
    if rows >= threads * amx.PIECE:  # each thread has tokens enough to take all columns
        height, columns = amx.PIECE, all_columns
    columns = (columns + TOGETHER - 1) // TOGETHER * TOGETHER
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


def products(table: jax.Array, x: jax.Array, *weights: jax.Array | Int8Matrix) -> list[jax.Array]:
    """`dense` of x [..., K] and weights [N, K], inside a jitted program, by the kernel that suits."""
    formats = {"int8" if isinstance(matrix, Int8Matrix) else matrix.dtype.name for matrix in weights}
    sizes = (x.shape[-1], *(matrix.shape[0] for matrix in weights))
    name = formats.pop() if len(formats) == 1 else "mixed"
    kernel = choose(Work("products", name, np.dtype(x.dtype), sizes))
    return matmuls(x, *weights) if kernel is None else kernel.run(table, x, *weights)


class Way(NamedTuple):
    """How products are computed.

    Attributes:
        name: as in statistics.
        suits: (dtype, K, *N) -> whether it can.
        multiply: compiled, as `loops.multiply`.
        weights: what it takes bfloat16 weights for (`dots.py`).
    """

    name: str
    suits: Callable[..., bool]
    multiply: Any
    weights: Any = WORDS["bfloat16"].type

    def words(self, dtype: np.dtype) -> type:
        """Returns what it takes weights of a dtype for."""
        return WORDS[dtype.name].type if dtype.name == "float32" else self.weights


LOOPS = Way("loops", lambda dtype, *_: dtype.name in WORDS, loops.multiply)
PAIRS = Way("pairs", vectors.suit, loops.multiply, np.int16)
AMX = Way("amx", amx.suit_products, amx.multiply)
WAYS = (LOOPS, PAIRS, AMX)


def products_target(dtype: np.dtype, way: Way) -> str:
    """XLA's name for the function of products, computed in a way.

    Raises:
        Unavailable: if there can be none.
    """
    rows: Any = WORDS[dtype.name].type
    weights: Any = way.words(dtype)
    name = f"layerscope_products_{way.name}_{dtype.name}"
    return register(name, multiply, lambda: crew.products(way.multiply, rows, weights), dtype, fit_products)


def multiply_by(way: Way, table: jax.Array, x: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    """`products` of x [..., K] and each of some weights [N, K], in a way."""
    dtype, depth = np.dtype(x.dtype), x.shape[-1]
    flat = x.reshape(-1, depth)
    shapes = [jax.ShapeDtypeStruct((len(flat), len(matrix)), x.dtype) for matrix in weights]
    results = jax.ffi.ffi_call(products_target(dtype, way), shapes)(flat, *weights, table)
    return [matrix.reshape(*x.shape[:-1], -1) for matrix in results]


def suits(way: Way, work: Work) -> bool:
    return work.format == work.dtype.name and way.suits(work.dtype, *work.sizes)


def obstacle(target: Callable[[np.dtype, Any], str], way: Any, work: Work) -> str | None:
    """Why a function of products cannot be had; None if it can."""
    try:
        target(work.dtype, way)
    except Unavailable as error:
        return str(error)
    return None


for _way in WAYS:
    built_in(
        Kernel(
            _way.name,
            "products",
            functools.partial(suits, _way),
            functools.partial(multiply_by, _way),
            functools.partial(obstacle, products_target, _way),
        )
    )
