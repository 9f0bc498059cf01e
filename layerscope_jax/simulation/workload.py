"""Workload of a simulation: recorded demand of a batch, step by step, and forecasts of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.scheduling.plan import Phase


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Demand and forecasts of some steps of one phase.

    Attributes:
        phase: phase of all steps.
        tokens: tokens of a step: the number of requests in decode, all prompt tokens in prefill.
        counts: [S, L, E] tokens routed to each expert.
        forecasts: [S, L, W, E] tokens expected of the W layers after each, or None; see
            `layerscope_jax.scheduling.plan.Observation`.
        predictor: name of the predictor that made them, for reports.
    """

    phase: Phase
    tokens: int
    counts: np.ndarray
    forecasts: np.ndarray | None = None
    predictor: str | None = None

    def check(self, model: RoutedExperts) -> None:
        """Refuses demand that no engine could have.

        Raises:
            ValueError: if an array does not have the model's shape, holds invalid numbers of tokens, or has a
                layer of a step without tokens.
        """
        layers, experts = model.num_layers, model.num_experts
        if self.phase not in get_args(Phase):
            raise ValueError(
                f"phase must be one of {', '.join(get_args(Phase))}, got {str(self.phase)[:40]!r}"
            )
        shape = _check_numbers(self.counts, "counts", np.integer)
        if len(shape) != 3 or shape[1:] != (layers, experts):
            raise ValueError(f"expected counts [S, {layers}, {experts}] of the geometry, got {list(shape)}")
        if not self.counts.any(axis=2).all():
            raise ValueError("expected tokens in every layer of every step, got a layer without")
        if self.forecasts is not None:
            ahead = _check_numbers(self.forecasts, "forecasts", np.number)
            if len(ahead) != 4 or ahead[:2] != shape[:2] or ahead[3] != experts:
                raise ValueError(
                    f"expected forecasts [{shape[0]}, {layers}, W, {experts}] for counts {list(shape)}, "
                    f"got {list(ahead)}"
                )


def _check_numbers(array: Any, name: str, kind: type) -> tuple[int, ...]:
    """Returns the shape of an array; refuses arrays that hold no valid numbers of tokens."""
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, kind):
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must be an array of {'whole ' * (kind is np.integer)}numbers, got {got}")
    if array.size and not (array.min() >= 0 and array.max() < np.inf):  # nor NaN
        raise ValueError(f"{name} must be 0 or more and finite, got {array.min()}..{array.max()}")
    return array.shape
