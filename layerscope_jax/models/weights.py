"""Which tensor of a Hugging Face checkpoint is which array of a decoder, and what happens to it on the way.

A family has one table of rows (`Weight`), by which it is loaded and saved. Nothing follows from a tensor's
name alone: whether it is transposed, say, is written in its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """What becomes of a checkpoint's tensor on its way into the decoder, and back.

    Attributes:
        name: for messages.
        load: the tensor as the checkpoint has it -> as the decoder has it. Views are welcome: JAX copies what
            does not lie in order several times faster than NumPy.
        save: the reverse.
        stored_shape: shape of the decoder's array -> shape of the tensor.

    >>> TRANSPOSE.stored_shape((2, 3)), IDENTITY.stored_shape((2, 3))
    ((3, 2), (2, 3))
    """

    name: str
    load: Callable[[Any], Any]
    save: Callable[[Any], Any]
    stored_shape: Callable[[Shape], Shape]


IDENTITY = Transform("identity", lambda array: array, lambda array: array, lambda shape: shape)

TRANSPOSE = Transform("transpose", lambda array: array.T, lambda array: array.T, lambda shape: shape[::-1])
"""HF keeps linear layers as [out, in], the decoder as [in, out]."""


class Weight(NamedTuple):
    """A row of a family's table.

    Attributes:
        tensor: HF's name, in which `{layer}` stands for each decoder layer and `{expert}` for each expert.
        place: dotted path of the array in a `Decoder`, with the same `{layer}`; of a routed expert's matrix,
            "experts.{layer}.{expert}.gate" (or up, down, bias). A row whose place a model does not have
            (biases, a tied head, experts of a dense layer) does not count for it.
        transform: what happens on the way.
    """

    tensor: str
    place: str
    transform: Transform = IDENTITY


EXPERTS = "experts.{layer}.{expert}."
"""What the places of routed experts begin with."""


def mapped(tensors: str, places: str, *parts: tuple[str, str, Transform]) -> tuple[Weight, ...]:
    """Rows whose names and places begin alike.

    >>> mapped("model.", "", ("norm.weight", "norm.scale", IDENTITY))[0][:2]
    ('model.norm.weight', 'norm.scale')
    """
    return tuple(Weight(tensors + tensor, places + place, transform) for tensor, place, transform in parts)


ROUTER = "layers.{layer}.router.weight"
"""The place of a MoE layer's router."""

LAYER, PLACE = "model.layers.{layer}.", "layers.{layer}."

WEIGHTS = (
    Weight("model.embed_tokens.weight", "embedding"),
    *mapped(
        LAYER,
        PLACE,
        ("input_layernorm.weight", "attention_norm.scale", IDENTITY),
        ("self_attn.q_proj.weight", "attention.q.weight", TRANSPOSE),
        ("self_attn.k_proj.weight", "attention.k.weight", TRANSPOSE),
        ("self_attn.v_proj.weight", "attention.v.weight", TRANSPOSE),
        ("self_attn.o_proj.weight", "attention.o.weight", TRANSPOSE),
        ("post_attention_layernorm.weight", "moe_norm.scale", IDENTITY),
    ),
    Weight("model.norm.weight", "norm.scale"),
    Weight("lm_head.weight", "head", TRANSPOSE),
)
"""What every family here shares."""

QK_NORMS = mapped(
    LAYER,
    PLACE,
    ("self_attn.q_norm.weight", "attention.q_norm.scale", IDENTITY),
    ("self_attn.k_norm.weight", "attention.k_norm.scale", IDENTITY),
)

BIASES = mapped(
    LAYER,
    PLACE,
    ("self_attn.q_proj.bias", "attention.q.bias", IDENTITY),
    ("self_attn.k_proj.bias", "attention.k.bias", IDENTITY),
    ("self_attn.v_proj.bias", "attention.v.bias", IDENTITY),
    ("self_attn.o_proj.bias", "attention.o.bias", IDENTITY),
)

DENSE_LAYERS = mapped(
    LAYER,
    PLACE,
    ("post_attention_layernorm.weight", "mlp_norm.scale", IDENTITY),
    ("mlp.gate_proj.weight", "mlp.gate.weight", TRANSPOSE),
    ("mlp.up_proj.weight", "mlp.up.weight", TRANSPOSE),
    ("mlp.down_proj.weight", "mlp.down.weight", TRANSPOSE),
)

ROUTED_LAYERS = (
    Weight(LAYER + "mlp.gate.weight", ROUTER, TRANSPOSE),
    *mapped(
        LAYER + "mlp.experts.{expert}.",
        EXPERTS,
        ("gate_proj.weight", "gate", TRANSPOSE),
        ("up_proj.weight", "up", TRANSPOSE),
        ("down_proj.weight", "down", TRANSPOSE),
    ),
)
"""Routers and experts as most families name them."""
