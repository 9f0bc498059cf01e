"""Parts that every family shares: norms, rotary embedding, attention, router, experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.cache import KVCache, kv_shapes
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.experts import ExpertWeights, dense, matmul
from layerscope_jax.models.kinds import ATTENTIONS

PAD_POSITION = 2**30
"""Position of a padding token: no query reaches it as a key, and no cache has a row for it."""


class ExpertParam(nnx.Param):
    """Weights of routed experts: the part of a model that may live in host memory.

    `nnx.split(model, ExpertParam, ...)` parts them from everything else.
    """


class Routing(NamedTuple):
    """What the router decides for T tokens."""

    experts: jax.Array  # [T, K] int32, best first
    weights: jax.Array  # [T, K] float32
    logits: jax.Array  # [T, E] float32


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 0.02) -> jax.Array:
    return (scale * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, in float32."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.broadcast_to(self.scale[...], x.shape)
        return scale * wide.astype(x.dtype)


class Linear(nnx.Module):
    """`x @ weight (+ bias)`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.weight = nnx.Param(normal(rngs, (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x, self)[0]


def project(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """What each of some makes of `x`, their products in one go."""
    products = dense(x, *(linear.weight[...] for linear in linears))
    return [
        y if linear.bias is None else y + jnp.broadcast_to(linear.bias[...], y.shape)
        for y, linear in zip(products, linears, strict=True)
    ]


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), halves layout.

    Args:
        x: [B, S, H, D_head].
        positions: [B, S] int32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # [B, S, 1, D_head / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with grouped queries; scores and sums in float32.

    Heads lead the matrix products, so that a cache kept head by head is read as it lies: written out here
    because it is twice as fast on CPUs as `jax.nn.dot_product_attention`, which transposes.

    Args:
        query: [B, S, H, D_head].
        key: [B, H_kv, D_head, P].
        value: [B, H_kv, P, D_head]. In float32 both may hold numbers of the query's dtype, widened.
        mask: [B, S, P] True where a query may see a key.

    Returns:
        [B, S, H * D_head].
    """
    batch, length, heads, size = query.shape
    dtype = query.dtype
    groups = heads // key.shape[1]
    query = query.reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, -1, groups * length, size).astype(key.dtype)  # [B, H_kv, G * S, D_head]
    scores = jnp.matmul(query, key, preferred_element_type=jnp.float32) * size**-0.5
    scores = scores.reshape(batch, -1, groups, length, key.shape[3])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(dtype).astype(value.dtype)
    mixed = matmul(shares.reshape(batch, -1, groups * length, key.shape[3]), value).astype(dtype)
    mixed = mixed.reshape(batch, -1, groups, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, -1)


Attending = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, "int | None"], "jax.Array | None"]
"""`experts.attention.attention`, its table given."""

_attending: ContextVar[Attending | None] = ContextVar("attending", default=None)


@contextlib.contextmanager
def attending_by(attention: Attending) -> Iterator[None]:
    """While a program with caches is traced within, its attention is this, where this gives any."""
    before = _attending.set(attention)
    try:
        yield
    finally:
        _attending.reset(before)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries, optional QK norm, clipping, biases and sliding window."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        width, size = config.hidden_size, config.head_dim
        bias = config.attention_bias
        queries, keys = config.num_heads * size, config.num_kv_heads * size
        self.q = Linear(width, queries, bias=bias, rngs=rngs, dtype=dtype)
        self.k = Linear(width, keys, bias=bias, rngs=rngs, dtype=dtype)
        self.v = Linear(width, keys, bias=bias, rngs=rngs, dtype=dtype)
        self.o = Linear(queries, width, bias=bias, rngs=rngs, dtype=dtype)
        normed = {"none": None, "head": (size, size), "all": (queries, keys)}[config.qk_norm]
        self.q_norm = RMSNorm(normed[0], config.norm_eps, dtype) if normed else None
        self.k_norm = RMSNorm(normed[1], config.norm_eps, dtype) if normed else None

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
        query, key, value = project(hidden, self.q, self.k, self.v)
        query = rotate(self._heads(query, self.q_norm), positions, config.rope_theta)
        key = rotate(self._heads(key, self.k_norm), positions, config.rope_theta)
        value = self._heads(value, None)
        key_positions = positions[:, None, :]  # [B, 1, S]
        if cache is not None:
            rows, kind = jnp.arange(hidden.shape[0])[:, None], cache.key.dtype
            cache = KVCache(
                cache.key.at[rows, :, :, positions].set(key.astype(kind), mode="drop"),
                cache.value.at[rows, :, positions].set(value.astype(kind), mode="drop"),
            )
            if (attending := _attending.get()) is not None:
                mixed = attending(query, *cache, positions, config.sliding_window)
                if mixed is not None:
                    return self.o(mixed), cache
            key_positions = jnp.arange(cache.key.shape[3])[None, None, :]
        back = positions[:, :, None] - key_positions  # [B, S, P] how far back each key lies
        mask = back >= 0
        if config.sliding_window is not None:
            mask &= back < config.sliding_window
        if cache is None:
            key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)  # as in a cache
        else:
            key, value = cache
        return self.o(attend(query, key, value, mask)), cache

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        """Normalises, clips and splits a projection [B, S, H * D_head] into heads."""
        config = self.config
        if norm is not None and config.qk_norm == "all":
            x = norm(x)
        if config.qkv_clip is not None:
            x = jnp.clip(x, -config.qkv_clip, config.qkv_clip)
        x = x.reshape(*x.shape[:2], -1, config.head_dim)
        return norm(x) if norm is not None and config.qk_norm == "head" else x


ATTENTIONS["grouped"] = Attention


class Router(nnx.Module):
    """Softmax over all experts, then the K best, their weights scaled to one where the config asks."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        self.weight = nnx.Param(normal(rngs, (config.hidden_size, config.num_experts), dtype))

    def __call__(self, x: jax.Array) -> Routing:
        """Routes `x` [T, D]."""
        (logits,) = dense(x, self.weight[...])
        logits = logits.astype(jnp.float32)
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.config.experts_per_token)
        if self.config.normalize_top_k:
            weights /= weights.sum(-1, keepdims=True)
        return Routing(experts, weights, logits)


class SwiGLU(nnx.Module):
    """A dense feed-forward network: `(silu(x W_gate) * (x W_up)) W_down`."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.gate = Linear(width, inner, bias=False, rngs=rngs, dtype=dtype)
        self.up = Linear(width, inner, bias=False, rngs=rngs, dtype=dtype)
        self.down = Linear(inner, width, bias=False, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]; gated in float32."""
        gate, up = project(x, self.gate, self.up)
        return self.down((jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(x.dtype))


class Experts(nnx.Module):
    """The routed experts of one MoE layer, stacked: [E, D, F], [E, D, F], [E, F, D]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        def stack(name: str) -> ExpertParam:
            return ExpertParam(normal(rngs, (config.num_experts, *config.expert_shapes()[name]), dtype))

        self.gate, self.up, self.down = stack("gate"), stack("up"), stack("down")

    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.gate[...], self.up[...], self.down[...])
