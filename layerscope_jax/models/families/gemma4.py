"""Gemma 4 with experts: a dense network beside them, and norms before and after each part of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_reader import ConfigReader
from layerscope_jax.models.config_values import shown
from layerscope_jax.models.families.gemma4_layers import NORM, Gemma4Attention, Gemma4Config, Gemma4Layer
from layerscope_jax.models.family import Family, write_layer_types, write_shared
from layerscope_jax.models.rotary import RopeScaling
from layerscope_jax.models.weights import (
    BIASES,
    EXPERTS,
    GATE_AND_UP,
    LAYER,
    PLACE,
    QK_NORMS,
    ROUTER,
    Weight,
    mapped,
    mlp,
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    given = {key: value for key, value in config.items() if value is not None}
    for key, value in DEFAULTS.items():
        given.setdefault(key, value)
    given["hidden_act"] = given.pop("hidden_activation")
    reader, ropes = ConfigReader(given), given.pop("rope_parameters", None)
    given["rope_parameters"], of_full = _ropes(reader, {} if ropes is None else ropes)
    shared = reader.shared(
        theta=10_000.0, norm_eps=1e-6, max_position_embeddings=131_072, choices=("top_k_experts",)
    )
    settings = {
        **shared,
        **_windows(reader, shared["num_layers"]),
        **of_full,
        "num_kv_heads": reader.integer("num_key_value_heads"),
        "keys_as_values": reader.flag("attention_k_eq_v", default=False),
        "attention_bias": reader.flag("attention_bias", default=False),
        "embedding_scale": math.sqrt(shared["hidden_size"]),
        "moe_intermediate_size": reader.integer("moe_intermediate_size"),
        "shared_intermediate_size": reader.integer("intermediate_size"),
        "logits_cap": reader.number("final_logit_softcapping", default=None),
    }
    settings |= _full_sizes(reader, settings)
    reader.expect("enable_moe_block", True, "models without experts are not supported")
    reader.expect(
        "num_kv_shared_layers", 0, "layers that use the keys and values of others are not supported"
    )
    reader.expect("use_double_wide_mlp", False, "dense networks of two widths are not supported")
    reader.expect("hidden_size_per_layer_input", 0, "embeddings for each layer are not supported")
    if given.get("use_bidirectional_attention") != "vision":  # which concerns images alone
        reader.expect("use_bidirectional_attention", None, "attention to later tokens is not supported")
    reader.check("use_bidirectional_attention", "vocab_size_per_layer_input")
    return Gemma4Config(family="gemma4", **SAME, **settings)


DEFAULTS = {
    "enable_moe_block": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 9216,
    "num_key_value_heads": 4,
    "sliding_window": 512,
    "tie_word_embeddings": True,
}
"""Of transformers' class, where they are not those of other families."""

SAME: dict[str, Any] = {
    "attention": "gemma4",
    "attention_scale": 1.0,
    "feed_forward": "gemma4",
    "norm": NORM,
    "normalize_top_k": True,
    "qk_norm": "head",
}
"""What the config of no such model says."""


def _windows(reader: ConfigReader, num_layers: int) -> dict[str, Any]:
    """Reads which layers attend within a window, and of how many positions."""
    default = [layer for layer in range(num_layers - 1) if (layer + 1) % 6]
    settings = reader.windows(num_layers, reader.integer("sliding_window"), default)
    if settings["sliding_window"] is None:
        return settings | {"full_attention_layers": tuple(range(num_layers))}
    if num_layers - 1 not in settings["full_attention_layers"]:
        reader.problems.add("layer_types: expected 'full_attention' for the last layer")
    return settings


def _ropes(reader: ConfigReader, given: Any) -> tuple[Any, dict[str, Any]]:
    """Reads `rope_parameters`: those of layers with a window as they are, and settings of the others."""
    kinds = ("sliding_attention", "full_attention")
    if not isinstance(given, Mapping) or not all(isinstance(given.get(kind, {}), Mapping) for kind in kinds):
        reader.problems.add(f"rope_parameters: expected objects {' and '.join(kinds)}, got {shown(given)}")
        given = {}
    inner = reader.inside("rope_parameters.full_attention", given.get(kinds[1], FULL_ROPE))
    kind = inner.text("rope_type", ("proportional", "default"), "default")
    part = inner.number("partial_rotary_factor", default=1.0) if kind == "proportional" else 1.0
    scaling = RopeScaling(kind="proportional", original_max_position_embeddings=0, part=float(part))
    of_full = {
        "full_rope_theta": float(inner.number("rope_theta", default=1_000_000.0)),
        "full_rope_scaling": scaling if kind == "proportional" else None,
    }
    return given.get(kinds[0], {}), of_full


