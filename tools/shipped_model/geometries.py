"""Small models of published families: their layers, experts and choices, with every part that they have.

Widths are small (hidden size 64), so that one core trains them within an hour; the numbers of layers, experts
and choices, and what a layer consists of, are those of the published models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from layerscope_jax.models.config import LatentSizes, ModelConfig
from layerscope_jax.models.experts import ExpertBody
from layerscope_jax.models.routing_rules import RoutingRule

HIDDEN = 64
HEADS = 2
HEAD = HIDDEN // HEADS

LATENT: dict[str, Any] = {
    "attention": "latent",
    "latent": LatentSizes(query_rank=None, rank=32, nope=16, rope=16, value=32),
    "head_dim": 32,
    "num_kv_heads": HEADS,
    "rope_interleaved": True,
    "norm_eps": 1e-6,
    # The first of 27 decoder layers has no experts, and two experts of each other one are every token's.
    "num_layers": 27,
    "dense_layers": (0,),
    "intermediate_size": 64,
    "num_experts": 64,
    "experts_per_token": 6,
    "moe_intermediate_size": 8,
    "shared_intermediate_size": 16,
}


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A published model, and what its small likeness is made of.

    Attributes:
        name: of the published model.
        settings: of `ModelConfig`, but for what all have in common.
    """

    name: str
    settings: dict[str, Any] = field(repr=False)

    def model_config(self, vocab_size: int, length: int) -> ModelConfig:
        """The shape of the model, for sequences of `length` tokens."""
        common = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": 1, "head_dim": HEAD}
        return ModelConfig(
            vocab_size=vocab_size,
            max_position_embeddings=length,
            stop_token_ids=(0,),
            **common | self.settings,
        )


GeometryName = Literal["deepseek-v2-lite", "moonlight", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b"]
"""Named as the profiles of the published models are, where there are such."""

GEOMETRIES: dict[GeometryName, Geometry] = {
    "deepseek-v2-lite": Geometry(
        name="DeepSeek-V2-Lite",
        settings=LATENT
        | {"family": "deepseek_v2", "normalize_top_k": False, "routing": RoutingRule(float32_logits=True)},
    ),
    "moonlight": Geometry(
        name="Moonlight-16B-A3B",
        settings=LATENT
        | {
            "family": "deepseek_v3",
            "normalize_top_k": True,
            "routing": RoutingRule(
                score="sigmoid",
                selection_bias=True,
                float32_logits=True,
                group_score="two_best",
                epsilon=1e-20,
                scale=2.446,
            ),
        },
    ),
    "qwen3-30b-a3b": Geometry(
        name="Qwen3-30B-A3B",
        settings={
            "family": "qwen3_moe",
            "num_layers": 48,
            "num_experts": 128,
            "experts_per_token": 8,
            "moe_intermediate_size": 8,
            "normalize_top_k": True,
            "qk_norm": "head",
            "norm_eps": 1e-6,
        },
    ),
    "mixtral-8x7b": Geometry(
        name="Mixtral-8x7B",
        settings={
            "family": "mixtral",
            "num_layers": 32,
            "num_experts": 8,
            "experts_per_token": 2,
            "moe_intermediate_size": 32,
            "normalize_top_k": True,
        },
    ),
    "gpt-oss-20b": Geometry(
        name="gpt-oss-20b",
        settings={
            "family": "gpt_oss",
            "num_layers": 24,
            "num_experts": 32,
            "experts_per_token": 4,
            "moe_intermediate_size": 16,
            "normalize_top_k": False,
            "routing": RoutingRule(score="top_k_softmax", logit_bias=True),
            "expert_body": ExpertBody("clamped", bias=True),
            "attention_bias": True,
            "attention_sinks": True,
            # Every other layer, beginning with the first; the published window is 128 of 131,072 positions.
            "sliding_window": 32,
            "full_attention_layers": tuple(range(1, 24, 2)),
        },
    ),
}
