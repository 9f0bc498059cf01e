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

    def ahead(self, layer: int, look_ahead: int) -> np.ndarray:
        """Returns routers [W, E, D] of the next W layers for this layer's normed hidden state."""
        return routers_ahead(self.weight, self.scale, layer, look_ahead)

    def reduced(self, basis: Basis, layer: int, look_ahead: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `ahead` for hidden states reduced by `basis`: matrix [width, W * E] and offset [W * E]."""
        ahead = self.ahead(layer, look_ahead).reshape(-1, self.weight.shape[2]).T  # [D, W * E]
        offset = basis.mean[layer] @ ahead
        if self.bias is not None:
            offset = offset + self.of_next(self.bias, layer, look_ahead).reshape(-1)
        return basis.components[layer, :, :width].T @ ahead, offset

    def of_next(self, biases: np.ndarray, layer: int, look_ahead: int) -> np.ndarray:
        """Returns biases [W, E] of the next W layers, of [L, E]; zeros past the last layer."""
        ahead = np.zeros((look_ahead, biases.shape[1]), np.float32)
        next_ones = biases[layer + 1 : layer + 1 + look_ahead]
        ahead[: len(next_ones)] = next_ones
        return ahead
