"""Forecasts of an engine: a predictor bound to a model, its probabilities summed to expected tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.prediction.bases import Learner, completed
from layerscope_jax.prediction.predictors import History, Predictor
from layerscope_jax.scheduling.plan import Geometry, Observation

Forecast = Sequence[Sequence[float]]
"""[W][E] expected tokens."""


class Forecasts:
    """Forecasts of one engine's predictor.

    Args:
        predictor: the predictor; None for no forecasts.
        model: the model whose experts are predicted.
        geometry: geometry of the model.

    Raises:
        ValueError: if the predictor was made for another model, or its output does not have the shape for
            this model.

    Attributes:
        in_layer: the predictor (or its `architecture`) if it runs inside the layer's jitted part.
        kept_bytes: device memory (bytes) of the predictor, without the model's own arrays.
    """

    def __init__(self, predictor: Predictor | History | None, model: Model, geometry: Geometry):
        self.name = None if predictor is None else predictor.name
        self.in_layer: Predictor | None = None
        self.kept_bytes = 0
        self._learner = Learner([None] * geometry.num_layers)
        self._numbers: list[jax.Array | None] = [None] * geometry.num_layers
        self._history: History | None = None
        self._state: Any = None
        self._experts = geometry.num_experts
        if hasattr(predictor, "predict"):
            whole = completed(cast(Predictor, predictor))
            self.in_layer = cast(Predictor, whole.architecture)
            self._learner = whole.attach(model)
            if model.partition is not None:
                if self._learner.learns:
                    self.close()
                    raise ValueError(
                        f"predictor {self.name!r} learns while it runs, which it cannot on several devices; "
                        "pass the predictor that it began with"
                    )
                self._learner = Learner(model.put(list(self._learner.params)))
            try:
                check_forecasts(self.in_layer, str(self.name), self._learner.params, model)
            except BaseException:
                self.close()
                raise
            params = self._learner.params
            kept = [kept_bytes(some, model) for some in (params, *params)]
            # While a learner replaces its parameters, those of one layer exist twice.
            self.kept_bytes = kept[0] + (max(kept[1:]) if self._learner.learns else 0)
            self._numbers = [model.put(np.int32(layer)) for layer in range(geometry.num_layers)]
        elif predictor is not None:
            self._history = cast(History, predictor)
            self._state = self._history.init(geometry)

    def beside(self, budget_bytes: int) -> int:
        """Returns the bytes of a device budget that are left for experts.

        Raises:
            ValueError: if the predictor needs more than the budget.
        """
        if self.kept_bytes > budget_bytes:
            raise ValueError(
                f"device_budget must hold what predictor {self.name!r} keeps on the device "
                f"({self.kept_bytes:,} bytes) and some experts, got {budget_bytes:,} bytes; raise it, "
                "or use predictor 'gate', which keeps nothing there"
            )
        return budget_bytes - self.kept_bytes

    def explained(self, budget_bytes: int, init: Callable[[], Any]) -> Any:
        """Calls `init` of a policy; adds the predictor's share of the budget to its refusal.

        Raises:
            ValueError: if the policy refuses the budget.
        """
        try:
            return init()
        except ValueError as error:
            if not self.kept_bytes:
                raise
            raise ValueError(
                f"{error}; of the device_budget of {budget_bytes:,} bytes, predictor {self.name!r} keeps "
                f"{self.kept_bytes:,}"
            ) from error

    def check(self) -> None:
        """Warns, once, if learning has failed; forecasts continue with the parameters as they are."""
        failure = self._learner.check()
        if failure is not None:
            warnings.warn(f"predictor {self.name!r}: {failure}", RuntimeWarning, stacklevel=4)

    def close(self) -> None:
        """Closes the learner; raises its failure if there was no warning before."""
        learner, self._learner = self._learner, Learner(self._learner.params)  # which closes only once
        learner.close()

    def inputs(self, layer: int) -> tuple[Any, jax.Array | None]:
        """Returns the inputs of a layer's forecast within its program: parameters and layer number."""
        return self._learner.params[layer], self._numbers[layer]

    def read(self, layer: int, expected: np.ndarray | None, tokens: int) -> Forecast:
        """Returns the forecast of the layers after `layer`.

        Args:
            layer: the layer that is about to be planned.
            expected: [W, E] from the layer's program, if the predictor runs there.
            tokens: (token, choice) pairs of this layer.
        """
        if expected is not None:
            return expected.tolist()
        if self._history is not None:
            return self._sane(self._history.expected(self._state, layer, tokens), tokens)
        return ()

    def learn(
        self,
        seen: Observation,
        inputs: jax.Array,
        experts: np.ndarray,
        weights: jax.Array,
        active: np.ndarray,
    ) -> None:
        """Passes a layer's routing on to a predictor that learns or remembers."""
        if self._history is not None:
            self._state = self._history.update(self._state, seen)
        if self._learner.learns:
            self._learner.observe(seen.layer, inputs, experts, weights, active, seen.phase)

    def _sane(self, expected: Forecast, tokens: int) -> Forecast:
        """Returns a predictor's forecast as lists, with every number clipped to the possible range.

        Raises:
            ValueError: if it does not hold one number for each expert.
        """
        try:
            if type(expected) is not list:  # such as an array, which has no truth value
                expected = np.array(expected, float).tolist()
            if any(len(row) != self._experts for row in expected):
                raise TypeError
            if all(min(row) >= 0 and sum(row) <= 2 * tokens for row in expected):  # nor NaN
                return expected
            known = np.nan_to_num(np.array(expected, float), posinf=0.0, neginf=0.0)
            return np.clip(known, 0.0, float(tokens)).tolist()
        except (TypeError, ValueError):
            raise ValueError(
                f"predictor {self.name!r}: expected() must return lists of {self._experts} expected tokens, "
                f"one for each layer ahead, got {str(expected)[:80]}"
            ) from None


