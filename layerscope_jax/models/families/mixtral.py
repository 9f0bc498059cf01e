"""Mixtral (arXiv 2401.04088): router weights always normalised, optional sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import REQUIRED, ConfigReader
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.weights import (
    EXPERTS,
    LAYER,
    ROUTER,
    ROUTER_GATE,
    STACKED,
    WEIGHTS,
    Weight,
    mapped,
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(theta=1_000_000.0, norm_eps=1e-5, max_position_embeddings=131_072)
    # An explicit null means as many as query heads. Left out, it would be Mixtral-8x7B's 8: better to ask.
    kv_default = shared["num_heads"] if "num_key_value_heads" in config else REQUIRED
    settings = {
        "num_kv_heads": reader.integer("num_key_value_heads", default=kv_default),
        "moe_intermediate_size": reader.integer("intermediate_size"),
        "sliding_window": reader.integer("sliding_window", default=None),
    }
    reader.expect("attention_bias", False, "Mixtral's projections have no biases")
    reader.layer_types(settings["sliding_window"])
    # HF's class always normalises.
    reader.check("norm_topk_prob")
    return ModelConfig(family="mixtral", normalize_top_k=True, **shared, **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | {
        "intermediate_size": config.moe_intermediate_size,
        "num_local_experts": config.num_experts,
        "sliding_window": config.sliding_window,
    }


BLOCK = (
    Weight(LAYER + "block_sparse_moe.gate.weight", ROUTER),
    *mapped(
        LAYER + "block_sparse_moe.experts.{expert}.",
        EXPERTS,
        ("w1.weight", "gate"),
        ("w3.weight", "up"),
        ("w2.weight", "down"),
    ),
    ROUTER_GATE,
    *STACKED,
)
"""Routers and experts as Mixtral names them, and as transformers 5 keeps them in memory."""

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    read_config=read_config,
    write_config=write_config,
    weights=WEIGHTS + BLOCK,
)
