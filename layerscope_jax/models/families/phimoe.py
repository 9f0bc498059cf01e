"""Phi-3.5-MoE (arXiv 2404.14219): layer norms, two experts by SparseMixer, a context grown by LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.families.mixtral import BLOCK
from layerscope_jax.models.families.parts import AUTO_MAP
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.models.weights import BIASES, LAYER, PLACE, ROUTER, WEIGHTS, Weight, mapped


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(theta=1_000_000.0, norm_eps=1e-5, max_position_embeddings=131_072)
    jitter = float(reader.number("router_jitter_noise", default=0.01))
    settings = {
        **shared,
        "num_kv_heads": reader.integer("num_key_value_heads", default=shared["num_heads"]),
        "moe_intermediate_size": reader.integer("intermediate_size"),
        "sliding_window": reader.integer("sliding_window", default=None),
        "attention_bias": reader.flag("attention_bias", default=False),
        "head_bias": reader.flag("lm_head_bias", default=False),
    }
    if shared["experts_per_token"] != 2:
        reader.problems.add(
            f"num_experts_per_tok: expected 2, which is what SparseMixer chooses, got "
            f"{shared['experts_per_token']}"
        )
    reader.check(AUTO_MAP, "input_jitter_noise")
    return ModelConfig(
        family="phimoe",
        normalize_top_k=False,
        norm="layer",
        routing=RoutingRule(score="sparsemixer", jitter=jitter),
        **settings,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | {
        "attention_bias": config.attention_bias,
        "intermediate_size": config.moe_intermediate_size,
        "lm_head_bias": config.head_bias,
        "num_local_experts": config.num_experts,
        "router_jitter_noise": config.routing.jitter,
        "sliding_window": config.sliding_window,
    }


PHIMOE = Family(
    architecture="PhimoeForCausalLM",
    model_type="phimoe",
    aliases=("PhiMoEForCausalLM",),  # of the authors' own code, and so of what they published
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *BIASES,
        *mapped(
            LAYER,
            PLACE,
            ("input_layernorm.bias", "attention_norm.bias"),
            ("post_attention_layernorm.bias", "moe_norm.bias"),
        ),
        Weight("model.norm.bias", "norm.bias"),
        Weight("lm_head.bias", "head_bias"),
        *BLOCK,
        Weight(LAYER + "mlp.router.weight", ROUTER),
    ),
)
