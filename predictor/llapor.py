"""LLaPor, the learnable layer-aware predictor: stored in a folder, applied inside the engine."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from safetensors.numpy import save as safetensors_bytes

from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.checkpoints.model import Model
from layerscope_jax.prediction.bases import PredictorBase
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.files import read_json, replace_files
from predictor.packing import Matrix, packed, unpacked, widened
from predictor.pca import Basis
from predictor.routers import Prior, Routers
from predictor.settings import Settings, checksums
from predictor.step import Params, Stack, first_params, input_scale, layer_logits, priors, stacks

CONFIG, WEIGHTS = "predictor.json", "predictor.safetensors"


@dataclass(frozen=True)
class LayerParams:
    """Parameters of one layer's forecast; a pytree.

    Attributes:
        mean, components: [D] mean and [D, P] components of the PCA, the latter in 8 bits.
        scale: [] scale of the reduced hidden state.
        prior: the routers' forecast.
        network: pure dict of the layer's `LayerNetwork`, with matrices in 8 bits as on disk, because its
            memory is taken off the budget of the experts.
        group: name of the layer's group; not an array.
    """

    mean: jax.Array
    components: Matrix
    scale: jax.Array
    prior: Prior
    network: Any
    group: str


jax.tree_util.register_dataclass(LayerParams, ["mean", "components", "scale", "prior", "network"], ["group"])


@dataclass(frozen=True)
class Architecture:
    """Computation of forecasts without parameters; predictors of equal architecture share programs.

    Attributes:
        look_ahead: W.
        groups: the components P that each group of layers reads, and its network.
    """

    look_ahead: int
    groups: tuple[tuple[str, int, nnx.GraphDef], ...]

    name = "llapor"

    def predict(
        self, params: LayerParams, inputs: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """Probabilities [W, T, E]; see `layerscope_jax.prediction.predictors.Predictor`."""
        hidden = (inputs.astype(jnp.float32) - params.mean[None]) @ params.components.wide()
        return self.predict_reduced(params, hidden, experts, weights)

    def predict_reduced(
        self, params: LayerParams, hidden: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """As `predict`, from hidden states [T, P] that are reduced already, as traces hold them."""
        _, components, graphdef = next(group for group in self.groups if group[0] == params.group)
        network = nnx.merge(graphdef, widened(params.network))
        hidden = hidden[:, :components].astype(jnp.float32)
        logits = layer_logits(network, hidden, experts, weights, params.prior, params.scale)
        return jax.nn.sigmoid(logits).swapaxes(0, 1)


@dataclass(frozen=True, eq=False)
class LLaPor(PredictorBase):
    """Trained predictor of the experts of the next W layers
    (`layerscope_jax.prediction.predictors.Predictor`).

    Two predictors are equal if they use the same programs, whatever their parameters.

    Attributes:
        model: identity of the model whose experts it predicts.
        look_ahead: W.
        basis: PCA of the hidden states.
        stacks: the groups of layers.
        network: parameters of the groups.

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
        """Size (bytes) of the parameters on disk."""
        return sum(array.nbytes for array in packed(self._arrays()).values())

    def bind(self, model: Model) -> list[LayerParams]:
        """Returns the parameters of the forecast in each layer of `model`.

        Raises:
            ValueError: if the predictor was trained for another model; says what differs.
        """
        ModelIdentity.of(model).check(self.model, "this predictor")
        return self.params(Routers.of(model), model.device)

    def params(self, routers: Routers, device: jax.Device | None = None) -> list[LayerParams]:
        """Returns the parameters as `bind` does, given only the model's routers."""
        return list(self.layers(routers, device))

    def layers(self, routers: Routers, device: jax.Device | None = None) -> Iterator[LayerParams]:
        """Yields the same layer by layer, and copies each to the device when it is requested.

        Raises:
            ValueError: if a parameter is not finite.
        """
        broken = [name for name, array in self._arrays().items() if not np.isfinite(array).all()]
        if broken:
            raise ValueError(f"this predictor's {', '.join(broken)[:400]} are not finite; train it again")
        components = Matrix.of(self.basis.components)
        prior = priors(routers, self.basis, self.stacks, self.look_ahead)
        scale = input_scale(self.basis)
        put = functools.partial(jax.device_put, device=device)
        for name, stack in self.stacks.items():
            network = jax.tree.map(small, self.network[name])
            for index, layer in enumerate(stack.layers):
                yield LayerParams(
                    mean=put(self.basis.mean[layer]),
                    components=Matrix(*(put(part[layer, :, : stack.components]) for part in components)),
                    scale=put(scale[layer]),
                    prior=jax.tree.map(lambda part, i=index: put(part[i]), prior[name]),
                    network=jax.tree.map(lambda leaf, i=index: put(leaf[i]), network),
                    group=name,
                )

    @functools.cached_property
    def architecture(self) -> Architecture:
        groups = [(name, stack.components, stack.graphdef) for name, stack in self.stacks.items()]
        return Architecture(self.look_ahead, tuple(groups))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LLaPor) and self.architecture == other.architecture

    def __hash__(self) -> int:
        return hash(self.architecture)

    def predict(
        self, params: LayerParams, inputs: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """Probabilities [W, T, E]; see `layerscope_jax.prediction.predictors.Predictor`."""
        return self.architecture.predict(params, inputs, experts, weights)

    def predict_reduced(
        self, params: LayerParams, hidden: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """As `predict`, from hidden states [T, P] that are reduced already, as traces hold them."""
        return self.architecture.predict_reduced(params, hidden, experts, weights)

    def save(self, folder: str | Path) -> None:
        """Writes `predictor.json` and `predictor.safetensors` (see `predictor.packing`), or neither.

        Raises:
            ValueError: if a parameter is not finite in float16, or the folder cannot be written.
        """
        arrays = packed(self._arrays())
        groups = {name: stack.config for name, stack in self.stacks.items()}
        settings = Settings(
            model=self.model, look_ahead=self.look_ahead, groups=groups, checksums=checksums(arrays)
        )
        text = json.dumps(settings.to_json(), indent=1) + "\n"
        replace_files(Path(folder), {WEIGHTS: safetensors_bytes(arrays), CONFIG: text})

    @classmethod
    def load(cls, folder: str | Path) -> LLaPor:
        """Reads a predictor that `save` wrote.

        Raises:
            ValueError: if the folder holds no predictor, one of another format or a damaged one; names all
                wrong settings, or all wrong tensors.
        """
        folder = Path(folder)
        if not (folder / CONFIG).exists():
            raise ValueError(
                f"{folder}: expected a trained predictor ({CONFIG}), found none; "
                "`python -m predictor.train` makes one"
            )
        settings = Settings.from_json(read_json(folder / CONFIG, "copy it again"), folder / CONFIG)
        kept = _read(folder / WEIGHTS, settings.checksums)
        try:
            arrays = unpacked(kept)
        except ValueError as error:
            raise ValueError(f"{folder / WEIGHTS}: {error}; copy it again") from None
        model, look_ahead = settings.model, settings.look_ahead
        layers, width = model.num_layers, model.hidden_size
        # Checked first, because these numbers decide the sizes of everything that is built below.
        mean = arrays["pca.mean"].shape if "pca.mean" in arrays else None
        if mean != (layers, width):
            raise ValueError(
                f"{folder}: pca.mean has shape {mean} in {WEIGHTS}, but {CONFIG} is of one with "
                f"({layers}, {width}); copy both again"
            )
        most = sum(name.endswith(".outer.bias") for name in arrays)
        deeper = [name for name, group in settings.groups.items() if group.blocks > most]
        if deeper:
            raise ValueError(
                f"{folder}: {WEIGHTS} is missing blocks of the networks {', '.join(deeper)} that {CONFIG} "
                "tells of; copy both again"
            )
        variance = arrays.get("pca.variance", arrays["pca.mean"]).shape
        hidden = variance[-1] if len(variance) == 2 else 1
        stacked = stacks(model, hidden, look_ahead, settings.groups)
        shapes = jax.eval_shape(lambda: first_params(model, stacked, look_ahead, 0))
        expected = {_dotted(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
        expected |= {
            "pca.mean": (layers, width),
            "pca.components": (layers, width, hidden),
            "pca.variance": (layers, hidden),
        }
        problems = Problems()
        problems.same_names(arrays, expected)
        problems.add(
            *(
                f"{name} has shape {arrays[name].shape}, expected {shape}"
                for name, shape in sorted(expected.items())
                if name in arrays and arrays[name].shape != shape
            )
        )
        problems.raise_any(str(folder / WEIGHTS), "copy it again")
        broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        if broken:
            raise ValueError(f"{folder / WEIGHTS}: {', '.join(sorted(broken))} not finite; train it again")
        network = unflatten_dict({path: arrays[_dotted(path)] for path in flatten_dict(shapes)})
        basis = Basis(**{name: arrays[f"pca.{name}"] for name in ("mean", "components", "variance")})
        return cls(model, look_ahead, basis, stacked, network)

    def _arrays(self) -> dict[str, Any]:
        named = {_dotted(path): leaf for path, leaf in flatten_dict(self.network).items()}
        return named | {f"pca.{name}": array for name, array in vars(self.basis).items()}


def _read(file: Path, sums: Mapping[str, int] | None) -> dict[str, np.ndarray]:
    """Returns the arrays of a file after comparing them with their checksums.

    Raises:
        ValueError: if it cannot be read, naming the arrays that are damaged.
    """
    try:
        kept = load_file(file)
    except Exception as error:  # safetensors raises nothing narrower
        raise ValueError(f"{file}: expected safetensors, got {error}; copy it again") from None
    if sums is None:
        warnings.warn(
            f"{file}: has no checksums, so damage would not be noticed; `save` it again to add them",
            stacklevel=3,
        )
        return kept
    there = checksums(kept)
    damaged = sorted(name for name in sums.keys() | there.keys() if sums.get(name) != there.get(name))
    if damaged:
        raise ValueError(f"{file}: damaged (checksums differ): {', '.join(damaged)[:400]}; copy it again")
    return kept


def small(array: Any) -> Matrix | np.ndarray:
    """Returns a parameter [L, ...] as it is stored on the device: matrices in 8 bits, others unchanged."""
    array = np.asarray(array)
    return Matrix.of(array) if array.ndim == 3 else array


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
