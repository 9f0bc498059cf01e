"""Qwen3-MoE (arXiv 2505.09388): queries and keys normalised over each head; a window, dense layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.weights import BIASES, DENSE_LAYERS, QK_NORMS, ROUTED_LAYERS, WEIGHTS

NEUTRAL = {
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
"""Keys that some published configs have, and that HF's class does not read."""


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(theta=10_000.0, norm_eps=1e-6, max_position_embeddings=32_768)
    dense = reader.dense_layers(shared["num_layers"])
    window = None
    if reader.flag("use_sliding_window", default=False):
        # The class's default where the key is left out; an explicit null is no window.
        window = reader.integer("sliding_window", default=None if "sliding_window" in config else 4096)
    settings = {
        "num_kv_heads": reader.integer("num_key_value_heads"),
        "moe_intermediate_size": reader.integer("moe_intermediate_size"),
        "normalize_top_k": reader.flag("norm_topk_prob", default=False),
        "attention_bias": reader.flag("attention_bias", default=False),
        "sliding_window": window,
        "dense_layers": dense,
        "intermediate_size": reader.integer("intermediate_size") if dense else None,
    }
    for key, value in NEUTRAL.items():
        reader.expect(key, value, "other values are not supported")
    reader.layer_types(window)
    # Of layers without experts, of which there may be none; and two that HF's class does not read here.
    reader.check("intermediate_size", "max_window_layers", "sliding_window")
    return ModelConfig(family="qwen3_moe", qk_norm="head", **shared, **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | {
        "attention_bias": config.attention_bias,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.normalize_top_k,
        "num_local_experts": config.num_experts,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        **({"intermediate_size": config.intermediate_size} if config.dense_layers else {}),
    }


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    read_config=read_config,
    write_config=write_config,
    weights=WEIGHTS + QK_NORMS + BIASES + ROUTED_LAYERS + DENSE_LAYERS,
)
