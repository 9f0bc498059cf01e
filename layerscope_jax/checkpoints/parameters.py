"""How many parameters the parts of a model have, from its config alone: no array is made."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from layerscope_jax.checkpoints.weight_names import ParameterPath, hollow_layer, shapes_of_layer
from layerscope_jax.models.config import LayerKind, ModelConfig
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.models.layers import MatrixParam, abstract

ENDS = "embedding and head"
ROUTED = "routed experts"
OTHER = "other"

PARTS = {
    "attention_norm": "attention",
    "attention": "attention",
    "attention_after": "attention",
    "mlp_norm": "dense feed-forward",
    "mlp": "dense feed-forward",
    "shared": "shared experts",
    "shared_norm": "shared experts",
    "shared_after": "shared experts",
    "shared_gate": "shared experts",
    "moe_norm": "routers",
    "router": "routers",
    "router_scale": "routers",
    "expert_scale": "routers",
}
"""Parts of a decoder layer, and what they are counted under: a norm with what reads it."""


def part_of(path: ParameterPath) -> str:
    """Returns what a dense parameter is counted under.

    >>> part_of(("layers", 3, "router", "weight")), part_of(("norm", "scale"))
    ('routers', 'embedding and head')
    """
    return PARTS.get(str(path[2]), OTHER) if path[0] == "layers" else ENDS


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters of each part that a model has.

    One layer of each kind is looked at, so that it takes no longer for a model of many layers.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True)
    >>> parameters_by_part(config)
    {'embedding and head': 520, 'attention': 400, 'routers': 80, 'routed experts': 768}
    """
    counts: Counter[str] = Counter()
    ends = config.without_layers()
    hollow = abstract(lambda rngs: Decoder(ends, rngs=rngs, dtype=np.dtype(np.float32)))
    arrays: dict[Any, jax.ShapeDtypeStruct] = flatten_dict(nnx.to_pure_dict(nnx.state(hollow)))
    for path, array in arrays.items():
        counts[part_of(path)] += array.size
    for layer, number in kinds_of(config).values():
        for path, shape in shapes_of_layer(config, layer).items():
            counts[part_of(path)] += number * math.prod(shape)
    counts[ROUTED] = config.num_moe_layers * config.num_experts * config.expert_bytes(1)
    return dict(counts)


def int8_saves(config: ModelConfig, itemsize: int) -> int:
    """Returns the bytes that dense weights take less with their matrices in int8 (`dense_format`).

    Args:
        config: the model's shape.
        itemsize: bytes of a plain weight.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True)
    >>> int8_saves(config, 4), int8_saves(config, 1)
    (1600, -320)
    """
    ends = config.without_layers()
    made = [(1, abstract(lambda rngs: Decoder(ends, rngs=rngs, dtype=np.dtype(np.float32))))]
    made += [(number, hollow_layer(config, layer)) for layer, number in kinds_of(config).values()]
    saved = 0
    for number, module in made:
        matrices = flatten_dict(nnx.to_pure_dict(nnx.state(module, MatrixParam)))
        for outputs, inputs in (array.shape for array in matrices.values()):
            saved += number * outputs * (inputs * (itemsize - 1) - 4)
    return saved


def kinds_of(config: ModelConfig) -> dict[LayerKind, tuple[int, int]]:
    """Returns the kinds of layers of a model: the first layer of each, and how many there are."""
    kinds: dict[LayerKind, tuple[int, int]] = {}
    for layer in range(config.num_layers):
        kind = config.layer_kind(layer)
        first, number = kinds.get(kind, (layer, 0))
        kinds[kind] = first, number + 1
    return kinds


def active_parameters(config: ModelConfig, parts: dict[str, int]) -> int:
    """Returns how many parameters a token needs: all but those of the experts that it does not choose."""
    unchosen = config.num_experts - config.experts_per_token
    return sum(parts.values()) - parts[ROUTED] * unchosen // config.num_experts
