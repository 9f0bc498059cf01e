"""MiniMax-M2, M2.1 and M2.7: sigmoid routers, queries and keys normalised over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.families.mixtral import BLOCK
from layerscope_jax.models.families.parts import AUTO_MAP
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.models.weights import LAYER, PLACE, QK_NORMS, WEIGHTS, Weight

EXPECTED = {
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "use_qk_norm": True,
    "use_routing_bias": True,
}
"""Keys of the published configs that HF's class does not read, and what it computes."""

PREDICTING = ("mtp_transformer_layers", "num_mtp_modules", "use_mtp")
"""Keys of the layers that predict further tokens, which are ignored."""


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    shared = reader.shared(theta=5_000_000.0, norm_eps=1e-6, max_position_embeddings=196_608, partial=1.0)
    for key, value in EXPECTED.items():
        reader.expect(key, value, "other values are not supported")
    kinds = reader.config.get("attn_type_list")
    if isinstance(kinds, list) and any(kind != 1 for kind in kinds):
        reader.problems.add(f"attn_type_list: expected 1 for every layer, got {kinds}")
    settings = {
        **shared,
        "num_kv_heads": reader.integer("num_key_value_heads"),
        "moe_intermediate_size": reader.integer("intermediate_size"),
    }
    reader.check(AUTO_MAP, "attn_type_list", "mlp_intermediate_size", "shared_moe_mode", *PREDICTING)
    return ModelConfig(
        family="minimax_m2",
        qk_norm="all",
        normalize_top_k=True,
        routing=RoutingRule(score="sigmoid", selection_bias=True),
        **settings,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | {
        "intermediate_size": config.moe_intermediate_size,
        "num_local_experts": config.num_experts,
    }


BIAS = PLACE + "router.selection_bias"

MINIMAX_M2 = Family(
    architecture="MiniMaxM2ForCausalLM",
    model_type="minimax_m2",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *QK_NORMS,
        *BLOCK,
        Weight(LAYER + "block_sparse_moe.e_score_correction_bias", BIAS),
        Weight(LAYER + "mlp.e_score_correction_bias", BIAS),
    ),
    extra_layers=True,
)
