"""dots.llm1 (arXiv 2506.05767): grouped queries with norms, DeepSeek-V3's routers, two shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.families.glm4_moe import GLM4_MOE
from layerscope_jax.models.families.parts import (
    TRAINING_KEYS,
    read_deepseek_layers,
    read_sigmoid_routing,
    write_deepseek_layers,
    write_groups,
)
from layerscope_jax.models.family import Family, write_layer_types, write_shared


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(
        theta=10_000.0,
        norm_eps=1e-6,
        max_position_embeddings=2048,
        experts=("n_routed_experts", "num_local_experts"),
    )
    layers = shared["num_layers"]
    window = reader.integer("sliding_window", default=None if "sliding_window" in config else 4096)
    first = reader.count("max_window_layers", default=62)
    settings = {
        **shared,
        **read_deepseek_layers(reader, layers, first=0, shared_experts=None),
        **reader.windows(layers, window, default=range(first, layers)),
        "num_kv_heads": reader.integer("num_key_value_heads", default=shared["num_heads"]),
        "attention_bias": reader.flag("attention_bias", default=False),
        "qk_norm": "head",
        "normalize_top_k": reader.flag("norm_topk_prob", default=False),
        "routing": read_sigmoid_routing(reader, groups=1, kept=1, scale=1.0),
    }
    reader.check(*TRAINING_KEYS)
    return ModelConfig(family="dots1", **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return (
        write_shared(config)
        | write_groups(config)
        | write_deepseek_layers(config)
        | write_layer_types(config)
        | {"attention_bias": config.attention_bias}
    )


DOTS1 = Family(
    architecture="Dots1ForCausalLM",
    model_type="dots1",
    read_config=read_config,
    write_config=write_config,
    weights=GLM4_MOE.weights,
)
