"""DeepSeek-V3 (arXiv 2412.19437), and what is built like it: R1, Moonlight, Kimi-K2."""

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
    read_sigmoid_routing,
    write_deepseek_layers,
    write_groups,
    write_latent,
)
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.weights import (
    DENSE_LAYERS,
    LATENT,
    ROUTED_LAYERS,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    WEIGHTS,
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(config)
    sizes = read_latent(reader, query_rank=1536)
    shared = reader.shared(
        theta=10_000.0,
        norm_eps=1e-6,
        max_position_embeddings=4096,
        rotated=sizes.rope,
        experts=("n_routed_experts", "num_local_experts"),
    )
    settings = {
        **shared,
        **latent_settings(reader, shared, sizes),
        **read_deepseek_layers(reader, shared["num_layers"], first=3, shared_experts=1),
        "normalize_top_k": reader.flag("norm_topk_prob", default=True),
        "routing": read_sigmoid_routing(reader, groups=8, kept=4, scale=2.5),
        "rope_interleaved": reader.flag("rope_interleave", default=True),
    }
    reader.check(AUTO_MAP, *TRAINING_KEYS)
    return ModelConfig(family="deepseek_v3", **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    settings = write_shared(config) | write_latent(config) | write_groups(config)
    return settings | write_deepseek_layers(config) | {"rope_interleave": config.rope_interleaved}


DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    read_config=read_config,
    write_config=write_config,
    weights=(*WEIGHTS, *LATENT, *ROUTED_LAYERS, SELECTION_BIAS, *SHARED_EXPERTS, *DENSE_LAYERS),
    extra_layers=True,
    aliases=("kimi_k2",),
)
