"""Caches: their layout is said by the config, and rows and positions are moved without knowing it."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

from layerscope_jax.models import kinds
from layerscope_jax.models.cache import CacheArray, KVCache, cache_bytes, grow, new_caches, put_rows

pytestmark = pytest.mark.usefixtures("quick_compiles")

DEVICE = jax.devices("cpu")[0]


class Recurrent(NamedTuple):
    """A state without positions beside one with them, in an order of its own."""

    latent: jax.Array  # [B, P, D]
    state: jax.Array  # [B, D]

    @staticmethod
    def position_axes():
        return 1, None


class RecurrentAttention:
    @staticmethod
    def cache_shapes(config, rows, length):
        width = config.hidden_size
        return Recurrent(CacheArray((rows, length, width)), CacheArray((rows, width), np.int32))


@pytest.fixture(params=["grouped", "recurrent"])
def config(request, monkeypatch):
    monkeypatch.setitem(kinds.ATTENTIONS, "recurrent", RecurrentAttention)
    return replace(TINY, attention=request.param)


def filled(config, rows, length, start):
    """Caches whose numbers all differ."""

    def numbers(array):
        nonlocal start
        start += array.size
        return np.arange(start - array.size, start).astype(array.dtype).reshape(array.shape)

    caches = new_caches(config, rows, length, jnp.float32, DEVICE)
    return [type(cache)(*map(numbers, cache)) for cache in caches]


def by_row(config, caches):
    """Arrays of each layer with positions, if any, as the second axis."""
    return [
        np.asarray(array) if axis is None else np.moveaxis(np.asarray(array), axis, 1)
        for cache in caches
        for array, axis in zip(cache, cache.position_axes(), strict=True)
    ]


def test_new_ones_are_empty_and_of_the_dtype_of_their_rule(config):
    caches = new_caches(config, 3, 5, np.dtype(jnp.bfloat16), DEVICE)
    assert len(caches) == config.num_layers
    for cache, shapes in zip(caches, [config.cache_shapes(la, 3, 5) for la in range(3)], strict=True):
        assert type(cache) is type(shapes)
        assert [array.shape for array in cache] == [array.shape for array in shapes]
        # XLA's CPU backend is slow with bfloat16; what says its dtype keeps it.
        assert [array.dtype for array in cache] == [array.dtype or np.float32 for array in shapes]
        assert not any(np.asarray(array).any() for array in cache)
    assert len(new_caches(config, 3, 5, np.float32, DEVICE, 2)) == 2
    assert cache_bytes(config, 3, 5, 4) == sum(array.nbytes for array in jax.tree.leaves(caches))


def test_caches_of_two_kinds_with_equal_arrays_are_apart(monkeypatch):
    class Other(KVCache):
        pass

    class OtherAttention:
        @staticmethod
        def cache_shapes(config, rows, length):
            return Other(*TINY.cache_shapes(0, rows, length))

    monkeypatch.setitem(kinds.ATTENTIONS, "other", OtherAttention)
    for kind, config in ((KVCache, TINY), (Other, replace(TINY, attention="other"))):
        assert type(new_caches(config, 1, 3, np.float32, DEVICE)[0]) is kind


def test_newcomers_take_the_first_positions_of_their_rows(config):
    before, newcomers = filled(config, 4, 6, 0), filled(config, 2, 4, 10_000)
    found = put_rows(jax.tree.map(jnp.asarray, before), np.array([2, 4], np.int32), newcomers)  # 4 is padding
    for held, new, now in zip(*(by_row(config, each) for each in (before, newcomers, found)), strict=True):
        expected = held.copy()
        expected[2, *(slice(size) for size in new.shape[1:2] if new.ndim > 2)] = new[0]
        np.testing.assert_array_equal(now, expected)


def test_they_grow_and_keep_what_they_hold(config):
    before = filled(config, 2, 3, 1)
    held = jax.tree.map(jnp.asarray, before)
    found = grow(held, 4, 7)
    empty = new_caches(config, 4, 7, np.float32, DEVICE)
    for old, now, new in zip(*(by_row(config, each) for each in (before, found, empty)), strict=True):
        assert now.shape == new.shape
        expected = new.copy()
        expected[tuple(map(slice, old.shape))] = old
        np.testing.assert_array_equal(now, expected)
    assert all(array.is_deleted() for array in jax.tree.leaves(held))
    with pytest.raises(ValueError, match="only grow: expected at least 4 rows of 7 positions, got 3 of 9"):
        grow(found, 3, 9)
    assert not any(array.is_deleted() for array in jax.tree.leaves(found))
    with pytest.raises(ValueError, match="expected at least 4 rows of 7 positions, got 4 of 6"):
        grow(found, 4, 6)
