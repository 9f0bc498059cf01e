"""Products with a matrix for each head inside a jitted program, by the loops of `products`.

In bfloat16 alone, where XLA's take ten times as long as reading the weights: in float32 they read as fast.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from numba import carray, types

from layerscope_jax.kernels import amx, crew, vectors
from layerscope_jax.kernels.host_kernels import WORDS
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.numbers import pointer, taken
from layerscope_jax.kernels.products import WAYS, Way, obstacle
from layerscope_jax.kernels.products import suits as suits_products
from layerscope_jax.kernels.registry import Kernel, Work, built_in, choose
from layerscope_jax.kernels.xla_calls import ARGUMENTS, RESULTS, buffer, layout, long_at, matches
from layerscope_jax.kernels.xla_ffi import register
from layerscope_jax.models.latent_attention import head_matmul
from layerscope_jax.support.njit import cfunc, njit

HEADS = 9
"""Of a job (`crew`): how many matrices WEIGHTS are, DEPTH by WIDTH each."""


@functools.cache
def heads(multiply: Any, rows: Any, weights_of: Any) -> Any:
    """A C function: a thread's share of products, as of `crew.products`."""

    @cfunc(types.void(types.int64), cache=True)
    def multiply_heads(address):
        job = carray(pointer(address), crew.SIZE, np.int64)
        count, number, depth, width = job[crew.ROWS], job[HEADS], job[crew.DEPTH], job[crew.WIDTH]
        x = carray(pointer(job[crew.INPUTS]), (count, number, depth), rows)
        weights = carray(pointer(job[crew.WEIGHTS]), (number, width, depth), weights_of)
        outputs = carray(pointer(job[crew.OUTPUTS]), (count, number, width), rows)
        while True:
            part = taken(address + 8 * crew.TAKEN)
            if part >= job[crew.PARTS]:
                break
            head, top = part % number, part // number * amx.PIECE
            end = min(top + amx.PIECE, count)
            multiply(x[top:end, head], weights[head], outputs[top:end, head], 0, width)

    return multiply_heads


OF_HEADS = layout("x T H K, x H N K", "x T H N")


@njit(cache=True, nogil=True)
def fit_head_products(call):
    """Whether a call that `fits` is one of `multiply`."""
    like, _ = matches(call, OF_HEADS)
    return like


@njit(cache=True, nogil=True)
def multiply(call, do, size):
    """Of inputs [T, H, K], weights [H, N, K] and a table, into [T, H, N]; as `compute_experts`."""
    x, sizes = buffer(call, ARGUMENTS, 0)
    rows, number, depth = long_at(sizes), long_at(sizes + 8), long_at(sizes + 16)
    weights, of_weights = buffer(call, ARGUMENTS, 1)
    table_at, _ = buffer(call, ARGUMENTS, 2)
    outputs, _ = buffer(call, RESULTS, 0)
    width = long_at(of_weights + 8)
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS], job[crew.OUTPUTS] = do, x, weights, outputs
    job[crew.ROWS], job[crew.DEPTH], job[crew.WIDTH], job[HEADS] = rows, depth, width, number
    job[crew.PARTS] = number * ((rows + amx.PIECE - 1) // amx.PIECE)
    work = number * depth * width * size * max(1, rows // vectors.TOKENS)
    crew.share_out(pool_at(long_at(table_at)), job, work)


def head_products(table: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
    """`latent_attention.head_matmul`, inside a jitted program, by the kernel that suits.

    Args:
        table: any layer's (`Inside`).
        x: [..., H, K].
        weights: [H, N, K].

    Returns:
        [..., H, N].
    """
    dtype = np.dtype(x.dtype)
    kernel = choose(Work("head_products", weights.dtype.name, dtype, weights.shape[:0:-1]))
    return head_matmul(x, weights) if kernel is None else kernel.run(table, x, weights)


def suits(way: Way, work: Work) -> bool:
    return work.dtype.name == "bfloat16" and suits_products(way, work)


def head_products_target(dtype: np.dtype, way: Way) -> str:
    """XLA's name for the function of products of heads, computed in a way.

    Raises:
        Unavailable: if there can be none.
    """
    rows: Any = WORDS[dtype.name].type
    weights: Any = way.words(dtype)
    name = f"layerscope_head_products_{way.name}_{dtype.name}"
    return register(name, multiply, lambda: heads(way.multiply, rows, weights), dtype, fit_head_products)


def multiply_by(way: Way, table: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
    """`head_products`, in a way."""
    flat = x.reshape(-1, *x.shape[-2:])
    shape = jax.ShapeDtypeStruct((*flat.shape[:2], weights.shape[1]), x.dtype)
    name = head_products_target(np.dtype(x.dtype), way)
    return jax.ffi.ffi_call(name, shape)(flat, weights, table).reshape(*x.shape[:-1], -1)


for _way in WAYS:
    built_in(
        Kernel(
            _way.name,
            "head_products",
            functools.partial(suits, _way),
            functools.partial(multiply_by, _way),
            functools.partial(obstacle, head_products_target, _way),
        )
    )
