"""LLaPor, the learnable layer-aware predictor, trained: kept in a folder, applied inside the engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from safetensors.numpy import save as safetensors_bytes

from layerscope_jax.checkpoints import Model
from layerscope_jax.files import read_json, replace_files
from layerscope_jax.identity import ModelIdentity
from predictor.network import GroupConfig
from predictor.packing import packed, unpacked
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.step import Params, Stack, first_params, input_scale, layer_logits, priors, stacks

CONFIG, WEIGHTS = "predictor.json", "predictor.safetensors"
FORMAT = 3


@dataclass(frozen=True)
class LayerParams:
    """What one layer's forecast is computed with; a pytree.

    Attributes:
        mean, components: [D] and [D, P] of the PCA.
        scale: [] of the reduced hidden state.
        prior: of the routers, see `predictor.routers.Routers.reduced`.
        network: pure dict of the layer's `LayerNetwork`.
        group: name of its group; not an array.
    """

    mean: jax.Array
    components: jax.Array
    scale: jax.Array
    prior: tuple[jax.Array, jax.Array]
    network: Any
    group: str


jax.tree_util.register_dataclass(LayerParams, ["mean", "components", "scale", "prior", "network"], ["group"])


@dataclass(frozen=True, eq=False)
class LLaPor:
    """A `layerscope_jax.prediction.Predictor` of the experts of the next W layers.

    Attributes:
        model: whose experts it predicts.
        look_ahead: W.
        basis: of the hidden states.
        stacks: the groups of layers.
        network: their parameters.

    Example::

        import predictor
        llapor = predictor.load("build/predictor")
        engine = layerscope_jax.Engine(model, layerscope_jax.OffloadConfig(predictor=llapor))
    """

    model: ModelIdentity
    look_ahead: int
    basis: Basis
    stacks: Mapping[str, Stack]
    network: Params

    name = "llapor"

    @property
    def size_bytes(self) -> int:
        """Of the parameters as they are kept on disk."""
        return sum(array.nbytes for array in packed(self._arrays()).values())

    def bind(self, model: Model) -> list[LayerParams]:
        """What each layer of `model` is forecast with.

        Raises:
            ValueError: if the predictor was trained for another model, with what differs.
        """
        ModelIdentity.of(model).check(self.model, "this predictor")
        return self.params(Routers.of(model), model.device)

    def params(self, routers: Routers, device: jax.Device | None = None) -> list[LayerParams]:
        """As `bind`, given the model's routers alone."""
        found: list[LayerParams] = []
        prior = priors(routers, self.basis, self.stacks, self.look_ahead)
        scale = input_scale(self.basis)
        put = functools.partial(jax.device_put, device=device)
        for name, stack in self.stacks.items():
            for index, layer in enumerate(stack.layers):
                matrix, offset = (put(part[index]) for part in prior[name])
                layer_params = LayerParams(
                    mean=put(self.basis.mean[layer]),
                    components=put(self.basis.components[layer, :, : stack.components]),
                    scale=put(scale[layer]),
                    prior=(matrix, offset),
                    network=jax.tree.map(lambda leaf, i=index: put(leaf[i]), self.network[name]),
                    group=name,
                )
                found.append(layer_params)
        return found

    def predict(
        self, params: LayerParams, inputs: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """Probabilities [W, T, E]; see `layerscope_jax.prediction.Predictor`."""
        hidden = (inputs.astype(jnp.float32) - params.mean[None]) @ params.components
        return self.predict_reduced(params, hidden, experts, weights)

    def predict_reduced(
        self, params: LayerParams, hidden: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """As `predict`, from hidden states [T, P] that are reduced already, as traces hold them."""
        stack = self.stacks[params.group]
        network = nnx.merge(stack.graphdef, params.network)
        hidden = hidden[:, : stack.components].astype(jnp.float32)
        logits = layer_logits(network, hidden, experts, weights, params.prior, params.scale)
        return jax.nn.sigmoid(logits).swapaxes(0, 1)

    def save(self, folder: str | Path) -> None:
        """Writes `predictor.json` and `predictor.safetensors` (see `predictor.packing`), whole or not at all.

        Raises:
            ValueError: if a parameter is not finite in float16, or the folder cannot be written.
        """
        settings = {
            "format": FORMAT,
            "model": self.model.to_json(),
            "look_ahead": self.look_ahead,
            "groups": {name: asdict(stack.config) for name, stack in self.stacks.items()},
        }
        content = safetensors_bytes(packed(self._arrays()))
        text = json.dumps(settings, indent=1) + "\n"
        replace_files(
            Path(folder),
            {
                WEIGHTS: lambda file: file.write_bytes(content),
                CONFIG: lambda file: file.write_text(text),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> LLaPor:
        """Reads what `save` wrote.

        Raises:
            ValueError: if the folder holds no predictor, one of another format or a damaged one; all wrong
                tensors are named.
        """
        folder = Path(folder)
        if not (folder / CONFIG).exists():
            raise ValueError(
                f"{folder}: expected a trained predictor ({CONFIG}), found none; "
                "`python -m predictor.train` makes one"
            )
        settings = read_json(folder / CONFIG)
        try:
            if settings["format"] != FORMAT:
                raise ValueError(
                    f"{folder / CONFIG}: expected format {FORMAT}, got {settings['format']}; train it again: "
                    "networks of other formats have other shapes"
                )
            model = ModelIdentity.from_json(settings["model"])
            look_ahead = int(settings["look_ahead"])
            groups: Any = {name: GroupConfig(**group) for name, group in settings["groups"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG}: expected a predictor's settings, got {error!r}") from None
        try:
            arrays = unpacked(load_file(folder / WEIGHTS))
        except Exception as error:  # safetensors raises nothing narrower
            raise ValueError(
                f"{folder / WEIGHTS}: expected safetensors, got {error}; copy it again"
            ) from None
        hidden = arrays["pca.variance"].shape[-1] if "pca.variance" in arrays else 1
        found = stacks(model, hidden, look_ahead, groups)
        shapes = jax.eval_shape(lambda: first_params(model, found, look_ahead, 0))
        wanted = {_dotted(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
        layers, width = model.num_layers, model.hidden_size
        wanted |= {
            "pca.mean": (layers, width),
            "pca.components": (layers, width, hidden),
            "pca.variance": (layers, hidden),
        }
        problems = [f"{name} is missing" for name in wanted.keys() - arrays.keys()]
        problems += [f"{name} is not expected" for name in arrays.keys() - wanted.keys()]
        problems += [
            f"{name} has shape {arrays[name].shape}, expected {shape}"
            for name, shape in wanted.items()
            if name in arrays and arrays[name].shape != shape
        ]
        if problems:
            raise ValueError(f"{folder / WEIGHTS}: {'; '.join(sorted(problems))}; copy it again")
        network = unflatten_dict({path: jnp.asarray(arrays[_dotted(path)]) for path in flatten_dict(shapes)})
        basis = Basis(**{name: arrays[f"pca.{name}"] for name in ("mean", "components", "variance")})
        return cls(model, look_ahead, basis, found, network)

    def _arrays(self) -> dict[str, Any]:
        named = {_dotted(path): leaf for path, leaf in flatten_dict(self.network).items()}
        return named | {f"pca.{name}": array for name, array in vars(self.basis).items()}


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
