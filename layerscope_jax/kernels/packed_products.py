"""Products with packed weights of dense layers inside a jitted program, by the loops of encoded experts.

They have the bits of `products` with the weights that the packed ones stand for.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from numba import carray, types

from layerscope_jax.formats import quantised
from layerscope_jax.formats.int8 import Int8
from layerscope_jax.kernels import amx, crew, encoded, encodings, loops, products
from layerscope_jax.kernels.host_kernels import WORDS
from layerscope_jax.kernels.numbers import pointer, taken
from layerscope_jax.kernels.products import share_products
from layerscope_jax.kernels.registry import Kernel, Work, built_in
from layerscope_jax.kernels.xla_calls import (
    ARGUMENTS,
    ARGUMENTS_NUMBER,
    FLOAT32,
    INT8,
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
from layerscope_jax.kernels.xla_ffi import register
from layerscope_jax.models.matrices import Int8Matrix
from layerscope_jax.support.njit import cfunc, njit

FORMAT = quantised(Int8())
"""Of experts, whose loops these are."""

READ = 2
"""Bytes of plain weights that take as long as one packed weight: to read, and to write it out."""


@njit(cache=True, nogil=True)
def fit_packed_products(call):
    """Whether a call that `fits` is one of `multiply`: of x [M, K], and codes [N, K] and scales [N] each."""
    count, x = long_at(call + NUMBER), description(call, ARGUMENTS, 0)
    if long_at(call + ARGUMENTS_NUMBER) != 2 * count + 2 or long_at(x + RANK) != 2:
        return False
    for index in range(count):
        codes, scales = (
            description(call, ARGUMENTS, 2 * index + 1),
            description(call, ARGUMENTS, 2 * index + 2),
        )
        result = description(call, RESULTS, index)
        if int_at(codes + TYPE) != INT8 or int_at(scales + TYPE) != FLOAT32:
            return False
        if long_at(codes + RANK) != 2 or long_at(scales + RANK) != 1 or long_at(result + RANK) != 2:
            return False
        of_x, of_codes, of_result = long_at(x + SIZES), long_at(codes + SIZES), long_at(result + SIZES)
        if long_at(of_codes + 8) != long_at(of_x + 8) or long_at(of_result) != long_at(of_x):
            return False
        width = long_at(of_codes)
        if long_at(of_result + 8) != width or long_at(long_at(scales + SIZES)) != width:
            return False
    return True


@njit(cache=True, nogil=True)
def multiply(call, do, size):
    """`x [M, K]` times each of some packed matrices, as `products.multiply`."""
    count = long_at(call + NUMBER)
    matrices = np.empty((count, 4), np.int64)
    for index in range(count):
        matrices[index, 0], sizes = buffer(call, ARGUMENTS, 2 * index + 1)
        matrices[index, 1] = long_at(sizes)
        matrices[index, 2], _ = buffer(call, RESULTS, index)
        matrices[index, 3], _ = buffer(call, ARGUMENTS, 2 * index + 2)
    share_products(call, do, matrices, READ)


@njit(cache=True, nogil=True)
def matrix_of(codes, scales, depth):
    """[MATRIX] of codes and scales [N], for `encodings.decode`."""
    matrix = np.zeros(encodings.MATRIX, np.int64)
    matrix[encodings.CODES], matrix[encodings.SCALES], matrix[encodings.DEPTH] = codes, scales, depth
    matrix[encodings.CODE], matrix[encodings.COLUMNS] = encodings.INT8, depth
    matrix[encodings.ROWS] = matrix[encodings.ALONG] = 1
    return matrix


by_dots = loops.products_by(encoded.encoded_dots)


@njit(cache=True, nogil=True, inline="always")
def as_it_is(matrix):
    return matrix


of_tiles = amx.products_by(as_it_is, encoded.row_of, encoded.product)


@njit(cache=True, nogil=True)
def by_tiles(x, matrix, outputs, first, last, kind):
    """As `by_dots`, by AMX."""
    of_tiles(x, matrix, outputs, first, last)


@functools.cache
def shares(multiply: Any, rows: Any, weights_of: Any) -> Any:
    """A C function: a thread's share of products, as `crew.products`."""

    @cfunc(types.void(types.int64), cache=True)
    def run(address):
        job = carray(pointer(address), crew.SIZE, np.int64)
        depth = job[crew.DEPTH]
        x = carray(pointer(job[crew.INPUTS]), (job[crew.ROWS], depth), rows)
        matrices = carray(pointer(job[crew.WEIGHTS]), (job[crew.COUNT], 4), np.int64)
        kind = carray(pointer(job[crew.WEIGHTS]), 1, weights_of)  # of which the type alone counts
        while True:
            part = taken(address + 8 * crew.TAKEN)
            if part >= job[crew.PARTS]:
                break
            index, first, last, top, end = crew.part_of(job, matrices, part)
            matrix = matrix_of(matrices[index, 0], matrices[index, 3], depth)
            outputs = carray(pointer(matrices[index, 2]), (job[crew.ROWS], matrices[index, 1]), rows)
            multiply(x[top:end], matrix, outputs[top:end], first, last, kind)

    return run


class Way(NamedTuple):
    """How packed weights are multiplied.

    Attributes:
        plain: the way of the plain weights that they stand for.
        multiply: compiled, as that of `loops.products_by`.
    """

    plain: products.Way
    multiply: Any


WAYS = tuple(Way(way, by_tiles if way is products.AMX else by_dots) for way in products.WAYS)


def target(dtype: np.dtype, way: Way) -> str:
    """XLA's name for the function of products, computed in a way.

    Raises:
        Unavailable: if there can be none.
    """
    rows: Any = WORDS[dtype.name].type
    weights: Any = way.plain.words(dtype)
    name = f"layerscope_packed_products_{way.plain.name}_{dtype.name}"
    return register(name, multiply, lambda: shares(way.multiply, rows, weights), dtype, fit_packed_products)


def multiply_by(way: Way, table: jax.Array, x: jax.Array, *weights: Int8Matrix) -> list[jax.Array]:
    """`products` of x [..., K] and each of some packed weights [N, K], in a way."""
    flat = x.reshape(-1, x.shape[-1])
    results = [jax.ShapeDtypeStruct((len(flat), matrix.shape[0]), x.dtype) for matrix in weights]
    parts = [part for matrix in weights for part in (matrix.codes, matrix.scale)]
    outputs = jax.ffi.ffi_call(target(np.dtype(x.dtype), way), results)(flat, *parts, table)
    return [output.reshape(*x.shape[:-1], -1) for output in outputs]


def suits(way: Way, work: Work) -> bool:
    """Whether a way can be gone: whole chunks of a row are written out at once, and for tiles of 32 rows."""
    depth, *widths = work.sizes
    if work.format != "int8" or not encodings.suit(FORMAT, depth, encodings.CHUNK):
        return False
    if way.plain is products.AMX and any(width % encodings.CHUNK for width in widths):
        return False
    return way.plain.suits(work.dtype, *work.sizes)


for _way in WAYS:
    built_in(
        Kernel(
            _way.plain.name,
            "products",
            functools.partial(suits, _way),
            functools.partial(multiply_by, _way),
            functools.partial(products.obstacle, target, _way),
        )
    )
