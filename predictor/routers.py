"""Routers of a model, and their forecast of later layers, the best without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.prediction.predictors import choosing_logits, routers_ahead
from layerscope_jax.support.files import write_file
from predictor.pca import Basis

FILE = "routers.safetensors"
SELECTION = "selection_bias."
"""Name of the biases for choosing in the file, before that of the scores they are added to."""


@dataclass(frozen=True)
class Routers:
    """Routers of all MoE layers, with the norms before them.

    Attributes:
        weight: [L, E, D] float32; [L, D, E] in the file.
        scale: [L, D] float32, of the RMS norm whose output the router reads.
        bias: [L, E] float32, added to the logits; None for none.
        selection_bias: [L, E] float32, added to the scores for choosing alone; None for none.
        score: of a selection bias, as in `RoutingRule.score`.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None = None
    selection_bias: np.ndarray | None = None
    score: str = "sigmoid"

    @classmethod
    def of(cls, model: Model) -> Routers:
        def stack(arrays: Iterable[jax.Array]) -> np.ndarray:
            return np.stack([np.asarray(array, np.float32) for array in arrays])

        weights, scales, biases, selections = zip(*model.routers(), strict=True)
        return cls(
            stack(weights),
            stack(scales),
            None if biases[0] is None else stack(biases),
            None if selections[0] is None else stack(selections),
            model.config.routing.score,
        )

    def save(self, folder: Path) -> None:
        arrays = {"weight": np.ascontiguousarray(self.weight.swapaxes(1, 2)), "scale": self.scale}
        if self.bias is not None:
            arrays["bias"] = self.bias
        if self.selection_bias is not None:
            arrays[SELECTION + self.score] = self.selection_bias
        write_file(folder / FILE, save(arrays))

    @classmethod
    def load(cls, folder: Path) -> Routers:
        """Reads routers; raises ValueError if the folder has none, or damaged ones."""
        try:
            arrays = load_file(folder / FILE)
            selecting = next((name for name in arrays if name.startswith(SELECTION)), SELECTION + cls.score)
            routers = cls(
                arrays["weight"].swapaxes(1, 2),
                arrays["scale"],
                arrays.get("bias"),
                arrays.get(selecting),
                selecting.removeprefix(SELECTION),
            )
            if unknown := arrays.keys() - {"weight", "scale", "bias", selecting}:
                raise ValueError(f"unknown arrays {', '.join(sorted(unknown))}")
            layers, experts, hidden = routers.weight.shape
            biases = [array for array in (routers.bias, routers.selection_bias) if array is not None]
            if routers.scale.shape != (layers, hidden) or any(b.shape != (layers, experts) for b in biases):
                raise ValueError(f"shapes {[array.shape for array in arrays.values()]}")
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise ValueError("numbers that are not finite")
            return routers
        except Exception as error:  # safetensors raises nothing narrower
            raise ValueError(f"{folder / FILE}: expected routers, got {error}; record it anew") from None

    def prior(self, basis: Basis, layers: Sequence[int], horizons: Sequence[int], width: int) -> Prior:
        """Returns the forecasts, in some layers, of the routers H layers ahead; zeros past the last layer.

        Args:
            basis: PCA of the hidden states.
            layers: layers in which forecasts are made, the leading axis of the prior's arrays.
            horizons: H numbers of layers ahead, from 1.
            width: P, components of the reduced hidden states.
        """
        furthest, picked = max(horizons), np.array(horizons) - 1
        matrices, offsets = [], []
        for layer in layers:
            ahead = routers_ahead(self.weight, self.scale, layer, furthest)[picked]  # [H, E, D]
            matrices.append(np.einsum("dp,hed->phe", basis.components[layer, :, :width], ahead))
            offsets.append(ahead @ basis.mean[layer])
        offset = np.stack(offsets)
        if self.bias is not None:
            offset = offset + _ahead(self.bias, layers, horizons)
        selection = None
        if self.selection_bias is not None:
            selection = _ahead(self.selection_bias, layers, horizons)
        return Prior(np.stack(matrices), offset, selection, self.score)


def _ahead(biases: np.ndarray, layers: Sequence[int], horizons: Sequence[int]) -> np.ndarray:
    """Returns biases [len(layers), H, E] of the layers ahead, of [L, E]; zeros past the last layer.

    >>> _ahead(np.array([[1.0], [2.0], [3.0]]), [0, 1], [1, 2])[..., 0].tolist()
    [[2.0, 3.0], [3.0, 0.0]]
    """
    target = np.array(layers)[:, None] + np.array(horizons)[None]
    inside = target < len(biases)
    return np.where(inside[..., None], biases[np.where(inside, target, 0)], 0).astype(np.float32)


@dataclass(frozen=True)
class Prior:
    """The routers' forecast of H later layers, as a function of reduced hidden states; a pytree.

    Attributes:
        matrix, offset: [P, H, E] and [H, E], which give the routers' logits.
        selection: [H, E] biases added to the scores for choosing alone; None where routers have none.
        score: of the selection biases, as in `RoutingRule.score`; not an array.
    """

    matrix: Any
    offset: Any
    selection: Any = None
    score: str = "sigmoid"

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns logits [T, H, E] of reduced hidden states [T, P], in the order in which routers choose."""
        ahead = jnp.einsum("tp,phe->the", hidden, self.matrix) + self.offset[None]
        return ahead if self.selection is None else choosing_logits(ahead, self.selection[None], self.score)


jax.tree_util.register_dataclass(Prior, ["matrix", "offset", "selection"], ["score"])
