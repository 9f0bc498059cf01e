"""Adds a family of models without changing the package: Hunyuan-A13B's, from this file alone.

    python examples/extend/family.py [checkpoint]

Its layers do two things that those of the package's families do not: queries and keys are normalised after
they are rotated, and the rotation's base is stretched by a factor `alpha`. So the file has

- `HunYuanConfig`, the setting that it adds;
- `NormedLastAttention`, its own part of a layer;
- `read_config` and `write_config`, its `config.json` there and back;
- a table of weights, most of which it shares with others.

With no checkpoint given it loads the tiny one beside it, generates with half of its experts on the
device, and compares with what Hugging Face transformers computes from the same files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layerscope_jax import Engine, ModelConfig, OffloadConfig, load
from layerscope_jax.models import ConfigReader, Family, Weight, register_family
from layerscope_jax.models.attention import Attention
from layerscope_jax.models.family import write_shared
from layerscope_jax.models.layers import RMSNorm
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.models.weights import (
    BIASES,
    LAYER,
    PER_EXPERT,
    PLACE,
    ROUTER,
    STACKED,
    WEIGHTS,
    mapped,
    mlp,
)

GOLDEN = Path(__file__).parent / "hunyuan_v1_moe"
TOLERANCE = 1e-4  # of logits: rounding in float32 alone moves them by up to 5e-5


@dataclass(frozen=True, kw_only=True)
class HunYuanConfig(ModelConfig):
    """The shape of a Hunyuan model.

    Attributes:
        rope_alpha: stretches `rope_theta`, whatever the length of a sequence; 1 for not at all.
    """

    attention: str = "normed last"
    rope_alpha: float = 1.0


class NormedLastAttention(Attention):
    """Attention whose queries and keys are normalised after they are rotated."""

    def __init__(self, config: HunYuanConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        size = config.head_dim
        theta = config.rope_theta * config.rope_alpha ** (size / (size - 2))
        super().__init__(replace(config, rope_theta=theta), rngs=rngs, dtype=dtype)

    def rotated(self, x: jax.Array, norm: RMSNorm | None, positions: jax.Array) -> jax.Array:
        """Heads of a projection of queries or keys: [B, S, H * D_head] -> [B, S, H, D_head]."""
        heads = super().rotated(x, None, positions)
        return heads if norm is None else norm(heads)


PER_LAYER = ("moe_intermediate_size", "moe_topk", "num_experts", "num_shared_expert")
"""Settings that published configs give as lists, one number for each layer."""

EXPECTED = {
    "group_limited_greedy": False,
    "moe_drop_tokens": False,
    "moe_layer_num_skipped": 0,
    "norm_topk_prob": True,
    "norm_type": "rms",
    "num_shared_expert": 1,
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_mla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
}
"""Keys of published configs that HF's class does not read, and what it computes."""

HARMLESS = ("eod_token_id", "moe_random_routing_dropped_token", "org_vocab_size", "pad_id")


def read_config(config: Mapping[str, Any]) -> HunYuanConfig:
    """Settings of a `config.json`; a key that nothing reads is refused, as it may change the arithmetic."""
    given = dict(config)
    reader = ConfigReader(given)
    for key in PER_LAYER:
        take_from_list(reader, given, key)
    alpha = take_alpha(reader, given)
    shared = reader.shared(
        theta=10_000.0,
        norm_eps=1e-5,
        max_position_embeddings=2048,
        choices=("moe_topk", "num_experts_per_tok"),
    )
    inner = reader.integer("intermediate_size")
    settings = {
        **shared,
        "num_kv_heads": reader.integer("num_key_value_heads", default=shared["num_heads"]),
        "moe_intermediate_size": inner,
        "shared_intermediate_size": inner,
        "attention_bias": reader.flag("attention_bias", default=False),
        "rope_alpha": alpha,
    }
    sizes = {"attention_head_dim": shared["head_dim"], "moe_intermediate_size": inner}
    for key, value in (EXPECTED | sizes).items():
        reader.expect(key, value, "other values are not supported")
    reader.check(*HARMLESS)
    return HunYuanConfig(
        family="hunyuan_v1_moe",
        qk_norm="head",
        normalize_top_k=True,
        routing=RoutingRule(float32_logits=True),
        **settings,
    )


