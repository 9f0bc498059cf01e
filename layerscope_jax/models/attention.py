"""Attention with grouped queries, by which most families attend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.cache import KVCache, kv_shapes
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.invariance import is_invariant, lengthened
from layerscope_jax.models.layers import Linear, RMSNorm, norm_of, normal, project
from layerscope_jax.models.rotary import rotate


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with grouped queries; scores and sums in float32.

    Heads lead the matrix products, so that a cache kept head by head is read as it lies: written out here
    because it is twice as fast on CPUs as `jax.nn.dot_product_attention`, which transposes.

    Args:
        query: [B, S, H, D_head].
        key: [B, H_kv, D_head, P].
        value: [B, H_kv, P, D_value]. In float32 both may hold numbers of the query's dtype, widened.
        mask: [B, S, P] True where a query may see a key.
        scale: what scores are multiplied with; None for `D_head ** -0.5`.
        sinks: [H] a score for each head that takes its share of the softmax and adds nothing; None for none.

    Returns:
        [B, S, H * D_value].
    """
    batch, length, heads, size = query.shape
    dtype = query.dtype
    groups = heads // key.shape[1]
    query = query.reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, -1, groups * length, size).astype(key.dtype)  # [B, H_kv, G * S, D_head]
    scores = jnp.matmul(query, key, preferred_element_type=jnp.float32)
    scores *= size**-0.5 if scale is None else scale
    scores = scores.reshape(batch, -1, groups, length, key.shape[3])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        shares = jax.nn.softmax(scores, axis=-1)
    else:
        extra = sinks.astype(jnp.float32).reshape(1, -1, groups, 1, 1)
        extra = jnp.broadcast_to(extra, (*scores.shape[:-1], 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, extra], axis=-1), axis=-1)[..., :-1]
    shares = shares.astype(dtype).astype(value.dtype)
    shares = shares.reshape(batch, -1, groups * length, key.shape[3])
    mixed = jnp.matmul(shares, value, preferred_element_type=jnp.float32).astype(dtype)
    mixed = mixed.reshape(batch, -1, groups, length, value.shape[-1]).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, -1)


Attending = Callable[..., "jax.Array | None"]
"""`layerscope_jax.kernels.attention.attention`, its table given."""

_attending: ContextVar[Attending | None] = ContextVar("attending", default=None)


@contextlib.contextmanager
def attending_by(attention: Attending) -> Iterator[None]:
    """While a program with caches is traced within, its attention is this, where this gives any."""
    before = _attending.set(attention)
    try:
        yield
    finally:
        _attending.reset(before)


