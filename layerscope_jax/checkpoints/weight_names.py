"""Which tensor of a Hugging Face checkpoint is which parameter of a `Decoder`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx
from flax.traverse_util import flatten_dict

from layerscope_jax.checkpoints.safetensors_io import DTYPES, StoredTensor
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.models.layers import ExpertParam
from layerscope_jax.models.registry import FAMILIES
from layerscope_jax.scheduling.plan import ExpertId

LAYER = re.compile(r"model\.layers\.(\d+)\.")  # of a tensor's name
LISTED = 100  # wrong tensors that an error spells out

ParameterPath = tuple[str | int, ...]
"""Keys into the pure dict of a decoder's parameters, such as `("layers", 0, "norm", "scale")`."""


@dataclass(frozen=True)
class Naming:
    """The tensors that a checkpoint of one model has, as HF names them; shapes are the decoder's own.

    HF keeps linear layers as [out, in] and the decoder as [in, out], so that its matrices are transposed;
    the embedding alone is the same in both.

    Attributes:
        graphdef: of the whole decoder.
        dense: tensor name -> path of the parameter, for everything but routed experts.
        experts: tensor name -> the expert and its matrix ("gate", "up" or "down").
        shapes: tensor name -> its shape in the checkpoint.
    """

    graphdef: nnx.GraphDef
    dense: dict[str, ParameterPath]
    experts: dict[str, tuple[ExpertId, str]]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, config: ModelConfig) -> Naming:
        """Derived from the decoder itself, without making any array.

        Raises:
            ValueError: if the family is not known, or has no name for a parameter of the model.
        """
        family = FAMILIES.get(config.family)
        if family is None:
            raise ValueError(f"expected a family of {', '.join(FAMILIES)}, got {config.family!r}")
        abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        graphdef, *states = nnx.split(abstract, ExpertParam, ...)
        _, dense = map(nnx.to_pure_dict, states)
        parameters: dict[ParameterPath, jax.ShapeDtypeStruct] = flatten_dict(dense)
        named: dict[str, ParameterPath] = {}
        for name, dotted in family.weights.items():
            for layer in range(config.num_layers if "{layer}" in name else 1):
                keys = dotted.format(layer=layer).split(".")
                path = tuple(int(key) if key.isdigit() else key for key in keys)
                if path in parameters:
                    named[name.format(layer=layer)] = path
        nameless = [".".join(map(str, path)) for path in parameters.keys() - set(named.values())]
        if nameless:
            raise ValueError(f"{family.architecture} has no such parameters: {', '.join(sorted(nameless))}")

        shapes = {
            name: parameters[path].shape[::-1] if is_transposed(path) else parameters[path].shape
            for name, path in named.items()
        }
        experts = {}
        for layer in range(config.num_layers):
            for expert in range(config.num_experts):
                for matrix, shape in config.expert_shapes().items():
                    name = family.experts[matrix].format(layer=layer, expert=expert)
                    experts[name] = ExpertId(layer, expert), matrix
                    shapes[name] = shape[::-1]
        return cls(graphdef, named, experts, shapes)

    def check(self, folder: Path, stored: Mapping[str, StoredTensor]) -> None:
        """Compares what a checkpoint holds with what its model asks for.

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
            # A head that the model does not have of its own is the embedding again; older checkpoints also
            # hold what follows from the config.
            redundant = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
            if name not in self.shapes and not redundant:
                wrong.append(f"{name}: expected no such tensor, found shape {list(tensor.shape)}")
        if wrong:
            rest = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
            raise ValueError(
                f"{folder}: {len(wrong)} tensors are not what config.json asks for; check that both belong "
                "to one model and are complete:\n  " + "\n  ".join(wrong[:LISTED] + rest)
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
    family = FAMILIES[config.family]
    names = {dotted: name.format(layer=0) for name, dotted in family.weights.items()}
    layer = "layers.{layer}."
    hidden, size = config.hidden_size, config.head_dim
    rows = {  # name -> its rows and columns, and the settings that say so
        names["embedding"]: ((config.vocab_size, hidden), "vocab_size, hidden_size"),
        names[layer + "attention.q.weight"]: (
            (config.num_heads * size, hidden),
            "num_attention_heads * head_dim, hidden_size",
        ),
        names[layer + "attention.k.weight"]: (
            (config.num_kv_heads * size, hidden),
            "num_key_value_heads * head_dim, hidden_size",
        ),
        names[layer + "router.weight"]: ((config.num_experts, hidden), "num_experts, hidden_size"),
    }
    wrong = []
    for name, (shape, settings) in rows.items():
        found = stored[name].shape if name in stored else None
        if found != shape:
            got = "found no such tensor" if found is None else f"found {list(found)}"
            wrong.append(f"{name}: expected shape {list(shape)} ({settings}), {got}")
    layers = {match[1] for name in stored if (match := LAYER.match(name))}
    if len(layers) < config.num_layers:
        wrong.append(
            f"num_hidden_layers: expected {config.num_layers} layers, found tensors of {len(layers)}"
        )
    if wrong:
        raise ValueError(
            f"{folder}: the tensors are not of the sizes that config.json gives; check that both belong to "
            "one model and are complete:\n  " + "\n  ".join(wrong)
        )


def is_transposed(path: ParameterPath) -> bool:
    """Whether the checkpoint keeps this parameter as [out, in]; to transpose a vector changes nothing."""
    return path != ("embedding",)
