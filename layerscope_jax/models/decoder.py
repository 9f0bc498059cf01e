"""The decoder: trained, run whole (every expert resident) and run layer by layer from one definition."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.experts import combine, dense, matmul, stacked_ffn
from layerscope_jax.models.layers import Attention, Experts, KVCache, RMSNorm, Router, Routing, normal


class DecoderLayer(nnx.Module):
    """The dense part of one layer: everything but its experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.moe_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.router = Router(config, rngs=rngs, dtype=dtype)

    def attend_and_route(
        self, hidden: jax.Array, positions: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, jax.Array, Routing, KVCache | None]:
        """Everything of a layer that comes before its experts.

        Args:
            hidden: [B, S, D].
            positions: [B, S] int32; `PAD_POSITION` marks padding.
            cache: this layer's keys and values, or None to attend within `hidden` alone.

        Returns:
            hidden: [B, S, D] after attention.
            inputs: [T, D] what the experts read, T = B * S.
            routing: the chosen experts.
            cache: with the new keys and values.
        """
        with jax.named_scope("attend"):
            mixed, cache = self.attention(self.attention_norm(hidden), positions, cache)
            hidden = hidden + mixed
        with jax.named_scope("route"):
            inputs = self.moe_norm(hidden).reshape(-1, hidden.shape[-1])
            return hidden, inputs, self.router(inputs), cache


class Decoder(nnx.Module):
    """A mixture-of-experts language model.

    Args:
        config: its shape.
        rngs: random streams for the initial weights.
        dtype: of every parameter.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> logits, routings = model(jnp.array([[1, 2, 3]]))
    >>> logits.shape, routings[0].experts.shape
    ((1, 3, 32), (3, 2))
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.embedding = nnx.Param(normal(rngs, (config.vocab_size, config.hidden_size), dtype))
        layers = range(config.num_layers)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs, dtype=dtype) for _ in layers])
        self.experts = nnx.List([Experts(config, rngs=rngs, dtype=dtype) for _ in layers])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        head = None if config.tie_embeddings else normal(rngs, (config.hidden_size, config.vocab_size), dtype)
        self.head = None if head is None else nnx.Param(head)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, S] ids -> [B, S, D]."""
        return self.embedding[...][tokens]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] hidden states after the last layer -> [..., V] float32."""
        hidden = self.norm(hidden)
        if self.head is None:  # only XLA multiplies with what is transposed without a copy
            return matmul(hidden, self.embedding[...].T).astype(jnp.float32)
        return dense(hidden, self.head[...])[0].astype(jnp.float32)

    def next_logits(self, hidden: jax.Array, last: jax.Array) -> jax.Array:
        """Of each row's token `last` [B] alone: hidden [B, S, D] after the last layer -> [B, V] float32."""
        rows = jnp.arange(len(hidden))
        wanted = hidden[rows, last]
        if len(wanted) == 1:  # a product with one row is slow on CPUs
            wanted = jnp.repeat(wanted, 2, 0)
        return self.logits(wanted)[: len(hidden)]

    def run(
        self, hidden: jax.Array, positions: jax.Array, caches: Sequence[KVCache] | None
    ) -> tuple[jax.Array, list[Routing], list[KVCache] | None]:
        """All layers, every expert resident: hidden [B, S, D] -> [B, S, D]."""
        routings, new_caches = [], []
        for index, (layer, experts) in enumerate(zip(self.layers, self.experts, strict=True)):
            cache = None if caches is None else caches[index]
            hidden, inputs, routing, cache = layer.attend_and_route(hidden, positions, cache)
            with jax.named_scope("experts"):
                outputs = stacked_ffn(inputs, routing.experts, experts.weights())
                flat = combine(hidden.reshape(inputs.shape), outputs, routing.weights)
                hidden = flat.reshape(hidden.shape)
            routings.append(routing)
            if cache is not None:
                new_caches.append(cache)
        return hidden, routings, None if caches is None else new_caches

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None
    ) -> tuple[jax.Array, list[Routing]]:
        """Logits of whole sequences, without a cache: training, scoring and the oracle of the tests.

        Args:
            tokens: [B, S] int32.
            positions: [B, S] int32, `PAD_POSITION` at padding; left, right or no padding alike. None for
                0..S-1 in every row.

        Returns:
            logits: [B, S, V] float32 (meaningless at padding).
            routings: what each layer's router decided for the B * S tokens.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, routings, _ = self.run(self.embed(tokens), positions, None)
        return self.logits(hidden), routings
