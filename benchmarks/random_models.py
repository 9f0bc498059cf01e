"""Random models in the shapes of published ones, for measuring: what they say means nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from layerscope_jax import Decoder, Model, ModelConfig
from layerscope_jax.checkpoints.weight_names import Naming
from layerscope_jax.models.config import DeltaSizes, LatentSizes
from layerscope_jax.models.experts import ExpertBody
from layerscope_jax.models.families.gemma4_layers import Gemma4Config
from layerscope_jax.models.layers import abstract
from layerscope_jax.models.rotary import RopeScaling
from layerscope_jax.models.routing_rules import RoutingRule
from layerscope_jax.offload.bank import ExpertBank, device_sharding


def shapes(quick: bool) -> dict[str, ModelConfig]:
    """The published proportions, smaller; the small vocabulary keeps the share of the head as it is there."""
    mixtral: dict[str, Any] = {
        "hidden_size": 512,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
    }
    olmoe: dict[str, Any] = {
        "hidden_size": 384,
        "num_layers": 8,
        "num_heads": 6,
        "num_kv_heads": 6,
        "head_dim": 64,
    }
    if quick:
        tiny = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
        mixtral, olmoe = tiny, tiny
    wide, narrow = (16, 8) if quick else (1024, 192)
    shared: Any = {"vocab_size": 256 if quick else 8192, "max_position_embeddings": 1024}
    common: Any = shared | {"family": "mixtral", "normalize_top_k": True, "moe_intermediate_size": wide}
    return {
        "mixtral": ModelConfig(**common, **mixtral, num_experts=8, experts_per_token=2),
        "mixtral-444m": ModelConfig(
            **common,
            **(mixtral | {"num_kv_heads": mixtral["num_heads"]}),
            num_experts=32,
            experts_per_token=4,
        ),
        "olmoe": ModelConfig(
            **shared,
            **olmoe,
            family="olmoe",
            normalize_top_k=False,
            qk_norm="all",
            num_experts=64,
            experts_per_token=8,
            moe_intermediate_size=narrow,
        ),
    }


def random_decoder(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Decoder:
    """Weights of unit gain, so that routing is spread and no two logits are nearly equal."""
    random = np.random.default_rng(seed)
    decoder = abstract(lambda rngs: Decoder(config, rngs=rngs))
    graphdef, state = nnx.split(decoder)

    def draw(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        if path[-1] == "scale":
            return jnp.ones(shape, dtype)
        if len(shape) == 1:  # biases, sinks
            return jnp.asarray((0.1 * random.standard_normal(shape, np.float32)).astype(dtype))
        gain = np.float32((2 if "router" in path else 1) / np.sqrt(shape[-1]))
        return jnp.asarray((random.standard_normal(shape, np.float32) * gain).astype(dtype))

    leaves = {path: draw(path, leaf.shape) for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items()}
    return nnx.merge(graphdef, unflatten_dict(leaves))


def shapes_of_attention(quick: bool) -> dict[str, ModelConfig]:
    """A model of each kind of attention, in the proportions of a published one.

    Grouped queries as Qwen3-30B-A3B has them; with sinks, biases and a window in every second layer, and
    clamped experts, as gpt-oss; latent attention, shared experts and a dense first layer, as Moonlight; gated
    DeltaNet, gated attention in every third layer, and gated shared experts, as Qwen3-Next; windows, heads of
    two sizes, and a dense branch beside the experts, as Gemma 4.
    """
    layers, hidden, inner, experts = (2, 32, 16, 8) if quick else (6, 512, 256, 32)
    shared: Any = {
        "vocab_size": 256 if quick else 8192,
        "max_position_embeddings": 1024,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_experts": experts,
        "experts_per_token": 4,
        "moe_intermediate_size": inner,
    }
    grouped: Any = {"num_heads": hidden // 16, "num_kv_heads": hidden // 128 or 1, "head_dim": 32}
    sizes = LatentSizes(query_rank=None, rank=hidden // 4, nope=hidden // 16, rope=hidden // 32 * 2, value=32)
    return {
        "grouped": ModelConfig(**shared, **grouped, family="qwen3_moe", normalize_top_k=True, qk_norm="head"),
        "sinks": ModelConfig(
            **shared,
            **grouped,
            family="gpt_oss",
            normalize_top_k=False,
            attention_bias=True,
            attention_sinks=True,
            sliding_window=64,
            full_attention_layers=tuple(range(1, layers, 2)),
            expert_body=ExpertBody("clamped", bias=True),
            routing=RoutingRule(score="top_k_softmax", logit_bias=True),
        ),
        "latent": ModelConfig(
            **shared,
            family="deepseek_v3",
            num_heads=8,
            num_kv_heads=8,
            head_dim=sizes.nope + sizes.rope,
            attention="latent",
            latent=sizes,
            rope_interleaved=True,
            dense_layers=(0,),
            intermediate_size=4 * inner,
            shared_intermediate_size=2 * inner,
            normalize_top_k=True,
            routing=RoutingRule(
                score="sigmoid",
                selection_bias=True,
                float32_logits=True,
                group_score="two_best",
                epsilon=1e-20,
                scale=2.446,
            ),
        ),
        "delta": ModelConfig(
            **shared,
            **grouped,
            family="qwen3_next",
            rotary_dim=8,
            delta=DeltaSizes(
                key_heads=max(2, hidden // 64),
                value_heads=2 * max(2, hidden // 64),
                key=64 if hidden > 64 else 16,
                value=64 if hidden > 64 else 16,
                taps=4,
            ),
            full_attention_layers=tuple(range(1, layers, 3)),
            attention_gate=True,
            norm="rms_offset",
            qk_norm="head",
            shared_intermediate_size=inner,
            shared_gate=True,
            normalize_top_k=True,
        ),
        "gemma": Gemma4Config(
            **shared,
            **grouped,
            family="gemma4",
            attention="gemma4",
            feed_forward="gemma4",
            expert_body=ExpertBody("gelu_tanh"),
            shared_intermediate_size=2 * inner,
            qk_norm="head",
            attention_scale=1.0,
            sliding_window=64,
            full_attention_layers=tuple(range((layers - 1) % 3, layers, 3)),
            full_head_dim=64,
            full_kv_heads=hidden // 256 or 1,
            full_rope_theta=1_000_000.0,
            full_rope_scaling=RopeScaling(kind="proportional", original_max_position_embeddings=0, part=0.25),
            keys_as_values=True,
            norm="rms_float32",
            embedding_scale=float(np.sqrt(hidden)),
            logits_cap=30.0,
            normalize_top_k=True,
        ),
    }


_WIDE: Any = {"hidden_size": 2048, "head_dim": 128, "max_position_embeddings": 4096}

PUBLISHED = {
    "deepseek-v2-lite": ModelConfig(
        **(_WIDE | {"head_dim": 192}),
        family="deepseek_v2",
        vocab_size=102_400,
        num_layers=27,
        num_heads=16,
        num_kv_heads=16,
        num_experts=64,
        experts_per_token=6,
        moe_intermediate_size=1408,
        normalize_top_k=False,
        dense_layers=(0,),
        intermediate_size=10_944,
        shared_intermediate_size=2816,
        attention="latent",
        latent=LatentSizes(query_rank=None, rank=512, nope=128, rope=64, value=128),
        rope_interleaved=True,
        routing=RoutingRule(float32_logits=True),
    ),
    "qwen3-30b-a3b": ModelConfig(
        **_WIDE,
        family="qwen3_moe",
        vocab_size=151_936,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        num_experts=128,
        experts_per_token=8,
        moe_intermediate_size=768,
        normalize_top_k=True,
        qk_norm="head",
    ),
    "mixtral-8x7b": ModelConfig(
        **(_WIDE | {"hidden_size": 4096}),
        family="mixtral",
        vocab_size=32_000,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        num_experts=8,
        experts_per_token=2,
        moe_intermediate_size=14_336,
        normalize_top_k=True,
    ),
}
"""Published models' own sizes."""


