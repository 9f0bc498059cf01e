"""What a predictor can do besides predicting, said by its class, with defaults."""

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
    """What one engine forecasts with; derive from it to be shown what became of each layer.

    Attributes:
        params: of each layer, as of `Predictor.bind`. A learner may replace them where they lie; then one
            layer's are on the device twice for a moment.
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
        """Is shown one layer of a step.

        Args:
            layer: its number; layers come in order.
            inputs, weights: [T, D] and [T, K], on the device.
            experts: [T, K].
            active: [T] bool, which rows are tokens.
            phase: of the step.
        """

    def check(self) -> str | None:
        """What went wrong, said once; None while all is well."""
        return None

    def close(self) -> None:
        """Ends what it does beside the engine. Raises what it failed with, if nobody was told."""


class PredictorBase:
    """A `Predictor` and all that an engine asks of one; derive from it to say more than probabilities.

    Attributes:
        name: as in statistics and tables.
        look_ahead: W.
    """

    name: str
    look_ahead: int

    @property
    def architecture(self) -> Hashable:
        """What programs call the `predict` of, and are kept with: equal ones share programs.

        A predictor with weights has one without them, or says itself what is equal.
        """
        return self

    def attach(self, model: Model) -> Learner:
        """What one engine forecasts with.

        Raises:
            ValueError: if the predictor was made for another model, with what differs.
        """
        return Learner(self.bind(model))

    def bind(self, model: Model) -> Sequence[Any]:
        """As `Predictor.bind`."""
        raise NotImplementedError

    def predict(self, params: Any, inputs: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """As `Predictor.predict`."""
        raise NotImplementedError


EXTRAS = ("architecture", "attach", "observe")
"""What is asked of a `PredictorBase`, or of its learners, and not of other predictors."""


class OnlyPredicts(PredictorBase):
    """A predictor that has the parts of a `Predictor` and no more."""

    def __init__(self, predictor: Predictor):
        self.name, self.look_ahead = predictor.name, predictor.look_ahead
        self._predictor = predictor

    @property
    def architecture(self) -> Hashable:
        return self._predictor

    def bind(self, model: Model) -> Sequence[Any]:
        return self._predictor.bind(model)


def completed(predictor: Predictor | PredictorBase) -> PredictorBase:
    """A predictor with all that may be asked of it.

    Raises:
        ValueError: if it has parts that would not be asked for, as its class does not say that it has them.
    """
    if isinstance(predictor, PredictorBase):
        return predictor
    unasked = [name for name in EXTRAS if hasattr(predictor, name)]
    if unasked:
        raise ValueError(
            f"predictor {predictor.name!r} has {', '.join(unasked)}, asked only of classes derived from "
            f"layerscope_jax.PredictorBase, and observe() of the learner that attach() gives, got "
            f"{type(predictor).__name__}; derive it from that"
        )
    return OnlyPredicts(predictor)
