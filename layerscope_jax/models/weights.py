"""Which tensors of a Hugging Face checkpoint become which arrays of a decoder, and what happens on the way.

A family has one table of rows (`Weight`), by which it is loaded and saved. Nothing follows from a tensor's
name alone: whether it is transposed, say, is written in its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """What becomes of some of a checkpoint's tensors on their way into the decoder, and back.

    Attributes:
        name: for messages.
        load: (tensors as the checkpoint has them, shapes of the decoder's arrays) -> the arrays. Views are
            welcome: JAX copies what does not lie in order several times faster than NumPy.
        save: arrays -> tensors; None if it cannot be undone, in a row that only loads.
        stored_shapes: shapes of the decoder's arrays -> shapes of the tensors.
        stored_dtypes: safetensors' name of the dtype that each tensor must have, None for any float; empty
            where that holds for all.

    >>> TRANSPOSE.stored_shapes([(2, 3)]), IDENTITY.stored_shapes([(2, 3)])
    ([(3, 2)], [(2, 3)])
    """

    name: str
    load: Callable[[Sequence[Any], Sequence[Shape]], Sequence[Any]]
    save: Callable[[Sequence[Any]], Sequence[Any]] | None
    stored_shapes: Callable[[Sequence[Shape]], Sequence[Shape]]
    stored_dtypes: tuple[str | None, ...] = ()


def each(
    name: str, load: Callable[[Any], Any], save: Callable[[Any], Any], shape: Callable[[Shape], Shape]
) -> Transform:
    """A transform of one tensor into one array."""
    return Transform(
        name,
        lambda tensors, _: [load(tensor) for tensor in tensors],
        lambda arrays: [save(array) for array in arrays],
        lambda shapes: [shape(each) for each in shapes],
    )


IDENTITY = each("identity", lambda array: array, lambda array: array, lambda shape: shape)

TRANSPOSE = each("transpose", lambda array: array.T, lambda array: array.T, lambda shape: shape[::-1])
"""HF keeps linear layers as [out, in], the decoder as [in, out]."""

ROW = each("row", lambda array: array[0], lambda array: array[None], lambda shape: (1, *shape))
"""A vector that is kept as a matrix of one row."""


class Weight(NamedTuple):
    """A row of a family's table.

    Several rows may have the same places: that of the first tensors which a checkpoint holds counts, and the
    first one is how a model is saved.

    Attributes:
        tensor: HF's name, in which `{layer}` stands for each decoder layer and `{expert}` for each expert;
            several for places that are made of several. A name without `{expert}` for the place of an expert
            is a stack of all experts of a layer.
        place: dotted path of the array in a `Decoder`, with the same `{layer}`; of an array of a routed
            expert, "experts.{layer}.{expert}.gate" (or up, down, bias); several for a tensor that holds
            several.
            A row with a place that a model does not have (biases, a tied head, experts of a dense layer) does
            not count for it.
        transform: what happens on the way.
    """

    tensor: str | tuple[str, ...]
    place: str | tuple[str, ...]
    transform: Transform = IDENTITY

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,) if isinstance(self.tensor, str) else self.tensor

    @property
    def places(self) -> tuple[str, ...]:
        return (self.place,) if isinstance(self.place, str) else self.place


EXPERTS = "experts.{layer}.{expert}."
"""What the places of routed experts begin with."""


def mapped(tensors: str, places: str, *parts: tuple[Any, ...]) -> tuple[Weight, ...]:
    """Rows whose names and places begin alike.

    >>> mapped("model.", "", ("norm.weight", "norm.scale", IDENTITY))[0][:2]
    ('model.norm.weight', 'norm.scale')
    """
    return tuple(Weight(tensors + tensor, places + place, *transform) for tensor, place, *transform in parts)


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

PER_EXPERT = mapped(
    LAYER + "mlp.experts.{expert}.",
    EXPERTS,
    ("gate_proj.weight", "gate", TRANSPOSE),
    ("up_proj.weight", "up", TRANSPOSE),
    ("down_proj.weight", "down", TRANSPOSE),
)
"""Experts as most families publish them."""


def _halves(tensors: Sequence[Any], shapes: Sequence[Shape]) -> Sequence[Any]:
    (both,), inner = tensors, shapes[0][1]
    return both[:inner].T, both[inner:].T


def _join(arrays: Sequence[Any]) -> Sequence[Any]:
    return [np.concatenate([array.T for array in arrays])]


GATE_AND_UP = Transform(
    "gate above up, transposed", _halves, _join, lambda shapes: [(2 * shapes[0][1], shapes[0][0])]
)
"""gate and up [D, F] from one tensor [2 F, D]."""

STACKED = (
    Weight(LAYER + "mlp.experts.gate_up_proj", (EXPERTS + "gate", EXPERTS + "up"), GATE_AND_UP),
    Weight(LAYER + "mlp.experts.down_proj", EXPERTS + "down", TRANSPOSE),
)
"""Experts as transformers 5 keeps them in memory: all of a layer in two tensors."""

ROUTER_GATE = Weight(LAYER + "mlp.gate.weight", ROUTER, TRANSPOSE)

ROUTED_LAYERS = (ROUTER_GATE, *PER_EXPERT, *STACKED)
"""Routers and experts as most families name them."""

SELECTION_BIAS = Weight(LAYER + "mlp.gate.e_score_correction_bias", "layers.{layer}.router.selection_bias")


def mlp(tensors: str, places: str) -> tuple[Weight, ...]:
    """Rows of a dense feed-forward network, and of its biases where a model has them."""
    parts = []
    for name in ("gate", "up", "down"):
        parts.append((f"{name}_proj.weight", f"{name}.weight", TRANSPOSE))
        parts.append((f"{name}_proj.bias", f"{name}.bias", IDENTITY))
    return mapped(LAYER + tensors, PLACE + places, *parts)


SHARED_EXPERTS = mlp("mlp.shared_experts.", "shared.")
"""The expert that all tokens go through, as DeepSeek and most others name it."""


def _split_latent(tensors: Sequence[Any], shapes: Sequence[Shape]) -> Sequence[Any]:
    (heads, nope, rank), _ = shapes
    both = tensors[0].reshape(heads, -1, rank)
    return both[:, :nope], both[:, nope:].swapaxes(1, 2)


def _join_latent(arrays: Sequence[Any]) -> Sequence[Any]:
    key, value = arrays
    both = np.concatenate([key, value.swapaxes(1, 2)], axis=1)
    return [both.reshape(-1, both.shape[-1])]


def _latent_shapes(shapes: Sequence[Shape]) -> Sequence[Shape]:
    (heads, nope, rank), (_, _, value) = shapes
    return [(heads * (nope + value), rank)]


KEYS_AND_VALUES = Transform("keys and values of each head", _split_latent, _join_latent, _latent_shapes)
"""What expands compressed rows, from one tensor [H (nope + value), R]."""

LATENT = (
    *mapped(
        LAYER + "self_attn.",
        PLACE + "attention.",
        ("q_a_proj.weight", "q_down.weight", TRANSPOSE),
        ("q_a_proj.bias", "q_down.bias", IDENTITY),
        ("q_a_layernorm.weight", "q_norm.scale", IDENTITY),
        ("q_b_proj.weight", "q_up.weight", TRANSPOSE),
        ("kv_a_proj_with_mqa.weight", "kv_down.weight", TRANSPOSE),
        ("kv_a_proj_with_mqa.bias", "kv_down.bias", IDENTITY),
        ("kv_a_layernorm.weight", "kv_norm.scale", IDENTITY),
        ("o_proj.bias", "o.bias", IDENTITY),
    ),
    Weight(
        LAYER + "self_attn.kv_b_proj.weight",
        (PLACE + "attention.key_up", PLACE + "attention.value_up"),
        KEYS_AND_VALUES,
    ),
)
"""Latent attention, beside the projections that it shares with others (`WEIGHTS`)."""

DENSE_LAYERS = (
    Weight(LAYER + "post_attention_layernorm.weight", PLACE + "mlp_norm.scale"),
    *mlp("mlp.", "mlp."),
)
