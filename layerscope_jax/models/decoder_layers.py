"""Decoder layers: attention, and what follows it, a dense feed-forward network or routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.kinds import ATTENTIONS, FEED_FORWARDS
from layerscope_jax.models.layers import RMSNorm, Router, Routing, SwiGLU


class DecoderLayer(nnx.Module):
    """What all decoder layers share: attention, and the norm before it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.attention = ATTENTIONS[config.attention](config, rngs=rngs, dtype=dtype)

    def attend(self, hidden: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Hidden states [B, S, D] after attention, and the cache with the new positions."""
        with jax.named_scope("attend"):
            mixed, cache = self.attention(self.attention_norm(hidden), positions, cache)
            return hidden + mixed, cache


class DenseLayer(DecoderLayer):
    """A decoder layer without experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        assert config.intermediate_size is not None
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)

    def __call__(self, hidden: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """The whole layer: hidden states [B, S, D], and the cache with the new positions."""
        hidden, cache = self.attend(hidden, positions, cache)
        with jax.named_scope("dense"):
            flat = hidden.reshape(-1, hidden.shape[-1])  # [T, D]
            return hidden + self.mlp(self.mlp_norm(flat)).reshape(hidden.shape), cache


class RouterWeights(NamedTuple):
    """The router of a MoE layer, and the norm whose output it reads."""

    weight: Any  # [D, E]
    scale: Any  # [D]


class RoutedLayer(DecoderLayer):
    """The dense part of a MoE layer: everything but its experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.moe_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.router = Router(config, rngs=rngs, dtype=dtype)

    def beside(self, inputs: jax.Array) -> jax.Array | None:
        """[T, D] what is added beside the experts' outputs, of the same inputs; None for nothing."""
        return None

    def attend_and_route(
        self, hidden: jax.Array, positions: jax.Array, cache: Any
    ) -> tuple[jax.Array, jax.Array, Routing, Any]:
        """Everything of a layer that comes before its experts.

        Args:
            hidden: [B, S, D].
            positions: [B, S] int32; `PAD_POSITION` marks padding.
            cache: of this layer, or None to attend within `hidden` alone.

        Returns:
            hidden: [B, S, D] after attention, with what is added beside the experts.
            inputs: [T, D] what the experts read, T = B * S.
            routing: the chosen experts.
            cache: with the new positions.
        """
        hidden, cache = self.attend(hidden, positions, cache)
        with jax.named_scope("route"):
            inputs = self.moe_norm(hidden).reshape(-1, hidden.shape[-1])
            routing = self.router(inputs)
        with jax.named_scope("beside"):
            if (beside := self.beside(inputs)) is not None:
                hidden = hidden + beside.reshape(hidden.shape)
        return hidden, inputs, routing, cache

    @staticmethod
    def router_of(params: Mapping[str, Any]) -> RouterWeights:
        """The router among the parameters of such a layer, a pure dict."""
        return RouterWeights(params["router"]["weight"], params["moe_norm"]["scale"])


FEED_FORWARDS["dense"] = DenseLayer
FEED_FORWARDS["routed"] = RoutedLayer


def layer_type(config: ModelConfig, layer: int) -> Any:
    """The class of a decoder layer of a model."""
    return FEED_FORWARDS[config.layer_kind(layer).feed_forward]
