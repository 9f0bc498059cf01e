"""The layers of Gemma 4: what the fields of a `ModelConfig` do not say of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.attention import Attention
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder_layers import RoutedLayer, RouterWeights
from layerscope_jax.models.layers import norm_of, project, rms_norm
from layerscope_jax.models.rotary import RopeScaling
from layerscope_jax.models.router import Routing

NORM: Any = "rms_float32"
"""How its norms scale what they divide."""


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(ModelConfig):
    """The shape of such a model: what layers without a window have of their own.

    Attributes:
        full_head_dim, full_kv_heads: sizes of their heads.
        full_rope_theta, full_rope_scaling: their rotary embedding.
        keys_as_values: whether their values are made of the same projection as their keys.
    """

    full_head_dim: int
    full_kv_heads: int
    full_rope_theta: float
    full_rope_scaling: RopeScaling | None
    keys_as_values: bool

    def of_layer(self, layer: int) -> ModelConfig:
        config = super().of_layer(layer)
        assert isinstance(config, Gemma4Config)
        if layer not in self.full_attention_layers:
            return replace(config, keys_as_values=False)
        return replace(
            config,
            head_dim=self.full_head_dim,
            num_kv_heads=self.full_kv_heads,
            rope_theta=self.full_rope_theta,
            rope_scaling=self.full_rope_scaling,
        )


class Gemma4Attention(Attention):
    """Attention whose values are normalised too, and in some layers made of what keys are made of."""

    def __init__(self, config: Gemma4Config, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.keys_as_values = config.keys_as_values
        if self.keys_as_values:
            del self.v

    def projected(self, hidden: jax.Array) -> list[jax.Array]:
        if not self.keys_as_values:
            return super().projected(hidden)
        query, key = project(hidden, self.q, self.k)
        return [query, key, key]

    def valued(self, x: jax.Array) -> jax.Array:
        return rms_norm(super().valued(x), None, self.config.norm_eps)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "beside", "sum_scale", "scale", "factor"],
    meta_fields=["epsilon"],
)
@dataclass(frozen=True)
class Gemma4Output:
    """A layer's output without its experts (`decoder.Unfinished`).

    Attributes:
        hidden: [B, S, D] the residual stream after attention.
        beside: [B, S, D] the dense network's output, normalised.
        sum_scale: [D] of the norm of the experts' sum.
        scale: [D] of the norm of both together.
        factor: [1] what the layer's output is multiplied with.
        epsilon: of the norms.
    """

    hidden: jax.Array
    beside: jax.Array
    sum_scale: jax.Array
    scale: jax.Array
    factor: jax.Array
    epsilon: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.hidden.shape

    @property
    def dtype(self) -> Any:
        return self.hidden.dtype

    def finished(self, total: jax.Array) -> jax.Array:
        both = self.beside + rms_norm(total, self.sum_scale, self.epsilon, NORM)
        output = self.hidden + rms_norm(both, self.scale, self.epsilon, NORM)
        return output * jnp.broadcast_to(self.factor, self.shape)


class Gemma4Layer(RoutedLayer):
    """The dense part of a layer. Its `shared` expert is the dense network, which reads a norm of its own."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        width = config.hidden_size
        self.attention_after = norm_of(config, width, dtype)
        self.shared_norm = norm_of(config, width, dtype)
        self.shared_after = norm_of(config, width, dtype)
        self.experts_after = norm_of(config, width, dtype)
        self.after = norm_of(config, width, dtype)
        self.factor = nnx.Param(jnp.ones(1, dtype))
        self.router_scale = nnx.Param(jnp.ones(width, dtype))
        self.expert_scale = nnx.Param(jnp.ones(config.num_experts, dtype))

    def attend(self, hidden: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        with jax.named_scope("attend"):
            mixed, cache = self.attention(self.attention_norm(hidden), positions, cache)
            return hidden + self.attention_after(mixed), cache

    def attend_and_route(
        self, hidden: jax.Array, positions: jax.Array, cache: Any
    ) -> tuple[Any, jax.Array, Routing, Any]:
        config = self.config
        hidden, cache = self.attend(hidden, positions, cache)
        flat = hidden.reshape(-1, hidden.shape[-1])
        with jax.named_scope("route"):
            read = rms_norm(flat, None, config.norm_eps)
            read = read * jnp.broadcast_to(self.router_scale[...], flat.shape)
            routing = self.router(read * config.hidden_size**-0.5)
            scale = self.expert_scale[...].astype(jnp.float32)[routing.experts]
            routing = routing._replace(weights=routing.weights * scale)
        with jax.named_scope("beside"):
            beside = self.shared_after(self.shared(self.shared_norm(flat)))
        output = Gemma4Output(
            hidden,
            beside.reshape(hidden.shape),
            self.experts_after.scale[...],
            self.after.scale[...],
            self.factor[...],
            config.norm_eps,
        )
        return output, self.moe_norm(flat), routing, cache

    @staticmethod
    def router_of(params: Mapping[str, Any], config: ModelConfig) -> RouterWeights:
        """The router as if it read what experts read, whose norm has another scale."""
        scale = params["moe_norm"]["scale"]
        factor = params["router_scale"] * config.hidden_size**-0.5 / scale
        return RouterWeights(params["router"]["weight"] * factor[None], scale)
