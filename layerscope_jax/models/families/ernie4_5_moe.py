"""ERNIE 4.5 MoE (text models): neighbours rotated together, a bias for choosing, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.models.weights import (
    BIASES,
    DENSE_LAYERS,
    LAYER,
    PLACE,
    ROUTED_LAYERS,
    ROW,
    SHARED_EXPERTS,
    WEIGHTS,
    Weight,
)

HARMLESS = (
    "moe_capacity",
    "moe_gate",
    "moe_use_aux_free",
    "num_nextn_predict_layers",
    "use_rmsnorm",
)
"""Keys of the published configs that change no logit."""


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(
        theta=500_000.0,
        norm_eps=1e-5,
        max_position_embeddings=131_072,
        experts=("moe_num_experts", "num_experts"),
        choices=("moe_k", "num_experts_per_tok"),
    )
    layers = shared["num_layers"]
    bias = reader.flag("use_bias", default=False)
    every = reader.integer("moe_layer_interval", default=1)
    start = reader.count("moe_layer_start_index", default=1)
    end = reader.config.get("moe_layer_end_index", -1)
    reader.mark_read("moe_layer_end_index")
    end = layers - 1 if end in (None, -1) else reader.count("moe_layer_end_index")
    routed = {layer for layer in range(start, min(end, layers - 1) + 1) if (layer + 1) % every == 0}
    dense = tuple(layer for layer in range(layers) if layer not in routed)
    inner = reader.integer("moe_intermediate_size")
    shared_experts = reader.count("moe_num_shared_experts", default=2)
    # The class ties where nothing is said.
    tied = reader.flag("tie_word_embeddings", default=True)
    settings = {
        **shared,
        "num_kv_heads": reader.integer("num_key_value_heads", default=shared["num_heads"]),
        "moe_intermediate_size": inner,
        "dense_layers": dense,
        "intermediate_size": reader.integer("intermediate_size") if dense else None,
        "shared_intermediate_size": shared_experts * inner or None,
        "attention_bias": bias,
        "mlp_bias": bias,
        "head_bias": bias,
        "tie_embeddings": tied,
        "routing": RoutingRule(
            selection_bias=True,
            float32_logits=True,
            smallest_sum=float(reader.number("moe_norm_min", default=1e-12)),
        ),
    }
    reader.check("intermediate_size", *HARMLESS)
    return ModelConfig(family="ernie4_5_moe", normalize_top_k=True, rope_interleaved=True, **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_layers
    every = next((n for n in range(1, config.num_layers + 1) if _routed(config, n) == moe), 1)
    settings = write_shared(config)
    settings["moe_k"] = settings.pop("num_experts_per_tok")
    return settings | {
        "intermediate_size": config.intermediate_size or config.moe_intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_layer_end_index": moe[-1],
        "moe_layer_interval": every,
        "moe_layer_start_index": moe[0],
        "moe_norm_min": config.routing.smallest_sum,
        "moe_num_experts": config.num_experts,
        "moe_num_shared_experts": (config.shared_intermediate_size or 0) // config.moe_intermediate_size,
        "use_bias": config.attention_bias,
    }


def _routed(config: ModelConfig, every: int) -> tuple[int, ...]:
    first, last = config.moe_layers[0], config.moe_layers[-1]
    return tuple(layer for layer in range(first, last + 1) if (layer + 1) % every == 0)


BIAS = PLACE + "router.selection_bias"

ERNIE4_5_MOE = Family(
    architecture="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *BIASES,
        *ROUTED_LAYERS,
        Weight("lm_head.bias", "head_bias"),
        Weight(LAYER + "mlp.moe_statics.e_score_correction_bias", BIAS, ROW),
        Weight(LAYER + "mlp.gate.moe_statics.e_score_correction_bias", BIAS, ROW),
        *SHARED_EXPERTS,
        *DENSE_LAYERS,
    ),
    extra_layers=True,
)
