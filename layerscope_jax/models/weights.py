"""Which tensors of a Hugging Face checkpoint become which arrays of a decoder, and what happens on the way.

A family has one table of rows (`Weight`), by which it is loaded and saved. Nothing follows from a tensor's
name alone: whether it is split, say, is written in its row.
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
            welcome: what lies in order need not be copied, and the rest JAX copies several times faster than
            NumPy.
        save: arrays -> tensors; None if it cannot be undone, in a row that only loads.
        stored_shapes: shapes of the decoder's arrays -> shapes of the tensors.
        by_rows: whether `load` takes whole rows of matrices, and does nothing else with them: then it may be
            given matrices that are packed.

    >>> IDENTITY.stored_shapes([(2, 3)]), ROW.stored_shapes([(3,)])
    ([(2, 3)], [(1, 3)])
    """

    name: str
    load: Callable[[Sequence[Any], Sequence[Shape]], Sequence[Any]]
    save: Callable[[Sequence[Any]], Sequence[Any]] | None
    stored_shapes: Callable[[Sequence[Shape]], Sequence[Shape]]
    by_rows: bool = False


def each(
    name: str,
    load: Callable[[Any], Any],
    save: Callable[[Any], Any],
    shape: Callable[[Shape], Shape],
    by_rows: bool = False,
) -> Transform:
    """A transform of one tensor into one array."""
    return Transform(
        name,
        lambda tensors, _: [load(tensor) for tensor in tensors],
        lambda arrays: [save(array) for array in arrays],
        lambda shapes: [shape(each) for each in shapes],
        by_rows,
    )


IDENTITY = each("identity", lambda array: array, lambda array: array, lambda shape: shape, by_rows=True)
"""Matrices are [out, in] in the decoder, as in checkpoints."""

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


def mapped(tensors: str, places: str, *parts: tuple[str, str]) -> tuple[Weight, ...]:
    """Rows whose names and places begin alike.

    >>> mapped("model.", "", ("norm.weight", "norm.scale"))[0][:2]
    ('model.norm.weight', 'norm.scale')
    """
    return tuple(Weight(tensors + tensor, places + place) for tensor, place in parts)


ROUTER = "layers.{layer}.router.weight"
"""The place of a MoE layer's router."""

LAYER, PLACE = "model.layers.{layer}.", "layers.{layer}."

WEIGHTS = (
    Weight("model.embed_tokens.weight", "embedding"),
    *mapped(
        LAYER,
        PLACE,
        ("input_layernorm.weight", "attention_norm.scale"),
        ("self_attn.q_proj.weight", "attention.q.weight"),
        ("self_attn.k_proj.weight", "attention.k.weight"),
        ("self_attn.v_proj.weight", "attention.v.weight"),
        ("self_attn.o_proj.weight", "attention.o.weight"),
        ("post_attention_layernorm.weight", "moe_norm.scale"),
    ),
    Weight("model.norm.weight", "norm.scale"),
    Weight("lm_head.weight", "head"),
)
"""What every family here shares."""

QK_NORMS = mapped(
    LAYER,
    PLACE,
    ("self_attn.q_norm.weight", "attention.q_norm.scale"),
    ("self_attn.k_norm.weight", "attention.k_norm.scale"),
)

BIASES = mapped(
    LAYER,
    PLACE,
    ("self_attn.q_proj.bias", "attention.q.bias"),
    ("self_attn.k_proj.bias", "attention.k.bias"),
    ("self_attn.v_proj.bias", "attention.v.bias"),
    ("self_attn.o_proj.bias", "attention.o.bias"),
)

PER_EXPERT = mapped(
    LAYER + "mlp.experts.{expert}.",
    EXPERTS,
    ("gate_proj.weight", "gate"),
    ("up_proj.weight", "up"),
    ("down_proj.weight", "down"),
)
"""Experts as most families publish them."""


def _halves(tensors: Sequence[Any], shapes: Sequence[Shape]) -> Sequence[Any]:
    (both,), inner = tensors, shapes[0][0]
    return both[:inner], both[inner:]


def _join(arrays: Sequence[Any]) -> Sequence[Any]:
    return [np.concatenate(arrays)]


GATE_AND_UP = Transform(
    "gate above up", _halves, _join, lambda shapes: [(2 * shapes[0][0], shapes[0][1])], by_rows=True
)
"""gate and up [F, D] from one tensor [2 F, D]."""

STACKED = (
    Weight(LAYER + "mlp.experts.gate_up_proj", (EXPERTS + "gate", EXPERTS + "up"), GATE_AND_UP),
    Weight(LAYER + "mlp.experts.down_proj", EXPERTS + "down"),
)
"""Experts as transformers 5 keeps them in memory: all of a layer in two tensors."""

ROUTER_GATE = Weight(LAYER + "mlp.gate.weight", ROUTER)

ROUTED_LAYERS = (ROUTER_GATE, *PER_EXPERT, *STACKED)
"""Routers and experts as most families name them."""

SELECTION_BIAS = Weight(LAYER + "mlp.gate.e_score_correction_bias", "layers.{layer}.router.selection_bias")


def mlp(tensors: str, places: str) -> tuple[Weight, ...]:
    """Rows of a dense feed-forward network, and of its biases where a model has them."""
    parts = []
    for name in ("gate", "up", "down"):
        parts.append((f"{name}_proj.weight", f"{name}.weight"))
        parts.append((f"{name}_proj.bias", f"{name}.bias"))
    return mapped(LAYER + tensors, PLACE + places, *parts)


SHARED_EXPERTS = mlp("mlp.shared_experts.", "shared.")
"""The expert that all tokens go through, as DeepSeek and most others name it."""

GATED_SHARED_EXPERT = (
    *mlp("mlp.shared_expert.", "shared."),
    Weight(LAYER + "mlp.shared_expert_gate.weight", PLACE + "shared_gate.weight"),
)
"""The same as Qwen names it, with a gate."""


def _split_latent(tensors: Sequence[Any], shapes: Sequence[Shape]) -> Sequence[Any]:
    (heads, rank, nope), _ = shapes
    both = tensors[0].reshape(heads, -1, rank)
    return both[:, :nope].swapaxes(1, 2), both[:, nope:]


def _join_latent(arrays: Sequence[Any]) -> Sequence[Any]:
    key, value = arrays
    both = np.concatenate([key.swapaxes(1, 2), value], axis=1)
    return [both.reshape(-1, both.shape[-1])]


def _latent_shapes(shapes: Sequence[Shape]) -> Sequence[Shape]:
    (heads, rank, nope), (_, value, _) = shapes
    return [(heads * (nope + value), rank)]


KEYS_AND_VALUES = Transform("keys and values of each head", _split_latent, _join_latent, _latent_shapes)
"""What is multiplied into queries [H, R, nope], and what expands compressed rows into values [H, value, R].

Both from one tensor [H (nope + value), R]."""

LATENT = (
    *mapped(
        LAYER + "self_attn.",
        PLACE + "attention.",
        ("q_a_proj.weight", "q_down.weight"),
        ("q_a_proj.bias", "q_down.bias"),
        ("q_a_layernorm.weight", "q_norm.scale"),
        ("q_b_proj.weight", "q_up.weight"),
        ("kv_a_proj_with_mqa.weight", "kv_down.weight"),
        ("kv_a_proj_with_mqa.bias", "kv_down.bias"),
        ("kv_a_layernorm.weight", "kv_norm.scale"),
        ("o_proj.bias", "o.bias"),
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
