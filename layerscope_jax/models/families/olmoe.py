"""OLMoE (arXiv 2409.02060): queries and keys normalised over all heads together, optional clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.weights import BIASES, QK_NORMS, ROUTED_LAYERS, WEIGHTS


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(theta=10_000.0, norm_eps=1e-5, max_position_embeddings=4096)
    settings = {
        "num_kv_heads": reader.integer("num_key_value_heads", default=shared["num_heads"]),
        "moe_intermediate_size": reader.integer("intermediate_size"),
        "normalize_top_k": reader.flag("norm_topk_prob", default=False),
        "qkv_clip": reader.number("clip_qkv", default=None),
        "attention_bias": reader.flag("attention_bias", default=False),
    }
    # HF's class norms all heads together at this width, whatever `head_dim` says.
    reader.expect("head_dim", shared["hidden_size"] // shared["num_heads"], "OLMoE's heads share hidden_size")
    reader.layer_types(None)
    # HF's class does not read a window.
    reader.check("sliding_window")
    return ModelConfig(family="olmoe", qk_norm="all", **shared, **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | {
        "attention_bias": config.attention_bias,
        "clip_qkv": config.qkv_clip,
        "intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.normalize_top_k,
        "num_experts": config.num_experts,
    }


OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    read_config=read_config,
    write_config=write_config,
    weights=WEIGHTS + QK_NORMS + BIASES + ROUTED_LAYERS,
)
