"""Which tensors a Hugging Face checkpoint of a model has: its family's table, for each layer and expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from layerscope_jax.checkpoints.safetensors_io import DTYPES, StoredTensor
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.models.decoder_layers import new_layer
from layerscope_jax.models.family import Family
from layerscope_jax.models.layers import ExpertParam
from layerscope_jax.models.registry import FAMILIES
from layerscope_jax.models.weights import EXPERTS, Transform
from layerscope_jax.scheduling.plan import ExpertId

LISTED = 100  # wrong tensors that an error spells out

ParameterPath = tuple[str | int, ...]
"""Keys into the pure dict of a decoder's parameters, such as `("layers", 0, "norm", "scale")`."""

SETTINGS = {
    "embedding": "vocab_size, hidden_size",
    "layers.{layer}.attention.q.weight": "num_attention_heads * head_dim, hidden_size",
    "layers.{layer}.attention.k.weight": "num_key_value_heads * head_dim, hidden_size",
    "layers.{layer}.router.weight": "num_experts, hidden_size",
}
"""Places whose tensors tell whether a config's sizes are the checkpoint's, and which settings say so."""


@dataclass(frozen=True)
class Naming:
    """The tensors that a checkpoint of one model has, as HF names them.

    Attributes:
        graphdef: of the whole decoder.
        dense: tensor name -> path of the parameter, for everything but routed experts.
        experts: tensor name -> the expert and its matrix ("gate", "up", "down" or "bias").
        shapes: tensor name -> its shape in the checkpoint.
        parameters: path of a dense parameter -> its shape in the decoder.
        transforms: tensor name -> what happens to it on the way into the decoder, and back.
    """

    graphdef: nnx.GraphDef
    dense: dict[str, ParameterPath]
    experts: dict[str, tuple[ExpertId, str]]
    shapes: dict[str, tuple[int, ...]]
    parameters: dict[ParameterPath, tuple[int, ...]]
    transforms: dict[str, Transform]

    @classmethod
    def of(cls, config: ModelConfig) -> Naming:
        """Derived from the decoder itself, without making any array.

        Raises:
            ValueError: if the family is not known, or has no name for a parameter of the model.
        """
        family = family_of(config)
        abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        graphdef, *states = nnx.split(abstract, ExpertParam, ...)
        _, dense = map(nnx.to_pure_dict, states)
        arrays: dict[ParameterPath, jax.ShapeDtypeStruct] = flatten_dict(dense)
        parameters = {path: array.shape for path, array in arrays.items()}
        naming = cls(graphdef, {}, {}, {}, parameters, {})
        for row in family.weights:
            if row.place.startswith(EXPERTS):
                continue
            for layer in range(config.num_layers if "{layer}" in row.place else 1):
                path = path_of(row.place.format(layer=layer))
                if path in parameters:
                    name = row.tensor.format(layer=layer)
                    naming.dense[name] = path
                    naming.shapes[name] = row.transform.stored_shape(parameters[path])
                    naming.transforms[name] = row.transform
        rows = {row.place.removeprefix(EXPERTS): row for row in family.weights}
        expert_shapes = config.expert_shapes()
        nameless = [".".join(map(str, path)) for path in parameters.keys() - set(naming.dense.values())]
        nameless += [f"experts.*.{matrix}" for matrix in expert_shapes if matrix not in rows]
        if nameless:
            raise ValueError(
                f"{family.architecture} has no tensors for {', '.join(sorted(nameless))}; choose a family "
                "that has, or add rows to its table of weights"
            )
        matrices = {matrix: (rows[matrix], shape) for matrix, shape in expert_shapes.items()}
        for number, layer in enumerate(config.moe_layers):
            for expert in range(config.num_experts):
                for matrix, (row, shape) in matrices.items():
                    name = row.tensor.format(layer=layer, expert=expert)
                    naming.experts[name] = ExpertId(number, expert), matrix
                    naming.shapes[name] = row.transform.stored_shape(shape)
                    naming.transforms[name] = row.transform
        return naming

    def check(self, folder: Path, stored: Mapping[str, StoredTensor], ignored: tuple[str, ...] = ()) -> None:
        """Compares what a checkpoint holds with what its model asks for.

        Args:
            folder: of the checkpoint.
            stored: its tensors.
            ignored: names of tensors that it may hold besides (`Family.ignored`).

        Raises:
            ValueError: listing every tensor that is missing, unexpected, of another shape or not a float.
        """
        wrong = []
        for name, shape in self.shapes.items():
            tensor = stored.get(name)
            if tensor is None:
                wrong.append(f"{name}: expected shape {list(shape)}, found no such tensor")
                continue
            if tensor.shape != shape:
                wrong.append(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
            if tensor.dtype not in DTYPES:
                wrong.append(f"{name}: expected dtype {', '.join(DTYPES)}, found {tensor.dtype}")
        for name, tensor in stored.items():
            if name not in self.shapes and not any(fnmatchcase(name, pattern) for pattern in ignored):
                wrong.append(f"{name}: expected no such tensor, found shape {list(tensor.shape)}")
        if wrong:
            rest = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
            raise ValueError(
                f"{folder}: {len(wrong)} tensors do not match config.json; check that both belong to the "
                "same model and are complete:\n  " + "\n  ".join(wrong[:LISTED] + rest)
            )

    def expert_names(self) -> dict[tuple[ExpertId, str], str]:
        """The expert and its matrix -> tensor name."""
        return {matrix: name for name, matrix in self.experts.items()}


def check_sizes(config: ModelConfig, folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Holds a config's sizes against a few tensors, before a decoder of those sizes is made of it.

    `Naming.of` takes as long as there are layers and experts, be they a million.

    Raises:
        ValueError: naming each size that the tensors do not have.
    """
    family = family_of(config)
    first = next(layer for layer in range(config.num_layers) if layer not in config.dense_layers)
    shapes = {("embedding",): (config.vocab_size, config.hidden_size)} | shapes_of_layer(config, first)
    wrong = []
    for row in family.weights:
        path = path_of(row.place.format(layer=first, expert=0))
        if row.place not in SETTINGS or path not in shapes:
            continue
        name, shape = row.tensor.format(layer=first), row.transform.stored_shape(shapes[path])
        found = stored[name].shape if name in stored else None
        if found != shape:
            got = "found no such tensor" if found is None else f"found {list(found)}"
            wrong.append(f"{name}: expected shape {list(shape)} ({SETTINGS[row.place]}), {got}")
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


def shapes_of_layer(config: ModelConfig, layer: int) -> dict[ParameterPath, tuple[int, ...]]:
    """Shapes of a decoder layer's parameters, by their paths in the decoder, without making any array."""
    abstract = nnx.eval_shape(lambda: new_layer(config, layer, rngs=nnx.Rngs(0), dtype=np.dtype(np.float32)))
    parameters: dict[Any, jax.ShapeDtypeStruct] = flatten_dict(nnx.to_pure_dict(nnx.state(abstract)))
    return {("layers", layer, *path): array.shape for path, array in parameters.items()}


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