FULL_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25}


def _full_sizes(reader: ConfigReader, settings: dict[str, Any]) -> dict[str, Any]:
    """Reads the sizes of layers without a window, said once or for each layer."""
    size = reader.integer("global_head_dim", default=512)
    heads = reader.integer("num_global_key_value_heads", default=None)
    given = reader.config.get("per_layer_config")
    reader.mark_read("per_layer_config")
    if given is None:
        return {
            "full_head_dim": size,
            "full_kv_heads": heads if heads and settings["keys_as_values"] else settings["num_kv_heads"],
        }
    full = {str(layer) for layer in settings.get("full_attention_layers", ())}
    first = next(iter(given.values()), None) if isinstance(given, Mapping) else None
    if not (
        isinstance(first, Mapping)
        and full == {str(layer) for layer in given}
        and all(each == first for each in given.values())
        and set(first) <= {"head_dim", "num_key_value_heads"}
    ):
        reader.problems.add(
            "per_layer_config: expected one head_dim and num_key_value_heads for all layers with "
            f"full_attention, got {shown(given)}"
        )
        return {"full_head_dim": size, "full_kv_heads": settings["num_kv_heads"]}
    inner = reader.inside("per_layer_config", first)
    return {
        "full_head_dim": inner.integer("head_dim", default=settings["head_dim"]),
        "full_kv_heads": inner.integer("num_key_value_heads", default=settings["num_kv_heads"]),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    assert isinstance(config, Gemma4Config)
    settings = write_shared(config) | write_layer_types(config)
    scaling = config.full_rope_scaling
    full: dict[str, Any] = {"rope_theta": config.full_rope_theta, "rope_type": "default"}
    if scaling is not None:
        full |= {"rope_type": "proportional", "partial_rotary_factor": scaling.part}
    settings["hidden_activation"] = settings.pop("hidden_act")
    settings["top_k_experts"] = settings.pop("num_experts_per_tok")
    sizes = {"head_dim": config.full_head_dim, "num_key_value_heads": config.full_kv_heads}
    return settings | {
        "attention_bias": config.attention_bias,
        "attention_k_eq_v": config.keys_as_values,
        "enable_moe_block": True,
        "final_logit_softcapping": config.logits_cap,
        "global_head_dim": config.full_head_dim,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": config.shared_intermediate_size,
        "model_type": "gemma4_text",
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "num_global_key_value_heads": config.full_kv_heads,
        "per_layer_config": {str(layer): sizes for layer in config.full_attention_layers},
        "rope_parameters": {"full_attention": full, "sliding_attention": settings["rope_parameters"]},
    }


GEMMA4 = Family(
    architecture="Gemma4ForCausalLM",
    model_type="gemma4",
    aliases=("Gemma4ForConditionalGeneration",),
    read_config=read_config,
    write_config=write_config,
    attentions={"gemma4": Gemma4Attention},
    feed_forwards={"gemma4": Gemma4Layer},
    weights=(
        Weight("model.embed_tokens.weight", "embedding"),
        *mapped(
            LAYER,
            PLACE,
            ("input_layernorm.weight", "attention_norm.scale"),
            ("post_attention_layernorm.weight", "attention_after.scale"),
            ("pre_feedforward_layernorm.weight", "shared_norm.scale"),
            ("post_feedforward_layernorm_1.weight", "shared_after.scale"),
            ("pre_feedforward_layernorm_2.weight", "moe_norm.scale"),
            ("post_feedforward_layernorm_2.weight", "experts_after.scale"),
            ("post_feedforward_layernorm.weight", "after.scale"),
            ("layer_scalar", "factor"),
            ("router.scale", "router_scale"),
            ("router.per_expert_scale", "expert_scale"),
            ("self_attn.q_proj.weight", "attention.q.weight"),
            ("self_attn.k_proj.weight", "attention.k.weight"),
            ("self_attn.v_proj.weight", "attention.v.weight"),
            ("self_attn.o_proj.weight", "attention.o.weight"),
        ),
        *QK_NORMS,
        *BIASES,
        Weight(LAYER + "router.proj.weight", ROUTER),
        *mlp("mlp.", "shared."),
        Weight(LAYER + "experts.gate_up_proj", (EXPERTS + "gate", EXPERTS + "up"), GATE_AND_UP),
        Weight(LAYER + "experts.down_proj", EXPERTS + "down"),
        *mapped(
            LAYER + "experts.{expert}.",
            EXPERTS,
            ("gate_proj.weight", "gate"),
            ("up_proj.weight", "up"),
            ("down_proj.weight", "down"),
        ),
        Weight("model.norm.weight", "norm.scale"),
        Weight("lm_head.weight", "head"),
    ),
)