def attended(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    window: int | None,
    scale: float | None,
    sinks: jax.Array | None,
) -> jax.Array | None:
    """What `attending_by` gives for its arguments; None where there is none, or it does not suit."""
    attending = _attending.get()
    if attending is None:
        return None
    if query.shape[1] == 1 or not is_invariant():
        return attending(query, key, value, positions, window, scale, sinks)
    # So that sizes with a rest suit as well: zeros add nothing, and nobody sees positions behind the last.
    (batch, length, heads, size), width = query.shape, value.shape[-1]
    mixed = attending(
        lengthened(query, 3),
        lengthened(key, 2, 3),
        lengthened(value, 2, 3),
        positions,
        window,
        size**-0.5 if scale is None else scale,
        sinks,
    )
    if mixed is None:
        return None
    return mixed.reshape(batch, length, heads, -1)[..., :width].reshape(batch, length, -1)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries.

    As the config says: biases, norms of queries and keys, clipping, a partial rotary embedding, a sliding
    window, sinks, a scale of the scores, and gates of what is mixed.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        width, size = config.hidden_size, config.head_dim
        bias = config.attention_bias
        out_bias = bias if config.attention_out_bias is None else config.attention_out_bias
        queries, keys = config.num_heads * size, config.num_kv_heads * size
        # With gates, those of each head come behind its query.
        gated = 2 if config.attention_gate else 1
        self.q = Linear(width, gated * queries, bias=bias, rngs=rngs, dtype=dtype)
        self.k = Linear(width, keys, bias=bias, rngs=rngs, dtype=dtype)
        self.v = Linear(width, keys, bias=bias, rngs=rngs, dtype=dtype)
        self.o = Linear(queries, width, bias=out_bias, rngs=rngs, dtype=dtype)
        self.sinks = nnx.Param(normal(rngs, (config.num_heads,), dtype)) if config.attention_sinks else None
        normed = {"none": None, "head": (size, size), "all": (queries, keys)}[config.qk_norm]
        self.q_norm = norm_of(config, normed[0], dtype) if normed else None
        self.k_norm = norm_of(config, normed[1], dtype) if normed else None

    @staticmethod
    def cache_shapes(config: ModelConfig, rows: int, length: int) -> Any:
        """Its cache (`ModelConfig.cache_shapes`)."""
        return kv_shapes(rows, config.num_kv_heads, config.head_dim, length)

    def __call__(
        self, hidden: jax.Array, positions: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends from `hidden` [B, S, D] at `positions` [B, S] to everything at or before them.

        Without a cache the keys are the inputs' own. With one, the inputs' keys are first written at their
        positions; positions past its end (`PAD_POSITION`) are dropped.
        """
        config = self.config
        query, key, value = self.projected(hidden)
        gate = None
        if config.attention_gate:
            both = query.reshape(*hidden.shape[:2], config.num_heads, -1)
            query, gate = (x.reshape(*hidden.shape[:2], -1) for x in jnp.split(both, 2, axis=-1))
        query = self.rotated(query, self.q_norm, positions)
        key = self.rotated(key, self.k_norm, positions)
        value = self.valued(value)
        sinks = None if self.sinks is None else self.sinks[...]
        key_positions = positions[:, None, :]  # [B, 1, S]
        if cache is not None:
            rows, kind = jnp.arange(hidden.shape[0])[:, None], cache.key.dtype
            cache = KVCache(
                cache.key.at[rows, :, :, positions].set(key.astype(kind), mode="drop"),
                cache.value.at[rows, :, positions].set(value.astype(kind), mode="drop"),
            )
            mixed = attended(query, *cache, positions, config.sliding_window, config.attention_scale, sinks)
            if mixed is not None:
                return self.output(mixed, gate), cache
            key_positions = jnp.arange(cache.key.shape[3])[None, None, :]
        back = positions[:, :, None] - key_positions  # [B, S, P] how far back each key lies
        mask = back >= 0
        if config.sliding_window is not None:
            mask &= back < config.sliding_window
        if cache is None:
            key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)  # as in a cache
        else:
            key, value = cache
        return self.output(attend(query, key, value, mask, config.attention_scale, sinks), gate), cache

    def output(self, mixed: jax.Array, gate: jax.Array | None) -> jax.Array:
        """What heads [B, S, H * D_head] add to the residual stream, gated if there are gates for them."""
        return self.o(mixed if gate is None else mixed * jax.nn.sigmoid(gate))

    def projected(self, hidden: jax.Array) -> list[jax.Array]:
        """Queries (with gates), keys and values of `hidden` [B, S, D], each [B, S, H * D_head]."""
        return project(hidden, self.q, self.k, self.v)

    def valued(self, x: jax.Array) -> jax.Array:
        """Heads [B, S, H, D_head] of a projection of values; a subclass may normalise them."""
        return self._heads(x, None)

    def rotated(self, x: jax.Array, norm: RMSNorm | None, positions: jax.Array) -> jax.Array:
        """Heads of a projection of queries or keys, normalised and then rotated.

        A subclass may do so in another order.

        Args:
            x: [B, S, H * D_head].
            norm: of queries or of keys; None where they have none.
            positions: [B, S].

        Returns:
            [B, S, H, D_head].
        """
        return rotate(self._heads(x, norm), positions, self.config, self.config.rotary_dim)

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        """Normalises, clips and splits a projection [B, S, H * D_head] into heads."""
        config = self.config
        if norm is not None and config.qk_norm == "all":
            x = norm(x)
        if config.qkv_clip is not None:
            x = jnp.clip(x, -config.qkv_clip, config.qkv_clip)
        x = x.reshape(*x.shape[:2], -1, config.head_dim)
        return norm(x) if norm is not None and config.qk_norm == "head" else x
