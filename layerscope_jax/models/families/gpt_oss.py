"""gpt-oss (arXiv 2508.10925): sinks, every second layer within a window, clamped experts with biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.experts import CLAMPED_SLOPE, ExpertBody
from layerscope_jax.models.family import Family, write_layer_types, write_shared
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.models.weights import (
    BIASES,
    EXPERTS,
    LAYER,
    PLACE,
    ROUTER,
    WEIGHTS,
    Shape,
    Transform,
    Weight,
)

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What the class takes where nothing is said of the rotary embedding."""


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    given = dict(config)
    if given.get("rope_scaling") is None and given.get("rope_parameters") is None:
        given["rope_parameters"] = YARN
    reader = ConfigReader(given)
    shared = reader.shared(theta=150_000.0, norm_eps=1e-5, max_position_embeddings=131_072, partial=1.0)
    layers = shared["num_layers"]
    window = reader.integer("sliding_window", default=None if "sliding_window" in given else 128)
    reader.expect("swiglu_alpha", CLAMPED_SLOPE, "other slopes are not supported")
    settings = {
        **shared,
        **reader.windows(layers, window, default=range(0, layers, 2)),
        "num_kv_heads": reader.integer("num_key_value_heads", default=shared["num_heads"]),
        "moe_intermediate_size": reader.integer("intermediate_size"),
        "attention_bias": reader.flag("attention_bias", default=True),
        "expert_body": ExpertBody(
            "clamped", bias=True, limit=float(reader.number("swiglu_limit", default=7.0))
        ),
    }
    # Written a second time under older names, and by tools that know only those.
    reader.check("experts_per_token", "initial_context_length")
    return ModelConfig(
        family="gpt_oss",
        attention_sinks=True,
        normalize_top_k=False,
        routing=RoutingRule(score="top_k_softmax", logit_bias=True),
        **settings,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    return (
        write_shared(config)
        | write_layer_types(config)
        | {
            "attention_bias": config.attention_bias,
            "intermediate_size": config.moe_intermediate_size,
            "num_local_experts": config.num_experts,
            "swiglu_limit": config.expert_body.limit,
        }
    )


# Of an expert: gate and up [D, 2 F] in turns, their biases in turns, down [F, D] and its bias: matrices that
# are [in, out], unlike any others. They come together, since the biases of all three are one array of ours.


def _load(tensors: Sequence[Any], shapes: Sequence[Shape]) -> Sequence[Any]:
    both, bias, down, down_bias = tensors
    return both[:, ::2].T, both[:, 1::2].T, down.T, np.concatenate([bias[::2], bias[1::2], down_bias])


def _save(arrays: Sequence[Any]) -> Sequence[Any]:
    gate, up, down, bias = arrays
    inner, width = gate.shape
    both = np.stack([gate.T, up.T], axis=-1).reshape(width, -1)
    biases = np.stack([bias[:inner], bias[inner : 2 * inner]], axis=-1).reshape(-1)
    return both, biases, down.T, bias[2 * inner :]


def _shapes(shapes: Sequence[Shape]) -> Sequence[Shape]:
    inner, width = shapes[0]
    return (width, 2 * inner), (2 * inner,), (inner, width), (width,)


PLAIN = Transform("gate and up in turns", _load, _save, _shapes)


# In MXFP4 they are [out, in], with gate and up in even and odd rows.


def _load_rows(tensors: Sequence[Any], shapes: Sequence[Shape]) -> Sequence[Any]:
    both, bias, down, down_bias = tensors
    return both[::2], both[1::2], down, np.concatenate([bias[::2], bias[1::2], down_bias])


def _shapes_of_rows(shapes: Sequence[Shape]) -> Sequence[Shape]:
    inner, width = shapes[0]
    return (2 * inner, width), (2 * inner,), (width, inner), (width,)


PACKED = Transform("gate and up in turns, [out, in]", _load_rows, None, _shapes_of_rows, by_rows=True)

OF_EXPERTS = tuple(EXPERTS + array for array in ("gate", "up", "down", "bias"))
MLP = LAYER + "mlp."

GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *BIASES,
        Weight(LAYER + "self_attn.sinks", PLACE + "attention.sinks"),
        Weight(MLP + "router.weight", ROUTER),
        Weight(MLP + "router.bias", PLACE + "router.bias"),
        Weight(
            (
                MLP + "experts.gate_up_proj",
                MLP + "experts.gate_up_proj_bias",
                MLP + "experts.down_proj",
                MLP + "experts.down_proj_bias",
            ),
            OF_EXPERTS,
            PLAIN,
        ),
        Weight(
            (
                MLP + "experts.gate_up_proj_blocks",
                MLP + "experts.gate_up_proj_bias",
                MLP + "experts.down_proj_blocks",
                MLP + "experts.down_proj_bias",
            ),
            OF_EXPERTS,
            PACKED,
        ),
    ),
)
