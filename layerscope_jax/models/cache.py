"""What layers remember of earlier positions: how their caches lie in memory, and what is done with them.

Only this file and the attention that reads a cache know its layout. A cache of one layer is a NamedTuple of
arrays whose first axis is rows, one a sequence. Its `position_axes` says which axis of each is positions, or
None where an array has none (a recurrent state).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.models.config import ModelConfig


class CacheArray(NamedTuple):
    """One array of a layer's cache.

    Attributes:
        shape: [B, ...].
        dtype: None for the rule of `new_caches`; a dtype where the array must have it.
    """

    shape: tuple[int, ...]
    dtype: Any = None


class KVCache(NamedTuple):
    """Keys and values of one layer, by position.

    Keys lie as their product with queries reads them: where several queries share a key, turning them there
    takes up to twice as long again on CPUs (`benchmarks/NOTES.md`).
    """

    key: jax.Array  # [B, H_kv, D_head, P]
    value: jax.Array  # [B, H_kv, P, D_head]

    @staticmethod
    def position_axes() -> tuple[int | None, ...]:
        return 3, 2


def kv_shapes(rows: int, heads: int, size: int, length: int) -> Any:
    """The cache of attention with `heads` heads of keys and values of `size` numbers each."""
    key: Any = CacheArray((rows, heads, size, length))
    value: Any = CacheArray((rows, heads, length, size))
    return KVCache(key, value)


def new_caches(
    config: ModelConfig,
    rows: int,
    length: int,
    dtype: np.dtype,
    device: jax.Device | jax.sharding.Sharding,
    layers: int | None = None,
) -> list[Any]:
    """Empty caches for `rows` sequences of up to `length` positions, one for each decoder layer.

    On a CPU they hold float32 whatever the model's dtype: there XLA widens bfloat16 anew for each product,
    and for each write the whole cache (a step with 2,048 positions takes eight times as long).

    Args:
        config: of the model.
        rows, length: B, P.
        dtype: of the model's weights.
        device: where they lie: a device, or several by their sharding.
        layers: for the first so many decoder layers alone; None for all.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=3, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True)
    >>> caches = new_caches(config, 2, 16, np.dtype(jnp.bfloat16), jax.devices("cpu")[0])
    >>> len(caches), caches[0].key.shape, caches[0].key.dtype.name
    (3, (2, 1, 4, 16), 'float32')
    """
    place = device
    if isinstance(device, jax.Device):
        place = jax.sharding.SingleDeviceSharding(device)
    platform = next(iter(place.device_set)).platform
    kind = np.dtype(np.float32) if platform == "cpu" else np.dtype(dtype)
    count = config.num_layers if layers is None else layers
    shapes = [config.cache_shapes(layer, rows, length) for layer in range(count)]
    types: list[Any] = list(map(type, shapes))  # of other types, the same arrays are another cache
    return [_empty(*each, kind, place)() for each in zip(types, map(tuple, shapes), strict=True)]


@functools.cache
def _empty(
    kind: Callable[..., Any], arrays: tuple[CacheArray, ...], dtype: np.dtype, place: jax.sharding.Sharding
) -> Callable[[], Any]:
    """Makes the cache of one layer; jitted, so that each size is one program."""

    def empty() -> Any:
        return kind(*(jnp.zeros(array.shape, array.dtype or dtype) for array in arrays))

    return jax.jit(empty, out_shardings=place)


def cache_bytes(config: ModelConfig, rows: int, length: int, itemsize: int) -> int:
    """Bytes of the caches of all layers.

    Args:
        config: of the model.
        rows, length: B, P.
        itemsize: bytes of a number, in arrays without a dtype of their own.
    """
    return sum(
        math.prod(array.shape) * (itemsize if array.dtype is None else np.dtype(array.dtype).itemsize)
        for layer in range(config.num_layers)
        for array in config.cache_shapes(layer, rows, length)
    )


@functools.partial(jax.jit, donate_argnames="caches")
def put_rows(caches: list[Any], rows: jax.Array, newcomers: list[Any]) -> list[Any]:
    """Writes the caches of newcomers over the first positions of the rows that become theirs.

    What an earlier request left behind them lies after every position that the new one attends to, until the
    new one has written there itself.

    Args:
        caches: of B rows and P positions, one for each decoder layer, donated.
        rows: [N] int32; B or more for padding, which is dropped.
        newcomers: of N rows and at most P positions, one for each decoder layer.
    """

    def put(held: jax.Array, new: jax.Array) -> jax.Array:
        places = (
            slice(None if whole == part else part)
            for whole, part in zip(held.shape[1:], new.shape[1:], strict=True)
        )
        return held.at[(rows, *places)].set(new, mode="drop")

    return jax.tree.map(put, caches, newcomers)


@jax.jit
def take_rows(caches: list[Any], rows: jax.Array) -> list[Any]:
    """Copies rows into caches of their own, of as many positions.

    Args:
        caches: of B rows, one for each decoder layer.
        rows: [N] int32; B or more for a row of zeros.
    """
    return jax.tree.map(lambda held: held.at[rows].get(mode="fill", fill_value=0), caches)


def grow(caches: Sequence[Any], rows: int, length: int) -> list[Any]:
    """The same caches with room for `rows` sequences of up to `length` positions; what is added is zeros.

    Args:
        caches: one for each decoder layer, given up: each is deleted when its larger copy is on its way, so
            that one layer alone is in memory twice.
        rows: B, no fewer than there are.
        length: P, no less than there is.

    Raises:
        ValueError: if they have more rows or positions than asked for.
    """
    for cache in caches:
        for array, axis in zip(cache, cache.position_axes(), strict=True):
            held = length if axis is None else array.shape[axis]
            if array.shape[0] > rows or held > length:
                raise ValueError(
                    f"caches only grow: expected at least {array.shape[0]} rows of {held} positions, got "
                    f"{rows} of {length}"
                )
    grown = []
    for cache in caches:
        grown.append(_grown(cache, rows, length))
        for array in cache:
            array.delete()
    return grown


@functools.partial(jax.jit, static_argnames=("rows", "length"))
def _grown(cache: Any, rows: int, length: int) -> Any:
    def larger(array: jax.Array, axis: int | None) -> jax.Array:
        added = [(0, 0)] * array.ndim
        added[0] = (0, rows - array.shape[0])
        if axis is not None:
            added[axis] = (0, length - array.shape[axis])
        return jnp.pad(array, added)

    return type(cache)(*map(larger, cache, cache.position_axes()))
