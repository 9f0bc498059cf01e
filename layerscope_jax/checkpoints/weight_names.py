"""Which tensors a Hugging Face checkpoint of a model has: its family's table, for each layer and expert."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from layerscope_jax.checkpoints.ignored import Ignored
from layerscope_jax.checkpoints.packed_tensors import PackedTensor
from layerscope_jax.checkpoints.safetensors_io import DTYPES, StoredTensor
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.models.decoder_layers import new_layer
from layerscope_jax.models.family import Family
from layerscope_jax.models.layers import ExpertParam, MatrixParam, abstract
from layerscope_jax.models.registry import FAMILIES
from layerscope_jax.models.weights import EXPERTS, Transform, Weight
from layerscope_jax.scheduling.plan import ExpertId

LISTED = 100  # wrong tensors that an error spells out

ParameterPath = tuple[str | int, ...]
"""Keys into the pure dict of a decoder's parameters, such as `("layers", 0, "norm", "scale")`."""

SETTINGS = {
    "embedding": "vocab_size, hidden_size",
    "layers.{layer}.attention.q.weight": "num_attention_heads * head_dim, hidden_size",
    "layers.{layer}.attention.k.weight": "num_key_value_heads * head_dim, hidden_size",
    "layers.{layer}.attention.kv_down.weight": "kv_lora_rank + qk_rope_head_dim, hidden_size",
    "layers.{layer}.router.weight": "num_experts, hidden_size",
}
"""Places whose tensors tell whether a config's sizes are the checkpoint's, and which settings say so."""


