"""Qwen2-MoE (arXiv 2407.10671) and Qwen1.5-MoE: a gated shared expert, biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.family import Family, write_layer_types, write_shared
from layerscope_jax.models.weights import (
    BIASES,
    DENSE_LAYERS,
    GATED_SHARED_EXPERT,
    ROUTED_LAYERS,
    WEIGHTS,
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(theta=10_000.0, norm_eps=1e-6, max_position_embeddings=32_768)
    layers = shared["num_layers"]
    dense = reader.dense_layers(layers)
    windowed = reader.flag("use_sliding_window", default=False)
    window = reader.integer("sliding_window", default=4096) if windowed else None
    first = reader.count("max_window_layers", default=28)
    settings = {
        **shared,
        **reader.windows(layers, window, default=range(0, min(first, layers), 2) if windowed else ()),
        "num_kv_heads": reader.integer("num_key_value_heads", default=16),
        "moe_intermediate_size": reader.integer("moe_intermediate_size"),
        "normalize_top_k": reader.flag("norm_topk_prob", default=False),
        "dense_layers": dense,
        "intermediate_size": reader.integer("intermediate_size") if dense else None,
        "shared_intermediate_size": reader.integer("shared_expert_intermediate_size"),
        "attention_bias": reader.flag("qkv_bias", default=True),
    }
    # Read by no layer where none has a window, or where none is dense.
    reader.check("sliding_window", "intermediate_size")
    return ModelConfig(family="qwen2_moe", attention_out_bias=False, shared_gate=True, **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return (
        write_shared(config)
        | write_layer_types(config)
        | {
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.normalize_top_k,
            "num_experts": config.num_experts,
            "qkv_bias": config.attention_bias,
            "shared_expert_intermediate_size": config.shared_intermediate_size,
            "use_sliding_window": config.sliding_window is not None,
            **({"intermediate_size": config.intermediate_size} if config.dense_layers else {}),
        }
    )


QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *BIASES,
        *ROUTED_LAYERS,
        *GATED_SHARED_EXPERT,
        *DENSE_LAYERS,
    ),
)
