"""Granite 3 MoE: the weights of a token from its own experts' logits alone, and four factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.models.weights import (
    BIASES,
    EXPERTS,
    GATE_AND_UP,
    LAYER,
    ROUTER,
    WEIGHTS,
    Weight,
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(theta=10_000.0, norm_eps=1e-6, max_position_embeddings=2048)
    settings = {
        **shared,
        "num_kv_heads": reader.integer("num_key_value_heads", default=shared["num_heads"]),
        "moe_intermediate_size": reader.integer("intermediate_size"),
        "attention_bias": reader.flag("attention_bias", default=False),
        "attention_scale": float(reader.number("attention_multiplier", default=1.0)),
        "embedding_scale": float(reader.number("embedding_multiplier", default=1.0)),
        "residual_scale": float(reader.number("residual_multiplier", default=1.0)),
        "logits_divisor": float(reader.number("logits_scaling", default=1.0)),
    }
    reader.check()
    return ModelConfig(
        family="granitemoe",
        normalize_top_k=False,
        routing=RoutingRule(score="top_k_softmax"),
        **settings,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | {
        "attention_bias": config.attention_bias,
        "attention_multiplier": config.attention_scale,
        "embedding_multiplier": config.embedding_scale,
        "intermediate_size": config.moe_intermediate_size,
        "logits_scaling": config.logits_divisor,
        "num_local_experts": config.num_experts,
        "residual_multiplier": config.residual_scale,
    }


MOE = LAYER + "block_sparse_moe."
GATE, UP, DOWN = (EXPERTS + matrix for matrix in ("gate", "up", "down"))

GRANITEMOE = Family(
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *BIASES,
        Weight(MOE + "router.layer.weight", ROUTER),
        Weight(MOE + "router.weight", ROUTER),
        Weight(MOE + "input_linear.weight", (GATE, UP), GATE_AND_UP),
        Weight(MOE + "experts.gate_up_proj", (GATE, UP), GATE_AND_UP),
        Weight(MOE + "output_linear.weight", DOWN),
        Weight(MOE + "experts.down_proj", DOWN),
    ),
)
