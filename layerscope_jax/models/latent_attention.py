"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): heads share one compressed row a position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.attention import attend, attended
from layerscope_jax.models.cache import CacheArray
from layerscope_jax.models.config import LatentSizes, ModelConfig
from layerscope_jax.models.experts import products_of_rows
from layerscope_jax.models.invariance import WHOLE, in_blocks, is_invariant, lengthened
from layerscope_jax.models.layers import Linear, RMSNorm, normal
from layerscope_jax.models.rotary import rotate


class LatentCache(NamedTuple):
    """What one layer keeps of each position: the compressed row, and behind it the rotated key."""

    rows: jax.Array  # [B, P, R + E]

    @staticmethod
    def position_axes() -> tuple[int | None, ...]:
        return (1,)


def latent_attend(query: jax.Array, rows: jax.Array, mask: jax.Array, rank: int, scale: float) -> jax.Array:
    """Softmax attention in which keys and values of all heads are the same compressed rows.

    Args:
        query: [B, S, H, R + E]: of each head, for the compressed part and for the rotated key.
        rows: [B, P, R + E]; in float32 they may hold numbers of the query's dtype, widened.
        mask: [B, S, P] True where a query may see a row.
        rank: R.
        scale: what scores are multiplied with.

    Returns:
        [B, S, H, R] mixed compressed rows.
    """
    batch, length, heads, _ = query.shape
    flat = query.reshape(batch, length * heads, -1).astype(rows.dtype)
    scores = jnp.einsum("bqc,bpc->bqp", flat, rows, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(batch, length, heads, -1)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(query.dtype).astype(rows.dtype)
    shares = shares.reshape(batch, length * heads, -1)
    mixed = jnp.einsum("bqp,bpr->bqr", shares, rows[..., :rank], preferred_element_type=jnp.float32)
    return mixed.astype(query.dtype).reshape(batch, length, heads, rank)


LatentAttending = Callable[[jax.Array, jax.Array, jax.Array, int, float], "jax.Array | None"]
"""As `latent_attend`, with positions [B, S] in the place of the mask; None where it does not suit."""

_attending: ContextVar[LatentAttending | None] = ContextVar("latent attending", default=None)


@contextmanager
def latent_attending_by(attention: LatentAttending) -> Iterator[None]:
    """While a program with caches is traced within, its latent attention is this, where this gives any."""
    before = _attending.set(attention)
    try:
        yield
    finally:
        _attending.reset(before)


def head_matmul(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`x` [..., H, K] times the matrix [N, K] of each head [H, N, K]: [..., H, N], summed as by `matmul`.

    Heads lead: with them in between, as in an einsum, XLA's CPU backend has no product of bfloat16.
    """
    heads, width, depth = weights.shape

    def product(rows: jax.Array) -> jax.Array:  # [M, H, K] -> [M, H, N]
        return products_of_rows(rows.swapaxes(0, 1), weights).swapaxes(0, 1)

    rows = x.reshape(-1, heads, depth)
    result = in_blocks(product, rows) if is_invariant() else product(rows)
    return result.reshape(*x.shape[:-1], width).astype(x.dtype)


HeadProducts = Callable[[jax.Array, jax.Array], jax.Array]
"""As `head_matmul`."""

_head_products: ContextVar[HeadProducts] = ContextVar("head products", default=head_matmul)


@contextmanager
def head_products_by(products: HeadProducts) -> Iterator[None]:
    """While a program is traced within, products with a matrix for each head are these."""
    before = _head_products.set(products)
    try:
        yield
    finally:
        _head_products.reset(before)


def expanding_pays(tokens: int, length: int, sizes: LatentSizes) -> bool:
    """Whether making keys and values takes fewer multiplications than attending to compressed rows.

    Args:
        tokens: S, of each row.
        length: P, rows that are there for each.
        sizes: of the model.

    >>> sizes = LatentSizes(query_rank=None, rank=512, rope=64, nope=128, value=128)
    >>> [expanding_pays(*shape, sizes) for shape in [(1, 2048), (128, 2048), (256, 2048), (32, 32)]]
    [False, False, True, True]
    """
    made = sizes.nope + sizes.value  # numbers of a head's key and value that are made of a row
    saved = tokens * length * (2 * sizes.rank - made)
    return tokens > 1 and saved > (length - tokens) * sizes.rank * made


class LatentAttention(nnx.Module):
    """Causal self-attention over compressed rows.

    For few tokens keys and values are never made: what would expand a row into a head's key is multiplied
    into the query, and what would expand it into a head's value into the mixed row, which is the same by
    associativity. For many (`expanding_pays`) they are made of the rows, and forgotten.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        sizes, width, heads = latent_sizes(config), config.hidden_size, config.num_heads
        bias = config.attention_bias

        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, bias=bias, rngs=rngs, dtype=dtype)

        queries = heads * (sizes.nope + sizes.rope)
        if sizes.query_rank is None:
            self.q = linear(width, queries)
        else:
            self.q_down = linear(width, sizes.query_rank, bias)
            self.q_norm = RMSNorm(sizes.query_rank, NORM_EPS, dtype)
            self.q_up = linear(sizes.query_rank, queries)
        self.kv_down = linear(width, sizes.rank + sizes.rope, bias)
        self.kv_norm = RMSNorm(sizes.rank, NORM_EPS, dtype)
        self.key_up = nnx.Param(normal(rngs, (heads, sizes.rank, sizes.nope), dtype))
        self.value_up = nnx.Param(normal(rngs, (heads, sizes.value, sizes.rank), dtype))
        self.o = linear(heads * sizes.value, width, bias)

    @staticmethod
    def cache_shapes(config: ModelConfig, rows: int, length: int) -> Any:
        """Its cache (`ModelConfig.cache_shapes`)."""
        sizes = latent_sizes(config)
        array: Any = CacheArray((rows, length, sizes.rank + sizes.rope))
        return LatentCache(array)

    def __call__(
        self, hidden: jax.Array, positions: jax.Array, cache: LatentCache | None
    ) -> tuple[jax.Array, LatentCache | None]:
        """Attends from `hidden` [B, S, D] at `positions` [B, S] to everything at or before them.

        As of `attention.Attention`.
        """
        query = self._queries(hidden, positions)
        rows = self._rows(hidden, positions)  # [B, S, R + E]
        key_positions = positions[:, None, :]  # [B, 1, S]
        if cache is not None:
            batch = jnp.arange(hidden.shape[0])[:, None]
            kept = cache.rows.at[batch, positions].set(rows.astype(cache.rows.dtype), mode="drop")
            cache, rows = LatentCache(kept), kept
            key_positions = jnp.arange(rows.shape[1])[None, None, :]
        mask = positions[:, :, None] >= key_positions
        many = expanding_pays(hidden.shape[1], rows.shape[1], latent_sizes(self.config))
        many = many and not is_invariant()  # or the way would depend on the shape of the step
        mix = self._expanded if many else self._absorbed
        return self.o(mix(query, rows, positions, mask, cache is not None)), cache

    def _absorbed(
        self, query: jax.Array, rows: jax.Array, positions: jax.Array, mask: jax.Array, cached: bool
    ) -> jax.Array:
        """Mixed values [B, S, H * V] of queries [B, S, H, nope + E] that see compressed rows as they are."""
        sizes, scale = latent_sizes(self.config), self._scale()
        absorbed = _head_products.get()(query[..., : sizes.nope], self.key_up[...])
        query = jnp.concatenate([absorbed, query[..., sizes.nope :]], axis=-1)
        attending, mixed = _attending.get(), None
        if cached and attending is not None:
            if query.shape[1] > 1 and is_invariant():  # zeros add nothing, and more is mixed than is used
                rank = sizes.rank + -sizes.rank % WHOLE
                mixed = attending(lengthened(query, 3), lengthened(rows, 1, 2), positions, rank, scale)
                mixed = None if mixed is None else mixed[..., : sizes.rank]
            else:
                mixed = attending(query, rows, positions, sizes.rank, scale)
        if mixed is None:
            mixed = latent_attend(query, rows, mask, sizes.rank, scale)
        return _head_products.get()(mixed, self.value_up[...]).reshape(*query.shape[:2], -1)

    def _expanded(
        self, query: jax.Array, rows: jax.Array, positions: jax.Array, mask: jax.Array, cached: bool
    ) -> jax.Array:
        """The same by keys and values of every head, made of the rows."""
        rank, dtype = latent_sizes(self.config).rank, query.dtype
        compressed, turned = rows[..., :rank].astype(dtype), rows[..., rank:].swapaxes(1, 2)  # [B, E, P]

        def made(kind: str, *parts: jax.Array) -> jax.Array:
            wide = jnp.einsum(kind, *parts, preferred_element_type=jnp.float32)
            return wide.astype(dtype).astype(rows.dtype)

        keys = made("hrn,bpr->bhnp", self.key_up[...], compressed)
        turned = jnp.broadcast_to(turned[:, None], (*keys.shape[:2], *turned.shape[1:]))
        keys = jnp.concatenate([keys, turned], axis=2)  # [B, H, nope + E, P]
        values = made("bpr,hvr->bhpv", compressed, self.value_up[...])
        mixed = None
        if cached:
            mixed = attended(query, keys, values, positions, None, self._scale(), None)
        return attend(query, keys, values, mask, self._scale()) if mixed is None else mixed

    def _scale(self) -> float:
        sizes = latent_sizes(self.config)
        return self.config.attention_scale or (sizes.nope + sizes.rope) ** -0.5

    def _queries(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, S, H, nope + E]."""
        sizes = latent_sizes(self.config)
        compressed = sizes.query_rank is not None
        flat = self.q_up(self.q_norm(self.q_down(hidden))) if compressed else self.q(hidden)
        query = flat.reshape(*hidden.shape[:2], self.config.num_heads, -1)
        plain, turned = query[..., : sizes.nope], rotate(query[..., sizes.nope :], positions, self.config)
        return jnp.concatenate([plain, turned], axis=-1)

    def _rows(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, S, R + E]."""
        rank = latent_sizes(self.config).rank
        both = self.kv_down(hidden)
        turned = rotate(both[..., None, rank:], positions, self.config)[:, :, 0]
        return jnp.concatenate([self.kv_norm(both[..., :rank]), turned], axis=-1)


NORM_EPS = 1e-6
"""Epsilon of the norms of compressed rows, which no config names."""


def latent_sizes(config: ModelConfig) -> LatentSizes:
    """The sizes of a model's latent attention."""
    assert config.latent is not None
    return config.latent
