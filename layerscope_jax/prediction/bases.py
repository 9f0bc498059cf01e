"""Base classes of predictors: every method that an engine calls, with defaults."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import numpy as np

    from layerscope_jax.checkpoints.model import Model
    from layerscope_jax.prediction.predictors import Predictor
    from layerscope_jax.scheduling.plan import Phase


class Learner:
    """One engine's copy of a predictor; derive from it to be shown the routing of each layer.

    Attributes:
        params: parameters of each layer, as `Predictor.bind` returns them. A learner may replace them in this
            sequence; then the parameters of one layer are on the device twice for a moment.
        learns: whether `observe` is called.
    """

    learns = False

    def __init__(self, params: Sequence[Any]):
        self.params = params

    def observe(
        self,
        layer: int,
        inputs: jax.Array,
        experts: np.ndarray,
        weights: jax.Array,
        active: np.ndarray,
        phase: Phase,
    ) -> None:
        """Receives the routing of one layer of a step.

        Args:
            layer: index of the layer; layers come in order.
            inputs: [T, D] inputs of the layer's router, on the device.
            experts: [T, K] experts that the router chose for each token.
            weights: [T, K] weights of those experts, on the device.
            active: [T] bool, which rows are tokens and not padding.
            phase: phase of the step.
        """

    def check(self) -> str | None:
        """Returns what went wrong, once; None if nothing did."""
        return None

    def close(self) -> None:
        """Ends the learner's own work; raises the error that it failed with, if that was not reported."""


class PredictorBase:
    """Base class for predictors that do more than predict, with defaults for every method that is called.

    Attributes:
        name: name in statistics and tables.
        look_ahead: W, the number of coming layers that are forecast.
    """

    name: str
    look_ahead: int

    @property
    def architecture(self) -> Hashable:
        """Hashable object whose `predict` compiled programs call; programs of equal architectures are shared.

        A predictor with weights returns an object without them, or defines its own equality.
        """
        return self

    def attach(self, model: Model) -> Learner:
        """Returns the learner with which one engine forecasts.

        Raises:
            ValueError: if the predictor was made for another model; says what differs.
        """
        return Learner(self.bind(model))

    def bind(self, model: Model) -> Sequence[Any]:
        """Returns the parameters of each layer, as `Predictor.bind` does."""
        raise NotImplementedError

    def predict(self, params: Any, inputs: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns probabilities [W, T, E], as `Predictor.predict` does."""
        raise NotImplementedError


EXTRAS = ("architecture", "attach", "observe")
"""Parts that are used of a `PredictorBase` or its learners, and not of other predictors."""


class OnlyPredicts(PredictorBase):
    """Wrapper that makes a `PredictorBase` of a class that has only the parts of a `Predictor`."""

    def __init__(self, predictor: Predictor):
        self.name, self.look_ahead = predictor.name, predictor.look_ahead
        self._predictor = predictor

    @property
    def architecture(self) -> Hashable:
        return self._predictor

    def bind(self, model: Model) -> Sequence[Any]:
        return self._predictor.bind(model)


def completed(predictor: Predictor | PredictorBase) -> PredictorBase:
    """Returns a predictor as a `PredictorBase`.

    Raises:
        ValueError: if it has parts of `PredictorBase` but is not derived from it: they would never be used.
    """
    if isinstance(predictor, PredictorBase):
        return predictor
    unasked = [name for name in EXTRAS if hasattr(predictor, name)]
    if unasked:
        raise ValueError(
            f"predictor {predictor.name!r} has {', '.join(unasked)}, used only of classes derived from "
            f"layerscope_jax.PredictorBase (observe(): of the learner that attach() returns), got "
            f"{type(predictor).__name__}; derive the class from PredictorBase"
        )
    return OnlyPredicts(predictor)