def published(name: str, quick: bool) -> ModelConfig:
    """A model of `PUBLISHED`; or one of its family that is small in everything."""
    config = PUBLISHED[name]
    if not quick:
        return config
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": 256, "num_layers": 4}
    heads: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
    if config.latent is not None:
        small = LatentSizes(query_rank=None, rank=32, nope=16, rope=16, value=16)
        heads |= {"latent": small, "intermediate_size": 64, "shared_intermediate_size": 32}
    return replace(config, **sizes, **heads, num_experts=min(config.num_experts, 16))


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """In bfloat16, each matrix put where it belongs as it is drawn: for sizes that memory holds only once.

    Drawing normal numbers would take minutes. These are random bits with the exponent set, so that a matrix
    has about unit gain: of either sign, and between one and two times a power of two.
    """
    random = np.random.Generator(np.random.SFC64(seed))

    def draw(shape: tuple[int, ...], gain: float) -> np.ndarray:
        size = math.prod(shape)
        words = random.integers(0, 2**64, -(-size // 4), np.uint64)
        exponent = 127 + round(math.log2(gain / math.sqrt(7 / 3)))  # the root mean square of 1 to 2
        words &= np.uint64(0x807F807F807F807F)
        words |= np.uint64((exponent << 7) * 0x0001000100010001)
        return words.view(jnp.bfloat16)[:size].reshape(shape)

    def dense(path: tuple, shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] == "scale":
            return np.ones(shape, jnp.bfloat16)
        # Tokens differ by their embedding alone: as large as what layers add to it, it keeps them apart.
        gain = 1.0 if path[-1] == "embedding" else (2 if "router" in path else 1) / math.sqrt(shape[-1])
        return draw(shape, gain)

    naming, sharding = Naming.of(config), device_sharding()

    def dtype(path: tuple) -> Any:
        return np.float32 if path in naming.wide else jnp.bfloat16

    parameters = {
        path: jax.block_until_ready(jax.device_put(dense(path, shape).astype(dtype(path)), sharding))
        for path, shape in naming.parameters.items()
    }
    bank = ExpertBank.build(config, lambda expert, matrix, shape: draw(shape, shape[-1] ** -0.5))
    return Model(config, naming.graphdef, unflatten_dict(parameters), bank)