class Source(NamedTuple):
    """Where some arrays of a decoder come from: one row of the table, for one layer and expert.

    Attributes:
        tensors: names, each with the place along the tensor's first axis where that is experts; None where
            the whole tensor is meant.
        transform: what happens on the way.
        keys: of the arrays: paths of dense parameters, or experts and the names of their arrays.
        shapes: of the arrays.
    """

    tensors: tuple[tuple[str, int | None], ...]
    transform: Transform
    keys: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Naming:
    """The tensors that a checkpoint of one model has, as HF names them.

    Attributes:
        graphdef: of the whole decoder.
        parameters: path of a dense parameter -> its shape in the decoder.
        wide: paths of the dense parameters that are float32 in a model of any dtype.
        matrices: paths of the dense parameters that may be packed (`MatrixParam`).
        dense: where the dense parameters come from.
        experts: the expert and the name of its array -> where it comes from.
        shapes: tensor name -> its shape in the checkpoint.
        uses: tensor name -> the sources that it is a part of, and which part.
    """

    graphdef: nnx.GraphDef
    parameters: Mapping[ParameterPath, tuple[int, ...]]
    wide: frozenset[ParameterPath]
    matrices: frozenset[ParameterPath]
    dense: list[Source] = field(default_factory=list)
    experts: dict[tuple[ExpertId, str], Source] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uses: dict[str, list[tuple[Source, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ModelConfig, stored: Collection[str] = ()) -> Naming:
        """Returns the names for a model, derived from its decoder without making any array.

        Args:
            config: of the model.
            stored: names of the tensors that a checkpoint holds, which decide between several ways of naming
                them; if empty, the first way is taken.

        Raises:
            ValueError: if the family is not known, or has no name for a parameter of the model.
        """
        family, naming = family_of(config), cls(*_skeleton(config))
        named: set[Any] = set()
        for row in chosen_rows(family, config, stored):
            if row.places[0].startswith(EXPERTS):
                naming._add_experts(config, row)
                named |= {place.removeprefix(EXPERTS) for place in row.places}
                continue
            for layer in range(config.num_layers if "{layer}" in row.places[0] else 1):
                paths = tuple(path_of(place.format(layer=layer)) for place in row.places)
                if all(path in naming.parameters for path in paths):
                    shapes = tuple(naming.parameters[path] for path in paths)
                    tensors = tuple((tensor.format(layer=layer), None) for tensor in row.tensors)
                    naming.dense.append(naming._add(Source(tensors, row.transform, paths, shapes)))
                    named.update(paths)
        nameless = [".".join(map(str, path)) for path in naming.parameters.keys() - named]
        nameless += [f"experts.*.{array}" for array in config.expert_shapes() if array not in named]
        if nameless:
            raise ValueError(
                f"{family.architecture} has no tensors for {', '.join(sorted(nameless))}; choose a family "
                "that has, or add rows to its table of weights"
            )
        return naming

    def _add_experts(self, config: ModelConfig, row: Weight) -> None:
        arrays, every = [place.removeprefix(EXPERTS) for place in row.places], config.expert_shapes()
        if not all(array in every for array in arrays):
            return
        shapes = tuple(every[array] for array in arrays)
        stacked = ["{expert}" not in tensor for tensor in row.tensors]
        for number, layer in enumerate(config.moe_layers):
            for expert in range(config.num_experts):
                tensors = tuple(
                    (tensor.format(layer=layer, expert=expert), expert if whole else None)
                    for tensor, whole in zip(row.tensors, stacked, strict=True)
                )
                keys = tuple((ExpertId(number, expert), array) for array in arrays)
                source = self._add(Source(tensors, row.transform, keys, shapes), config.num_experts)
                self.experts.update(dict.fromkeys(keys, source))

    def _add(self, source: Source, num_experts: int = 1) -> Source:
        stored = source.transform.stored_shapes(source.shapes)
        for part, ((name, index), shape) in enumerate(zip(source.tensors, stored, strict=True)):
            self.shapes[name] = shape if index is None else (num_experts, *shape)
            self.uses.setdefault(name, []).append((source, part))
        return source

    def check(
        self, folder: Path, stored: Mapping[str, StoredTensor | PackedTensor], ignored: Ignored
    ) -> None:
        """Compares what a checkpoint holds with what its model asks for.

        Args:
            folder: of the checkpoint.
            stored: its tensors.
            ignored: tells the tensors that it may hold besides.

        Raises:
            ValueError: listing every tensor that is missing, unexpected, of another shape or dtype.
        """
        wrong = []
        for name, shape in self.shapes.items():
            tensor = stored.get(name)
            if tensor is None:
                wrong.append(f"{name}: expected shape {list(shape)}, found no such tensor")
                continue
            if tensor.shape != shape:
                wrong.append(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
            if tensor.dtype not in DTYPES and not isinstance(tensor, PackedTensor):
                wrong.append(f"{name}: expected dtype {', '.join(DTYPES)}, found {tensor.dtype}")
        for name, tensor in stored.items():
            if name not in self.shapes and ignored.why(name) is None:
                wrong.append(f"{name}: expected no such tensor, found shape {list(tensor.shape)}")
        if wrong:
            rest = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
            raise ValueError(
                f"{folder}: {len(wrong)} tensors do not match config.json; check that both belong to the "
                "same model and are complete:\n  " + "\n  ".join(wrong[:LISTED] + rest)
            )


@lru_cache(maxsize=8)  # tracing takes seconds, and saving, loading and checking one model ask for the same
def _skeleton(
    config: ModelConfig,
) -> tuple[
    nnx.GraphDef,
    Mapping[ParameterPath, tuple[int, ...]],
    frozenset[ParameterPath],
    frozenset[ParameterPath],
]:
    """The graph of a decoder, its dense parameters' shapes, those that are float32 in any dtype, and those
    that may be packed."""
    bfloat16 = np.dtype(jnp.bfloat16)
    decoder = abstract(lambda rngs: Decoder(config, rngs=rngs, dtype=bfloat16))
    graphdef, *states = nnx.split(decoder, ExpertParam, ...)
    _, dense = map(nnx.to_pure_dict, states)
    arrays: dict[ParameterPath, jax.ShapeDtypeStruct] = flatten_dict(dense)
    wide = frozenset(path for path, array in arrays.items() if array.dtype != bfloat16)
    matrices = frozenset(flatten_dict(nnx.to_pure_dict(nnx.state(decoder, MatrixParam))))
    return graphdef, MappingProxyType({path: array.shape for path, array in arrays.items()}), wide, matrices


def chosen_rows(family: Family, config: ModelConfig, stored: Collection[str] = ()) -> list[Weight]:
    """The rows of a family's table that count for a checkpoint: of those with places in common, the first
    whose tensors it holds, for the first layer that has them.

    Args:
        family: of the model.
        config: of the model.
        stored: names of the checkpoint's tensors.
    """
    # One by one: a config may name more layers than memory holds numbers.
    routed = (layer for layer in range(config.num_layers) if layer not in config.dense_layers)
    layers = [next(routed, 0), *config.dense_layers[:1]]

    def is_held(row: Weight) -> bool:
        return any(
            all(tensor.format(layer=layer, expert=0) in stored for tensor in row.tensors) for layer in layers
        )

    taken: dict[str, Weight] = {}
    for row in family.weights:
        before = [taken[place] for place in row.places if place in taken]
        if before and (any(map(is_held, before)) or not is_held(row)):
            continue
        for place in [place for place, other in taken.items() if other in before]:
            del taken[place]
        taken.update(dict.fromkeys(row.places, row))
    return list(dict.fromkeys(taken.values()))


def check_sizes(config: ModelConfig, folder: Path, stored: Mapping[str, StoredTensor | PackedTensor]) -> None:
    """Compares a config's sizes with a few tensors, before a decoder of those sizes is made.

    `Naming.of` takes time for every layer and expert, and a wrong config may give a million of them.

    Raises:
        ValueError: naming each size that the tensors do not have.
    """
    family = family_of(config)
    first = next(layer for layer in range(config.num_layers) if layer not in config.dense_layers)
    embedding: dict[ParameterPath, tuple[int, ...]] = {
        ("embedding",): (config.vocab_size, config.hidden_size)
    }
    shapes = {**embedding, **shapes_of_layer(config, first)}
    wrong = []
    for row in chosen_rows(family, config, stored.keys()):
        paths = [path_of(place.format(layer=first, expert=0)) for place in row.places]
        settings = SETTINGS.get(row.places[0])
        if settings is None or any(path not in shapes for path in paths):
            continue
        expected = row.transform.stored_shapes([shapes[path] for path in paths])
        for tensor, shape in zip(row.tensors, expected, strict=True):
            name = tensor.format(layer=first)
            found = stored[name].shape if name in stored else None
            if found != shape:
                got = "found no such tensor" if found is None else f"found {list(found)}"
                wrong.append(f"{name}: expected shape {list(shape)} ({settings}), {got}")
    norm = family.tensor_of("layers.{layer}.attention_norm.scale")
    if norm is not None:
        begins = re.compile(re.escape(norm.partition("{layer}")[0]) + r"(\d+)\.")
        layers = {match[1] for name in stored if (match := begins.match(name))}
        if len(layers) < config.num_layers:
            wrong.append(
                f"num_hidden_layers: expected {config.num_layers} layers, found tensors of {len(layers)}"
            )
    if wrong:
        raise ValueError(
            f"{folder}: the tensors do not have the sizes that config.json gives; check that both belong to "
            "the same model and are complete:\n  " + "\n  ".join(wrong)
        )


@lru_cache(maxsize=64)
def hollow_layer(config: ModelConfig, layer: int) -> nnx.Module:
    """Returns a decoder layer in float32 without any array: shapes are in their place."""
    return abstract(lambda rngs: new_layer(config, layer, rngs=rngs, dtype=np.dtype(np.float32)))


def shapes_of_layer(config: ModelConfig, layer: int) -> Mapping[ParameterPath, tuple[int, ...]]:
    """Shapes of a decoder layer's parameters, by their paths in the decoder, without making any array."""
    made = nnx.state(hollow_layer(config, layer))
    parameters: dict[Any, jax.ShapeDtypeStruct] = flatten_dict(nnx.to_pure_dict(made))
    shapes = {("layers", layer, *path): array.shape for path, array in parameters.items()}
    return MappingProxyType(shapes)


PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.")
"""What the names of a language model's tensors begin with inside a model that also takes images, in the place
of "model."."""


def plain_names(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns a checkpoint's tensors with the names they have where the language model is by itself."""
    prefix = next((each for each in PREFIXES if any(name.startswith(each) for name in stored)), None)
    if prefix is None:
        return dict(stored)
    head = prefix.split(".model.")[0] + "." if ".model." in prefix else ""

    def plain(name: str) -> str:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
        return name.removeprefix(head) if head and name.startswith(head + "lm_head.") else name

    return {plain(name): tensor for name, tensor in stored.items()}


def family_of(config: ModelConfig) -> Family:
    """Returns the family of a model.

    Raises:
        ValueError: if no family of that name is registered.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {config.family!r}")
    return family


def path_of(place: str) -> ParameterPath:
    """The path of a place in the pure dict of a decoder's parameters.

    >>> path_of("layers.0.norm.scale")
    ('layers', 0, 'norm', 'scale')
    """
    return tuple(int(key) if key.isdigit() else key for key in place.split("."))
