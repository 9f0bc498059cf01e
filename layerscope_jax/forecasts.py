"""What an engine does with a predictor: binds it, sums its probabilities, tells the next layers' demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints import Model
from layerscope_jax.prediction import History, Predictor
from layerscope_jax.scheduling.plan import Geometry, Observation

Forecast = Sequence[Sequence[float]]
"""[W][E] expected tokens."""


class Forecasts:
    """A predictor at work for one engine.

    Args:
        predictor: what forecasts; None for nobody.
        model: whose experts.
        geometry: of the model.

    Raises:
        ValueError: if the predictor was made for another model.

    Attributes:
        in_layer: the predictor, if it runs inside the layer's jitted part.
    """

    def __init__(self, predictor: Predictor | History | None, model: Model, geometry: Geometry):
        self.name = None if predictor is None else predictor.name
        self.in_layer: Predictor | None = None
        self._observe: Callable[..., None] | None = getattr(predictor, "observe", None)
        self._params: Sequence[Any] = [None] * geometry.num_layers
        self._numbers: list[jax.Array | None] = [None] * geometry.num_layers
        self._history: History | None = None
        self._state: Any = None
        if hasattr(predictor, "predict"):
            self.in_layer = cast(Predictor, predictor)
            self._params = self.in_layer.bind(model)
            self._numbers = [
                jax.device_put(np.int32(layer), model.device) for layer in range(geometry.num_layers)
            ]
        elif predictor is not None:
            self._history = cast(History, predictor)
            self._state = self._history.init(geometry)

    def inputs(self, layer: int) -> tuple[Any, jax.Array | None]:
        """What a layer's jitted part takes for the forecast: its parameters and its number, on the device."""
        return self._params[layer], self._numbers[layer]

    def read(self, layer: int, expected: np.ndarray | None, tokens: int) -> Forecast:
        """The forecast of the layers after `layer`.

        Args:
            layer: the layer that is about to be planned.
            expected: [W, E] as the jitted part gave it, if it gave any.
            tokens: (token, choice) pairs of this layer.
        """
        if expected is not None:
            return expected.tolist()
        if self._history is not None:
            return self._history.expected(self._state, layer, tokens)
        return ()

    def learn(
        self,
        seen: Observation,
        inputs: jax.Array,
        experts: np.ndarray,
        weights: jax.Array,
        active: np.ndarray,
    ) -> None:
        """Shows the predictor what became of a layer, if it wants to know."""
        if self._history is not None:
            self._state = self._history.update(self._state, seen)
        if self._observe is not None:
            self._observe(seen.layer, inputs, experts, weights, active, seen.phase)


def counted_rows(active: np.ndarray, last: np.ndarray, length: int) -> np.ndarray:
    """[2, T] float32: which rows count for layers of this step, and which have a next step.

    Args:
        active: [T] bool, rows that are tokens.
        last: [B] index of each request's newest token in its row.
        length: S, with T = B * S.

    >>> counted_rows(np.array([True, True, True, False]), np.array([1, 0]), 2).tolist()
    [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]
    """
    newest = np.zeros(active.size, bool)
    newest[np.arange(len(last)) * length + last] = True
    return np.stack([active, active & newest]).astype(np.float32)


def expected_tokens(
    probabilities: jax.Array, counted: jax.Array, layer: jax.Array, num_layers: int
) -> jax.Array:
    """[W, E] tokens that each expert of the next W layers is expected to get; zeros for what is not a number.

    Args:
        probabilities: [W, T, E].
        counted: [2, T] see `counted_rows`; the second row is for layers of the next step.
        layer: [] the layer that forecasts.
        num_layers: L.
    """
    look_ahead, tokens, _ = probabilities.shape
    wraps = layer + 1 + jnp.arange(look_ahead, dtype=jnp.int32) >= num_layers  # [W]
    rows = jnp.where(wraps[:, None], counted[1][None], counted[0][None])  # [W, T]
    # Rows that do not count may hold anything: times zero is not enough.
    kept = jnp.where(rows[:, :, None] > 0, probabilities.astype(jnp.float32), 0.0)
    total = jnp.nan_to_num(kept, nan=0.0, posinf=0.0, neginf=0.0).sum(1)
    return jnp.clip(total, 0.0, jnp.float32(tokens))
