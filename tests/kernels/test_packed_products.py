"""Products with packed weights: the bits of plain products with the weights that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crews import table
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.checkpoints.dense_weights import packed
from layerscope_jax.kernels import packed_products
from layerscope_jax.kernels.products import products
from layerscope_jax.kernels.registry import Work, choose
from layerscope_jax.models.experts import matmuls

computed = jax.jit(products)


@functools.cache
def matrices(widths, depth, dtype):
    rng = np.random.default_rng(depth)
    plain = [(rng.standard_normal((width, depth)) / 8).astype(dtype) for width in widths]
    return jax.tree.map(jnp.asarray, [packed(matrix, np.dtype(dtype)) for matrix in plain])


@given(
    shape=st.sampled_from([((544, 32, 160), 128), ((96,), 1280), ((18, 35), 96)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    rows=st.sampled_from([1, 40, 300]),
    threads=st.sampled_from([1, 3]),
)
@settings(deadline=None, max_examples=12)
def test_they_are_plain_products_bit_for_bit(shape, dtype, rows, threads):
    packs, address = matrices(*shape, dtype), table(threads)[1]
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, shape[1])).astype(dtype))
    sizes = shape[1], *shape[0]
    kernel = choose(Work("products", "int8", np.dtype(dtype), sizes))
    assert kernel.name == choose(Work("products", dtype, np.dtype(dtype), sizes)).name
    expected = computed(address, x, *(matrix.values() for matrix in packs))
    for found, plain in zip(computed(address, x, *packs), expected, strict=True):
        np.testing.assert_array_equal(bits(found), bits(plain))
    (alone, *_) = computed(address, x[-1:], *packs)
    np.testing.assert_array_equal(bits(alone[0]), bits(computed(address, x, *packs)[0][-1]))


def test_rows_that_are_no_whole_chunks_are_computed_by_the_reference():
    packs = matrices((24,), 40, "bfloat16")
    assert choose(Work("products", "int8", np.dtype("bfloat16"), (40, 24))) is None
    x = jnp.ones((3, 40), jnp.bfloat16)
    np.testing.assert_array_equal(computed(table(1)[1], x, *packs)[0], matmuls(x, *packs)[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda codes, scale: (codes.astype(jnp.uint8), scale),
        lambda codes, scale: (codes[:, :-1], scale),
        lambda codes, scale: (codes, scale[:-1]),
        lambda codes, scale: (codes, scale.astype(jnp.bfloat16)),
        lambda codes, scale: (codes,),
    ],
)
def test_a_call_with_other_arguments_is_refused(change):
    (matrix,) = matrices((64,), 64, "float32")
    name = packed_products.target(np.dtype(np.float32), packed_products.WAYS[0])
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((2, 64), np.float32))
    x = jnp.ones((2, 64), jnp.float32)
    assert call(x, matrix.codes, matrix.scale, table(1)[1]).shape == (2, 64)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"INVALID_ARGUMENT"):
        jax.block_until_ready(call(x, *change(matrix.codes, matrix.scale), table(1)[1]))