def take_from_list(reader: ConfigReader, given: dict[str, Any], key: str) -> None:
    """Puts one number in the place of a list that has it for every layer; notes a list that has others."""
    values = given.get(key)
    if not isinstance(values, list) or not values:
        return
    if any(value != values[0] for value in values):
        reader.problems.add(
            f"{key}: expected the same number for every layer, got {values}; layers that differ are not "
            "supported"
        )
    given[key] = values[0]


def take_alpha(reader: ConfigReader, given: dict[str, Any]) -> float:
    """Takes the stretched base out of the rotary embedding's settings, which are plain ones then."""
    name = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    rope = given.get(name)
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "dynamic":
        return 1.0
    alpha = reader.inside(name, rope).number("alpha", default=None)
    if alpha is None:
        return 1.0
    given[name] = {"rope_type": "default", "rope_theta": rope.get("rope_theta")}
    return float(alpha)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The reverse."""
    assert isinstance(config, HunYuanConfig)
    settings = write_shared(config)
    settings["moe_topk"] = settings.pop("num_experts_per_tok")
    if config.rope_alpha != 1.0:
        settings["rope_parameters"] |= {"rope_type": "dynamic", "alpha": config.rope_alpha, "factor": 1.0}
    return settings | {
        "attention_bias": config.attention_bias,
        "intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
    }


HUNYUAN = Family(
    architecture="HunYuanMoEV1ForCausalLM",
    model_type="hunyuan_v1_moe",
    read_config=read_config,
    write_config=write_config,
    weights=(
        *WEIGHTS,
        *BIASES,
        *mapped(
            LAYER + "self_attn.",
            PLACE + "attention.",
            ("query_layernorm.weight", "q_norm.scale"),
            ("key_layernorm.weight", "k_norm.scale"),
        ),
        Weight(LAYER + "mlp.gate.wg.weight", ROUTER),
        *PER_EXPERT,
        *STACKED,
        *mlp("mlp.shared_mlp.", "shared."),
    ),
    attentions={"normed last": NormedLastAttention},
)


def check(folder: Path = GOLDEN) -> float:
    """Compares with the golden values of a folder.

    Returns:
        The largest difference of a logit.

    Raises:
        AssertionError: if it is too large, or the engine's tokens are not transformers' own.
    """
    golden = np.load(folder / "golden.npz")
    model = load(folder)
    logits, _ = nnx.jit(lambda decoder, tokens: decoder(tokens))(model.whole(), golden["tokens"])
    real = np.arange(golden["tokens"].shape[1])[None] < golden["lengths"][:, None]
    difference = float(np.abs(np.asarray(logits)[real] - golden["logits"][real]).max())
    assert difference < TOLERANCE, f"logits differ by {difference}"
    prompts = [row[:length].tolist() for row, length in zip(golden["tokens"], golden["lengths"], strict=True)]
    steps = golden["greedy"].shape[1]
    with Engine(model, OffloadConfig(device_budget=model.bank.total_bytes // 2, policy="lru")) as engine:
        result = engine.generate(prompts, max_new_tokens=steps)
    assert result.token_ids == golden["greedy"].tolist(), "the engine's tokens are not transformers' own"
    return difference


def main() -> None:
    register_family(HUNYUAN)
    if sys.argv[1:]:
        model = load(sys.argv[1])
        print(f"{model.config.num_moe_layers} MoE layers, {model.bank.total_bytes:,} bytes of experts")
    else:
        print(f"as transformers: logits to {check():.1e}, and every token of the engine's")


if __name__ == "__main__":
    main()
