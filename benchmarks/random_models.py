"""Random models in the shapes of published ones, for measuring: what they say means nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from layerscope_jax import Decoder, Model, ModelConfig


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
    shared: Any = {"vocab_size": 256 if quick else 8192, "max_positions": 1024}
    common: Any = shared | {"family": "mixtral", "normalize_top_k": True, "expert_hidden": wide}
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
            expert_hidden=narrow,
        ),
    }


def random_decoder(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Decoder:
    """Weights of unit gain, so that routing is spread and no two logits are nearly equal."""
    random = np.random.default_rng(seed)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def draw(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        if path[-1] == "scale":
            return jnp.ones(shape, dtype)
        inputs = shape[-1] if path[-1] == "embedding" else shape[-2]
        gain = np.float32((2 if "router" in path else 1) / np.sqrt(inputs))
        return jnp.asarray((random.standard_normal(shape, np.float32) * gain).astype(dtype))

    leaves = {path: draw(path, leaf.shape) for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items()}
    return nnx.merge(graphdef, unflatten_dict(leaves))


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """In bfloat16, as published ones are."""
    return Model.from_decoder(random_decoder(config, seed, jnp.bfloat16))
