"""Qwen3-Next: gated DeltaNet in three of four layers, gated attention in the others, gated shared experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layerscope_jax.models.config import DeltaSizes, ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.family import Family, write_shared
from layerscope_jax.models.weights import (
    BIASES,
    DENSE_LAYERS,
    GATED_SHARED_EXPERT,
    LAYER,
    PLACE,
    QK_NORMS,
    ROUTED_LAYERS,
    WEIGHTS,
    Shape,
    Transform,
    Weight,
    each,
    mapped,
)

HEAD_DIM = 256
"""Of attention, if nothing is said of it."""


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    reader, shared = read_shared(config)
    dense = reader.dense_layers(shared["num_layers"])
    settings = {
        **shared,
        **read_delta_layers(reader, shared["num_layers"]),
        "normalize_top_k": reader.flag("norm_topk_prob", default=True),
        "dense_layers": dense,
        "intermediate_size": reader.integer("intermediate_size", default=5632) if dense else None,
    }
    reader.expect("use_sliding_window", False, "windows are not supported")
    reader.check("intermediate_size")  # of layers without experts, of which there may be none
    return ModelConfig(family="qwen3_next", **SAME, **settings)


SAME: dict[str, Any] = {
    "attention_gate": True,
    "norm": "rms_offset",
    "qk_norm": "head",
    "shared_gate": True,
}
"""What the config of no such model says."""


def read_shared(config: Mapping[str, Any]) -> tuple[ConfigReader, dict[str, Any]]:
    """Returns a reader of a config, and the settings that all families share."""
    given = dict(config)
    if given.get("head_dim") is None:
        given["head_dim"] = HEAD_DIM  # of which a part is rotated, so it is read with the others
    reader = ConfigReader(given)
    return reader, reader.shared(theta=10_000.0, norm_eps=1e-6, max_position_embeddings=32_768, partial=0.25)


def read_delta_layers(reader: ConfigReader, num_layers: int) -> dict[str, Any]:
    """Reads what layers of both kinds are made of, whose sizes have the defaults of transformers' classes."""
    reader.expect("attn_output_gate", True, "attention without gates is not supported")
    reader.expect("mamba_ssm_dtype", "float32", "states of other types are not supported")
    interval = reader.integer("full_attention_interval", default=4)
    full = reader.layers_of_kind(
        "layer_types",
        "full_attention",
        "linear_attention",
        num_layers,
        default=range(interval - 1, num_layers, interval),
    )
    return {
        "full_attention_layers": full,
        "num_kv_heads": reader.integer("num_key_value_heads", default=2),
        "attention_bias": reader.flag("attention_bias", default=False),
        "delta": DeltaSizes(
            key_heads=reader.integer("linear_num_key_heads", default=16),
            value_heads=reader.integer("linear_num_value_heads", default=32),
            key=reader.integer("linear_key_head_dim", default=128),
            value=reader.integer("linear_value_head_dim", default=128),
            taps=reader.integer("linear_conv_kernel_dim", default=4),
        ),
        "moe_intermediate_size": reader.integer("moe_intermediate_size", default=512),
        "shared_intermediate_size": reader.integer("shared_expert_intermediate_size", default=512),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    return (
        write_shared(config)
        | write_delta_layers(config)
        | {
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
            "norm_topk_prob": config.normalize_top_k,
            **({"intermediate_size": config.intermediate_size} if config.dense_layers else {}),
        }
    )


def write_delta_layers(config: ModelConfig) -> dict[str, Any]:
    sizes, full = config.delta, config.full_attention_layers
    assert sizes is not None
    kinds = ["full_attention" if layer in full else "linear_attention" for layer in range(config.num_layers)]
    return {
        "attention_bias": config.attention_bias,
        "layer_types": kinds,
        "linear_conv_kernel_dim": sizes.taps,
        "linear_key_head_dim": sizes.key,
        "linear_num_key_heads": sizes.key_heads,
        "linear_num_value_heads": sizes.value_heads,
        "linear_value_head_dim": sizes.value,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "shared_expert_intermediate_size": config.shared_intermediate_size,
    }


# Rows of one tensor belong to heads of keys in turns: of each, query, key, and the values and gates of the
# heads of values that share it; of the other, their rates and how they fade.


def _load_qkvz(tensors: Sequence[Any], shapes: Sequence[Shape]) -> Sequence[Any]:
    (channels, width), (keys, values, _) = shapes
    key = (channels // keys - values) // 2
    heads = tensors[0].reshape(keys, -1, width)
    parts = (heads[:, :key], heads[:, key : 2 * key], heads[:, 2 * key : -values])
    return np.concatenate([part.reshape(-1, width) for part in parts]), heads[:, -values:]


def _save_qkvz(arrays: Sequence[Any]) -> Sequence[Any]:
    qkv, z = arrays
    keys, values, width = z.shape
    query, key, value = np.split(qkv, [(len(qkv) - keys * values) // 2, len(qkv) - keys * values])
    parts = [part.reshape(keys, -1, width) for part in (query, key, value)]
    return [np.concatenate([*parts, z], axis=1).reshape(-1, width)]


def _qkvz_shape(shapes: Sequence[Shape]) -> Sequence[Shape]:
    (channels, width), (keys, values, _) = shapes
    return [(channels + keys * values, width)]


QKVZ = Transform("queries, keys, values and gates of each head", _load_qkvz, _save_qkvz, _qkvz_shape)


def _load_ba(tensors: Sequence[Any], shapes: Sequence[Shape]) -> Sequence[Any]:
    keys, shared, width = shapes[0]
    heads = tensors[0].reshape(keys, 2 * shared, width)
    return heads[:, :shared], heads[:, shared:]


def _save_ba(arrays: Sequence[Any]) -> Sequence[Any]:
    return [np.concatenate(arrays, axis=1).reshape(-1, arrays[0].shape[-1])]


BA = Transform(
    "two numbers of each head",
    _load_ba,
    _save_ba,
    lambda shapes: [(2 * shapes[0][0] * shapes[0][1], shapes[0][2])],
)

TAPS = each(
    "taps of each channel",
    lambda tensor: tensor[:, 0],
    lambda array: array[:, None],
    lambda shape: (shape[0], 1, shape[1]),
)

DELTA_LAYERS = (
    *mapped(
        LAYER + "linear_attn.",
        PLACE + "attention.",
        ("A_log", "fading"),
        ("dt_bias", "fading_bias"),
        ("norm.weight", "norm.scale"),
        ("out_proj.weight", "out.weight"),
    ),
    Weight(LAYER + "linear_attn.conv1d.weight", PLACE + "attention.taps", TAPS),
)
"""Of gated DeltaNet, what is named alike in all families, beside the projections of its input."""

QWEN3_NEXT = Family(
    architecture="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *QK_NORMS,
        *BIASES,
        *DELTA_LAYERS,
        Weight(
            LAYER + "linear_attn.in_proj_qkvz.weight",
            (PLACE + "attention.qkv.weight", PLACE + "attention.z"),
            QKVZ,
        ),
        Weight(LAYER + "linear_attn.in_proj_ba.weight", (PLACE + "attention.b", PLACE + "attention.a"), BA),
        *ROUTED_LAYERS,
        *GATED_SHARED_EXPERT,
        *DENSE_LAYERS,
    ),
)
