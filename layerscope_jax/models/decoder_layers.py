"""Decoder layers: attention, and what follows it, a dense feed-forward network or routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.attention import Attention
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.delta_net import DeltaNet
from layerscope_jax.models.kinds import ATTENTIONS, FEED_FORWARDS
from layerscope_jax.models.latent_attention import LatentAttention
from layerscope_jax.models.layers import GatedMLP, Linear, norm_of
from layerscope_jax.models.router import Router, Routing


class DecoderLayer(nnx.Module):
    """What all decoder layers share: attention, and the norm before it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        self.attention_norm = norm_of(config, config.hidden_size, dtype)
        self.attention = ATTENTIONS[config.attention](config, rngs=rngs, dtype=dtype)

    def attend(self, hidden: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Hidden states [B, S, D] after attention, and the cache with the new positions."""
        with jax.named_scope("attend"):
            mixed, cache = self.attention(self.attention_norm(hidden), positions, cache)
            return hidden + self.scaled(mixed), cache

    def scaled(self, added: jax.Array) -> jax.Array:
        """What is to be added to the residual stream, times the model's `residual_scale`."""
        scale = self.config.residual_scale
        return added if scale == 1.0 else added * scale


class DenseLayer(DecoderLayer):
    """A decoder layer without experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        assert config.intermediate_size is not None
        self.mlp_norm = norm_of(config, config.hidden_size, dtype)
        self.mlp = mlp_of(config, config.intermediate_size, rngs=rngs, dtype=dtype)

    def __call__(self, hidden: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """The whole layer: hidden states [B, S, D], and the cache with the new positions."""
        hidden, cache = self.attend(hidden, positions, cache)
        with jax.named_scope("dense"):
            flat = hidden.reshape(-1, hidden.shape[-1])  # [T, D]
            return hidden + self.scaled(self.mlp(self.mlp_norm(flat))).reshape(hidden.shape), cache


def mlp_of(config: ModelConfig, inner: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> GatedMLP:
    """A dense feed-forward network of a model."""
    return GatedMLP(
        config.hidden_size, inner, body=config.expert_body, bias=config.mlp_bias, rngs=rngs, dtype=dtype
    )


class RouterWeights(NamedTuple):
    """The router of a MoE layer, and the norm whose output it reads.

    Attributes:
        weight: [E, D].
        scale: [D], of the norm.
        bias: [E], added to the logits; None for none.
        selection_bias: [E], added to the scores for choosing alone; None for none.
    """

    weight: Any
    scale: Any
    bias: Any = None
    selection_bias: Any = None


class RoutedLayer(DecoderLayer):
    """The dense part of a MoE layer: everything but its experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.moe_norm = norm_of(config, config.hidden_size, dtype)
        self.router = Router(config, rngs=rngs, dtype=dtype)
        if (inner := config.shared_intermediate_size) is not None:
            self.shared = mlp_of(config, inner, rngs=rngs, dtype=dtype)
        if config.shared_gate:
            self.shared_gate = Linear(config.hidden_size, 1, bias=False, packs=False, rngs=rngs, dtype=dtype)

    def beside(self, inputs: jax.Array) -> jax.Array | None:
        """What is added beside the experts' outputs, of the same inputs.

        Args:
            inputs: [T, D].

        Returns:
            [T, D] the output of the expert that all tokens go through; None where there is none.
        """
        if self.config.shared_intermediate_size is None:
            return None
        output = self.shared(inputs)
        return jax.nn.sigmoid(self.shared_gate(inputs)) * output if self.config.shared_gate else output

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
            routing = routing._replace(weights=self.scaled(routing.weights))
        with jax.named_scope("beside"):
            if (beside := self.beside(inputs)) is not None:
                hidden = hidden + self.scaled(beside).reshape(hidden.shape)
        return hidden, inputs, routing, cache

    @staticmethod
    def router_of(params: Mapping[str, Any], config: ModelConfig) -> RouterWeights:
        """The router among the parameters of such a layer of a model, a pure dict."""
        scale, router = params["moe_norm"]["scale"], params["router"]
        scale = scale + 1 if config.norm == "rms_offset" else scale
        return RouterWeights(router["weight"], scale, router.get("bias"), router.get("selection_bias"))


ATTENTIONS |= {"grouped": Attention, "latent": LatentAttention, "delta": DeltaNet}
FEED_FORWARDS |= {"dense": DenseLayer, "routed": RoutedLayer}


def new_layer(config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> Any:
    """Makes a decoder layer of a model."""
    return layer_type(config, layer)(config.of_layer(layer), rngs=rngs, dtype=dtype)


def layer_type(config: ModelConfig, layer: int) -> Any:
    """The class of a decoder layer of a model."""
    return FEED_FORWARDS[config.layer_kind(layer).feed_forward]
