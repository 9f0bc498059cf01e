"""GLM-4.7-Flash: latent attention and routers as in DeepSeek-V3, in a small model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.families.deepseek_v3 import DEEPSEEK_V3
from layerscope_jax.models.families.parts import (
    TRAINING_KEYS,
    latent_settings,
    read_latent,
    read_shared_experts,
    read_sigmoid_routing,
    write_deepseek_layers,
    write_groups,
    write_latent,
)
from layerscope_jax.models.family import Family, write_shared


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    sizes = read_latent(reader, query_rank=768)
    shared = reader.shared(
        theta=10_000.0,
        norm_eps=1e-5,
        max_position_embeddings=202_752,
        rotated=sizes.rope,
        experts=("n_routed_experts", "num_local_experts"),
    )
    dense = reader.layers_of_kind("mlp_layer_types", "dense", "sparse", shared["num_layers"], default=(0,))
    inner = reader.integer("moe_intermediate_size")
    settings = {
        **shared,
        **latent_settings(reader, shared, sizes),
        "dense_layers": dense,
        "intermediate_size": reader.integer("intermediate_size") if dense else None,
        "moe_intermediate_size": inner,
        "shared_intermediate_size": read_shared_experts(reader, inner, 1),
        "normalize_top_k": reader.flag("norm_topk_prob", default=True),
        "routing": read_sigmoid_routing(reader, groups=1, kept=1, scale=1.8),
        "rope_interleaved": reader.flag("rope_interleave", default=True),
    }
    # The class reads `mlp_layer_types` instead of the first.
    reader.check("first_k_dense_replace", "intermediate_size", *TRAINING_KEYS)
    return ModelConfig(family="glm4_moe_lite", **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    dense = config.dense_layers
    kinds = ["dense" if layer in dense else "sparse" for layer in range(config.num_layers)]
    settings = write_shared(config) | write_latent(config) | write_groups(config)
    settings |= write_deepseek_layers(config)
    del settings["first_k_dense_replace"]
    return settings | {"mlp_layer_types": kinds, "rope_interleave": config.rope_interleaved}


GLM4_MOE_LITE = Family(
    architecture="Glm4MoeLiteForCausalLM",
    model_type="glm4_moe_lite",
    read_config=read_config,
    write_config=write_config,
    weights=DEEPSEEK_V3.weights,
    extra_layers=True,
)