def kept_bytes(params: Any, model: Model) -> int:
    """Returns a predictor's bytes on the model's device, without scalars and the model's own arrays."""
    own = {id(array) for array in jax.tree.leaves(model.dense)}
    return sum(
        {
            id(array): array.nbytes
            for array in jax.tree.leaves(params)
            if isinstance(array, jax.Array)
            and array.ndim
            and model.device in array.devices()
            and id(array) not in own
        }.values()
    )


def check_forecasts(predictor: Predictor, name: str, params: Sequence[Any], model: Model) -> None:
    """Traces a predictor once for each kind of layer parameters; nothing is compiled or computed.

    Raises:
        ValueError: if its output is not probabilities [W, T, E], or there is not one set of parameters for
            each layer.
    """
    config, tokens = model.config, 3
    ahead = predictor.look_ahead
    if type(ahead) is not int or ahead < 1:
        raise ValueError(f"predictor {name!r}: look_ahead must be a whole number, 1 or more, got {ahead!r}")
    if not isinstance(params, Sequence) or len(params) != config.num_moe_layers:
        got = f"{len(params)}" if isinstance(params, Sequence) else repr(type(params).__name__)
        raise ValueError(
            f"predictor {name!r}: bind() must return parameters for each of {config.num_moe_layers} layers, "
            f"got {got}"
        )
    choices = (tokens, config.experts_per_token)
    inputs = (
        jax.ShapeDtypeStruct((tokens, config.hidden_size), model.bank.dtype),
        jax.ShapeDtypeStruct(choices, jnp.int32),
        jax.ShapeDtypeStruct(choices, jnp.float32),
    )
    seen = set()
    for layer, each in enumerate(params):
        leaves, structure = jax.tree.flatten(each)
        kind = (structure, *((np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves))
        if kind in seen:
            continue
        seen.add(kind)
        try:
            output = jax.eval_shape(predictor.predict, each, *inputs)
        except Exception as error:
            error.add_note(f"in predict() of predictor {name!r}, traced for layer {layer}")
            raise
        expected = (ahead, tokens, config.num_experts)
        shapes = [(array.shape, str(array.dtype)) for array in jax.tree.leaves(output)]
        single = isinstance(output, jax.ShapeDtypeStruct)
        if not single or output.shape != expected or not jnp.issubdtype(output.dtype, jnp.floating):
            raise ValueError(
                f"predictor {name!r}: predict() must return floating-point probabilities of shape {expected} "
                f"(W, T, E) in layer {layer}, got {shapes}"
            )


def counted_rows(active: np.ndarray, last: np.ndarray, length: int) -> np.ndarray:
    """Returns which rows count for layers of this step, and which have a next step: [2, T] float32.

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
    """Returns the expected tokens [W, E] of each expert of the next W layers; NaN and infinity count as 0.

    Args:
        probabilities: [W, T, E] that each token chooses each expert.
        counted: [2, T] see `counted_rows`; the second row is for layers of the next step.
        layer: [] number of the layer in which the forecast is made.
        num_layers: L, number of MoE layers.
    """
    look_ahead, tokens, _ = probabilities.shape
    wraps = layer + 1 + jnp.arange(look_ahead, dtype=jnp.int32) >= num_layers  # [W]
    rows = jnp.where(wraps[:, None], counted[1][None], counted[0][None])  # [W, T]
    # Rows that do not count may hold NaN, which a product with zero would not remove.
    kept = jnp.where(rows[:, :, None] > 0, probabilities.astype(jnp.float32), 0.0)
    total = jnp.nan_to_num(kept, nan=0.0, posinf=0.0, neginf=0.0).sum(1)
    return jnp.clip(total, 0.0, jnp.float32(tokens))
