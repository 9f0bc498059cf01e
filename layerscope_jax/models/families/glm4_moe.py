"""GLM-4.5, 4.6 and 4.7 (arXiv 2508.06471), with Air: grouped queries, half of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.families.parts import (
    TRAINING_KEYS,
    read_deepseek_layers,
    read_sigmoid_routing,
    write_deepseek_layers,
    write_groups,
)
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.weights import (
    BIASES,
    DENSE_LAYERS,
    QK_NORMS,
    ROUTED_LAYERS,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    WEIGHTS,
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(
        theta=10_000.0,
        norm_eps=1e-5,
        max_position_embeddings=131_072,
        partial=0.5,
        experts=("n_routed_experts", "num_local_experts"),
    )
    settings = {
        **shared,
        **read_deepseek_layers(reader, shared["num_layers"], first=1, shared_experts=1),
        "num_kv_heads": reader.integer("num_key_value_heads"),
        "attention_bias": reader.flag("attention_bias", default=False),
        "attention_out_bias": False,
        "qk_norm": "head" if reader.flag("use_qk_norm", default=False) else "none",
        "normalize_top_k": reader.flag("norm_topk_prob", default=True),
        "routing": read_sigmoid_routing(reader, groups=1, kept=1, scale=1.0),
    }
    reader.check(*TRAINING_KEYS)
    return ModelConfig(family="glm4_moe", **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return (
        write_shared(config)
        | write_groups(config)
        | write_deepseek_layers(config)
        | {"attention_bias": config.attention_bias, "use_qk_norm": config.qk_norm == "head"}
    )


GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *QK_NORMS,
        *BIASES,
        *ROUTED_LAYERS,
        SELECTION_BIAS,
        *SHARED_EXPERTS,
        *DENSE_LAYERS,
    ),
    extra_layers=True,
)
