"""DeepSeek-V2 (arXiv 2405.04434): latent attention, softmax routers, shared experts; V2-Lite, Coder-V2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.families.parts import (
    AUTO_MAP,
    TRAINING_KEYS,
    latent_settings,
    read_deepseek_layers,
    read_latent,
    write_deepseek_layers,
    write_groups,
    write_latent,
)
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.models.weights import DENSE_LAYERS, LATENT, ROUTED_LAYERS, SHARED_EXPERTS, WEIGHTS

GROUPED = "group_limited_greedy"


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    sizes = read_latent(reader, query_rank=1536)
    shared = reader.shared(
        theta=10_000.0,
        norm_eps=1e-6,
        max_position_embeddings=2048,
        rotated=sizes.rope,
        experts=("n_routed_experts", "num_experts"),
    )
    # The class never normalises, the authors' own code does where this is set: no published model does.
    reader.expect("norm_topk_prob", False, "transformers and the authors' code differ where it is set")
    reader.expect("scoring_func", "softmax", "other scores are not supported")
    grouped = reader.text("topk_method", ("greedy", GROUPED), default="greedy") == GROUPED
    groups = reader.integer("n_group", default=None), reader.integer("topk_group", default=None)
    routing = RoutingRule(
        float32_logits=True,
        num_groups=(groups[0] or 1) if grouped else 1,
        groups_per_token=(groups[1] or 1) if grouped else 1,
        scale=float(reader.number("routed_scaling_factor", default=1.0)),
    )
    settings = {
        **shared,
        **latent_settings(reader, shared, sizes),
        **read_deepseek_layers(reader, shared["num_layers"], first=0, shared_experts=2),
    }
    reader.check(AUTO_MAP, *TRAINING_KEYS)
    return ModelConfig(
        family="deepseek_v2", normalize_top_k=False, routing=routing, rope_interleaved=True, **settings
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    settings = write_shared(config) | write_latent(config) | write_deepseek_layers(config)
    if config.routing.num_groups > 1:
        return settings | write_groups(config) | {"topk_method": GROUPED}
    return settings | {"routed_scaling_factor": config.routing.scale, "topk_method": "greedy"}


DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    read_config=read_config,
    write_config=write_config,
    weights=WEIGHTS + LATENT + ROUTED_LAYERS + SHARED_EXPERTS + DENSE_LAYERS,
)
