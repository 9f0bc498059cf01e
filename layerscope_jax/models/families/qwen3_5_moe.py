"""Qwen3.5 and 3.6 with experts: the layers of Qwen3-Next, inside models that also take images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.families.qwen3_next import (
    DELTA_LAYERS,
    SAME,
    read_delta_layers,
    read_shared,
    write_delta_layers,
)
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.weights import (
    BIASES,
    GATED_SHARED_EXPERT,
    LAYER,
    PLACE,
    QK_NORMS,
    ROUTED_LAYERS,
    WEIGHTS,
    Transform,
    Weight,
)

OF_IMAGES = ("mrope_interleaved", "mrope_section")
"""Keys of a rotary embedding with three positions for each token: of a text all three are the same."""


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    given = dict(config)
    if isinstance(rope := given.get("rope_parameters"), Mapping):
        given["rope_parameters"] = {key: value for key, value in rope.items() if key not in OF_IMAGES}
    reader, shared = read_shared(given)
    settings = {**shared, **read_delta_layers(reader, shared["num_layers"])}
    reader.check("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    return ModelConfig(family="qwen3_5_moe", normalize_top_k=True, **SAME, **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | write_delta_layers(config) | {"model_type": "qwen3_5_moe_text"}


BY_HEADS = Transform(
    "rows of each head of keys",
    lambda tensors, shapes: [tensors[0].reshape(shapes[0])],
    lambda arrays: [arrays[0].reshape(-1, arrays[0].shape[-1])],
    lambda shapes: [(shapes[0][0] * shapes[0][1], shapes[0][2])],
)

QWEN3_5_MOE = Family(
    architecture="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe",
    aliases=("Qwen3_5MoeForConditionalGeneration",),
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *QK_NORMS,
        *BIASES,
        *DELTA_LAYERS,
        Weight(LAYER + "linear_attn.in_proj_qkv.weight", PLACE + "attention.qkv.weight"),
        *(
            Weight(LAYER + f"linear_attn.in_proj_{part}.weight", PLACE + f"attention.{part}", BY_HEADS)
            for part in ("z", "b", "a")
        ),
        *ROUTED_LAYERS,
        *GATED_SHARED_EXPERT,
    ),
)
