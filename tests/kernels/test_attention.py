"""Attention by our own loops: what XLA computes, whoever else is in the batch and whoever helps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crews import TOLERANCE, table
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.kernels import attention, weighted_sums
from layerscope_jax.models.attention import attend
from layerscope_jax.models.rotary import PAD_POSITION

pytestmark = pytest.mark.usefixtures("quick_compiles")

ours = jax.jit(attention.attention, static_argnames="window")


def drawn(rows, heads, groups, size, length, dtype, seed, tokens=1, value_size=None):
    rng = np.random.default_rng(seed)
    query = jnp.asarray(rng.standard_normal((rows, tokens, heads * groups, size)), dtype)
    caches = [(rows, heads, size, length), (rows, heads, length, value_size or size)]
    # A cache holds numbers of the model's dtype, widened.
    key, value = (jnp.asarray(rng.standard_normal(shape), dtype).astype(jnp.float32) for shape in caches)
    return query, key, value


@functools.partial(jax.jit, static_argnames="window")
def by_xla(query, key, value, positions, window, scale=None, sinks=None):
    back = positions[:, :, None] - jnp.arange(key.shape[3])[None, None, :]
    return attend(query, key, value, (back >= 0) & (back < (window or PAD_POSITION)), scale, sinks)


def scale_and_sinks(heads, dtype, seed):
    """Sinks from such as take next to nothing to such as take nearly all."""
    sinks = np.random.default_rng(seed).uniform(-4, 8, heads)
    return np.float32(0.3), jnp.asarray(sinks, dtype)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "value_size", "length", "dtype", "window", "sinks"),
    [
        (1, 1, 8, 8, 1, "float32", None, True),
        (2, 3, 20, 20, 40, "float32", None, False),
        (2, 3, 20, 20, 40, "bfloat16", None, False),
        (1, 4, 16, 40, 40, "float32", 7, True),
        (3, 1, 8, 5, 40, "bfloat16", 1, True),
    ],
)
@given(threads=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_it_is_what_xla_computes(
    heads, groups, size, value_size, length, dtype, window, sinks, threads, seed
):
    query, key, value = drawn(4, heads, groups, size, length, dtype, seed, value_size=value_size)
    more = scale_and_sinks(heads * groups, dtype, seed) if sinks else ()
    positions = np.random.default_rng(seed).integers(0, length, (4, 1)).astype(np.int32)
    _, known = table(threads)
    found = ours(known, query, key, value, positions, window, *more)
    expected = by_xla(query, key, value, positions, window, *more)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=0, atol=TOLERANCE[dtype]
    )
    alone = ours(known, query[:1], key[:1], value[:1], positions[:1], window, *more)
    np.testing.assert_array_equal(bits(alone), bits(found[:1]))


def test_more_positions_than_are_summed_at_once():
    query, key, value = drawn(1, 2, 2, 8, weighted_sums.BLOCK + 500, "float32", 0)
    positions = np.array([[weighted_sums.BLOCK + 401]], np.int32)
    found = ours(table(3)[1], query, key, value, positions, window=None)
    np.testing.assert_allclose(found, by_xla(query, key, value, positions, None), rtol=0, atol=2e-6)


def test_rows_without_a_token_are_zeros_and_scores_may_be_large():
    query, key, value = drawn(3, 1, 2, 8, 40, "float32", 1)
    positions = np.array([[5], [PAD_POSITION], [39]], np.int32)
    found = ours(table(3)[1], 100 * query, key, value, positions, window=None)
    expected = by_xla(100 * query, key, value, positions, None)
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(found[::2], expected[::2], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "value_size", "dtype", "window", "sinks"),
    [
        (1, 1, 32, 32, "float32", None, True),
        (2, 3, 64, 64, "float32", None, False),
        (2, 3, 64, 64, "bfloat16", None, False),
        (1, 130, 32, 32, "float32", 7, True),  # more queries of a token than a block
        (2, 2, 160, 288, "float32", 100, False),
        (2, 1, 64, 32, "bfloat16", 1, True),
    ],
)
@given(threads=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=5)
def test_many_tokens_are_what_xla_computes(
    heads, groups, size, value_size, dtype, window, sinks, threads, seed
):
    """Prompts of any length, padded, some of which begin behind what came before them."""
    length, tokens = 192, 150
    query, key, value = drawn(3, heads, groups, size, length, dtype, seed, tokens, value_size)
    more = scale_and_sinks(heads * groups, dtype, seed) if sinks else ()
    rng = np.random.default_rng(seed)
    starts, counts = rng.integers(0, length - tokens, (3, 1)), rng.integers(0, tokens + 1, (3, 1))
    index = np.arange(tokens)[None]
    positions = np.where(index < counts, starts + index, PAD_POSITION).astype(np.int32)
    _, known = table(threads)
    found = np.asarray(ours(known, query, key, value, positions, window, *more), np.float32)
    expected = np.asarray(by_xla(query, key, value, positions, window, *more), np.float32)
    there = index < counts
    np.testing.assert_allclose(found[there], expected[there], rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_array_equal(found[~there], 0)
    alone = ours(known, query[:1], key[:1], value[:1], positions[:1], window, *more)
    np.testing.assert_array_equal(bits(np.asarray(alone, np.float32)), bits(found[:1]))


@pytest.mark.parametrize(("size", "length"), [(20, 64), (64, 40)])
def test_many_tokens_in_shapes_with_a_rest_are_left_to_xla(size, length):
    query, key, value = drawn(1, 1, 1, size, length, "float32", 0, tokens=5)
    assert attention.attention(table(1)[1], query, key, value, jnp.arange(5)[None], None) is None
