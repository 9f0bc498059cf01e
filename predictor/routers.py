"""Routers of a model, and their forecast of later layers, the best without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.prediction.predictors import routers_ahead
from layerscope_jax.support.files import write_file
from predictor.pca import Basis

FILE = "routers.safetensors"


@dataclass(frozen=True)
class Routers:
    """Routers of all MoE layers, with the norms before them.

    Attributes:
        weight: [L, E, D] float32; [L, D, E] in the file.
        scale: [L, D] float32, of the RMS norm whose output the router reads.
    """

    weight: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, model: Model) -> Routers:
        def stack(arrays: Iterable[jax.Array]) -> np.ndarray:
            return np.stack([np.asarray(array, np.float32) for array in arrays])

        weights, scales = zip(*model.routers(), strict=True)
        return cls(stack(weights), stack(scales))

    def save(self, folder: Path) -> None:
        weight = np.ascontiguousarray(self.weight.swapaxes(1, 2))
        write_file(folder / FILE, save({"weight": weight, "scale": self.scale}))

    @classmethod
    def load(cls, folder: Path) -> Routers:
        """Reads routers; raises ValueError if the folder has none, or damaged ones."""
        try:
            arrays = load_file(folder / FILE)
            routers = cls(**arrays | {"weight": arrays["weight"].swapaxes(1, 2)})
            layers, _, hidden = routers.weight.shape
            if routers.scale.shape != (layers, hidden):
                raise ValueError(f"shapes {routers.weight.shape} and {routers.scale.shape}")
            if not (np.isfinite(routers.weight).all() and np.isfinite(routers.scale).all()):
                raise ValueError("numbers that are not finite")
            return routers
        except Exception as error:  # safetensors raises nothing narrower
            raise ValueError(f"{folder / FILE}: expected routers, got {error}; record it anew") from None

    def ahead(self, layer: int, look_ahead: int) -> np.ndarray:
        """Returns routers [W, E, D] of the next W layers for this layer's normed hidden state."""
        return routers_ahead(self.weight, self.scale, layer, look_ahead)

    def reduced(self, basis: Basis, layer: int, look_ahead: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `ahead` for hidden states reduced by `basis`: matrix [width, W * E] and offset [W * E]."""
        ahead = self.ahead(layer, look_ahead).reshape(-1, self.weight.shape[2]).T  # [D, W * E]
        return basis.components[layer, :, :width].T @ ahead, basis.mean[layer] @ ahead
