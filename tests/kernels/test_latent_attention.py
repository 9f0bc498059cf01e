"""Latent attention by our own loops: what XLA computes, whoever else is in the batch and whoever helps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crews import TOLERANCE, table
from flax import nnx
from helpers import TINY, bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.kernels.dense import our_loops
from layerscope_jax.kernels.dots import dot_products
from layerscope_jax.kernels.head_products import head_products
from layerscope_jax.kernels.latent_attention import PIECE, latent_attention
from layerscope_jax.models.config import LatentSizes
from layerscope_jax.models.latent_attention import LatentAttention, LatentCache, head_matmul, latent_attend
from layerscope_jax.models.rotary import PAD_POSITION

pytestmark = pytest.mark.usefixtures("quick_compiles")  # equal bits are those of our own loops

SCALE = 0.2
ours = jax.jit(functools.partial(latent_attention, scale=SCALE), static_argnames="rank")


@functools.partial(jax.jit, static_argnames="rank")
def by_xla(query, rows, positions, rank):
    mask = positions[:, :, None] >= jnp.arange(rows.shape[1])[None, None, :]
    return latent_attend(query, rows, mask, rank, SCALE)


def drawn(rng, batch, tokens, heads, width, length, dtype):
    """Queries, and a cache, which holds numbers of the model's dtype, widened."""
    query = jnp.asarray(rng.standard_normal((batch, tokens, heads, width)), dtype)
    return query, jnp.asarray(rng.standard_normal((batch, length, width)), dtype).astype(jnp.float32)


def agree(query, rows, positions, rank, threads, there):
    """Compares rows that are `there` with XLA's, the others with zeros, and the first with itself alone."""
    _, known = table(threads)
    found = ours(known, query, rows, positions, rank)
    expected = by_xla(query, rows, positions, rank)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = (np.asarray(one, np.float32) for one in (found, expected))
    tolerance = TOLERANCE[query.dtype.name]
    np.testing.assert_allclose(found[there], expected[there], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found[~there], 0)
    alone = ours(known, query[:1], rows[:1], positions[:1], rank)
    np.testing.assert_array_equal(bits(np.asarray(alone, np.float32)), bits(found[:1]))


@pytest.mark.parametrize(
    ("heads", "width", "rank", "length", "dtype"),
    [
        (1, 5, 5, 1, "float32"),
        (19, 96, 64, 2 * PIECE + 43, "float32"),  # a second group of heads; a piece with a rest
        (16, 72, 56, 3 * PIECE, "bfloat16"),
    ],
)
@given(threads=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_it_is_what_xla_computes(heads, width, rank, length, dtype, threads, seed):
    rng = np.random.default_rng(seed)
    query, rows = drawn(rng, 4, 1, heads, width, length, dtype)
    positions = rng.integers(0, length, (4, 1)).astype(np.int32)
    positions[rng.random((4, 1)) < 0.2] = PAD_POSITION
    agree(query, rows, positions, rank, threads, positions < length)


def test_scores_may_be_large_and_far_from_one_another():
    query, rows = drawn(np.random.default_rng(1), 4, 1, 19, 96, 2 * PIECE + 43, "float32")
    positions = np.array([[5], [PIECE - 1], [PIECE], [2 * PIECE + 42]], np.int32)
    found = ours(table(3)[1], 100 * query, rows, positions, 64)
    np.testing.assert_allclose(found, by_xla(100 * query, rows, positions, 64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(threads=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=5)
def test_many_tokens_are_what_xla_computes(dtype, threads, seed):
    """Prompts of any length, padded, some of which begin behind what came before them."""
    tokens, length = 30, 64
    rng = np.random.default_rng(seed)
    query, rows = drawn(rng, 3, tokens, 5, 96, length, dtype)
    starts, counts = rng.integers(0, length - tokens, (3, 1)), rng.integers(0, tokens + 1, (3, 1))
    index = np.arange(tokens)[None]
    positions = np.where(index < counts, starts + index, PAD_POSITION).astype(np.int32)
    agree(query, rows, positions, 64, threads, index < counts)


@pytest.mark.parametrize(("width", "rank", "length"), [(72, 64, 64), (96, 72, 64), (96, 64, 40)])
def test_many_tokens_in_shapes_with_a_rest_are_left_to_xla(width, rank, length):
    query, rows = drawn(np.random.default_rng(0), 1, 5, 2, width, length, "float32")
    assert latent_attention(table(1)[1], query, rows, jnp.arange(5)[None], rank, SCALE) is None


@pytest.mark.parametrize("shape", [(2, 3, 3, 32), (150, 2, 32), (1, 2, 16)])
def test_products_of_heads_are_what_xla_computes(shape):
    """Of few tokens and many, in pairs and not, and a row's bits are its own."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    weights = jnp.asarray(rng.standard_normal((shape[-2], 64, shape[-1])) / 4, jnp.bfloat16)
    found, expected = head_products(table(3)[1], x, weights), head_matmul(x, weights)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = (np.asarray(one, np.float32) for one in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-2)
    alone = head_products(table(1)[1], x[:1], weights)
    np.testing.assert_array_equal(bits(np.asarray(alone, np.float32)), bits(found[:1]))


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_layer_is_the_same_by_our_loops(tokens):
    """A token's by what lies in the cache, a prompt's by the keys and values that are made of it."""
    sizes = LatentSizes(query_rank=None, rank=64, nope=32, rope=32, value=32)
    config = dataclasses.replace(TINY, attention="latent", latent=sizes)
    layer = LatentAttention(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, tokens, config.hidden_size)), jnp.float32)
    cache = LatentCache(jnp.asarray(rng.standard_normal((2, 64, 96)), jnp.float32))
    positions = jnp.asarray(np.array([[3], [30]]) + np.arange(tokens), jnp.int32)
    expected, _ = jax.jit(lambda *inputs: layer(*inputs))(hidden, positions, cache)
    with our_loops(table(3)[1]):
        found, _ = jax.jit(lambda *inputs: layer(*inputs))(hidden, positions, cache)
    assert (found != expected).any()  # it was another way
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=TOLERANCE["float32"])


@given(
    count=st.integers(1, 11),
    width=st.integers(1, 70),
    inputs=st.integers(1, 13),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_dot_products_have_the_same_bits_whichever_others_are_computed(count, width, inputs, seed):
    rng = np.random.default_rng(seed)
    x, rows = (rng.standard_normal((n, width)).astype(np.float32) for n in (inputs, 12))
    found, alone = (np.full((len(x), n), np.nan, np.float32) for n in (count, 1))
    dot_products(x, rows, 1, 1 + count, found)
    np.testing.assert_allclose(found, x @ rows[1 : 1 + count].T, rtol=0, atol=2e-5)
    dot_products(x, rows, count, count + 1, alone)
    np.testing.assert_array_equal(bits(alone[:, 0]), bits(found[:, -1]))
