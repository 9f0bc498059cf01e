"""Forecasts from earlier routing, by the same objects in engines, simulations and scorecards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.scheduling.plan import Observation

LOOK_AHEAD = 4


class History(Protocol):
    """Predictor that forecasts from earlier routing: pure functions over small records, like a policy.

    Attributes:
        name, look_ahead: as in `layerscope_jax.prediction.predictors.Predictor`.
    """

    @property
    def name(self) -> str: ...

    @property
    def look_ahead(self) -> int: ...

    def init(self, geometry: Any) -> Any:
        """Returns the initial state, for a model with the routed experts of `geometry`."""

    def update(self, state: Any, seen: Observation) -> Any:
        """Returns the next state, after a layer's demand is known."""

    def expected(self, state: Any, layer: int, tokens: int) -> list[list[float]]:
        """Returns the expected tokens `[W][E]` of each expert in the W layers after `layer`.

        Args:
            state: what `init` or `update` returned.
            layer: the layer whose demand was seen last.
            tokens: number of tokens of the batch.
        """


def turn_ahead(layer: int, horizon: int, num_layers: int) -> tuple[int, int]:
    """Returns the position `horizon` layers after a layer: how many steps later, and which layer.

    After the last layer, counting continues with the first layer of the next step.

    >>> turn_ahead(1, 1, num_layers=4), turn_ahead(3, 2, num_layers=4)
    ((0, 2), (1, 1))
    """
    return divmod(layer + horizon, num_layers)


@dataclass(frozen=True)
class Counts:
    """Tokens routed to each expert of each layer, for the layers that have been seen.

    Attributes:
        model: numbers of the model's layers and experts.
        of: layer -> [..., E] tokens. An engine counts the tokens of a batch together; callers that count
            requests separately use the leading axes for them.
    """

    model: RoutedExperts
    of: Mapping[int, np.ndarray] = field(default_factory=dict)

    def ahead(self, layer: int, horizons: Sequence[int]) -> np.ndarray:
        """Returns tokens [H, ..., E] of the layers `horizons` after `layer`; zeros if not seen yet."""
        nothing = np.zeros(self.model.num_experts)
        layers = [turn_ahead(layer, horizon, self.model.num_layers)[1] for horizon in horizons]
        return np.stack([self.of.get(target, nothing) for target in layers])


@dataclass(frozen=True)
class FromCounts:
    """A `History` whose forecast of a layer is proportional to counts of its experts."""

    look_ahead: int = LOOK_AHEAD

    def init(self, geometry: RoutedExperts) -> Counts:
        return Counts(geometry)

    def forecast(self, state: Counts, layer: int, tokens: float, horizons: Sequence[int]) -> np.ndarray:
        """Returns expected tokens [H, ..., E] of the layers `horizons` after `layer`; see `expected`."""
        return scaled(state.ahead(layer, horizons), tokens)

    def expected(self, state: Counts, layer: int, tokens: int) -> list[list[float]]:
        """Returns the expected tokens `[W][E]`; see `History`."""
        return self.forecast(state, layer, tokens, range(1, self.look_ahead + 1)).tolist()


@dataclass(frozen=True)
class PreviousToken(FromCounts):
    """Forecasts the experts of the previous step: in decode, those of each request's previous token."""

    name = "previous-token"

    def update(self, state: Counts, seen: Observation) -> Counts:
        return replace(state, of={**state.of, seen.layer: tokens_of(seen, state.model)})


@dataclass(frozen=True)
class Popularity(FromCounts):
    """Forecasts the experts that a layer chose most often so far, with old counts decaying.

    Attributes:
        memory: share of the old counts that is kept at each step.
    """

    memory: float = 0.98
    name = "popularity"

    def update(self, state: Counts, seen: Observation) -> Counts:
        now, before = tokens_of(seen, state.model), state.of.get(seen.layer)
        return replace(
            state, of={**state.of, seen.layer: now if before is None else self.memory * before + now}
        )


def tokens_of(seen: Observation, model: RoutedExperts) -> np.ndarray:
    """Returns a layer's demand as tokens [E]."""
    tokens = np.zeros(model.num_experts)
    tokens[list(seen.demand)] = list(seen.demand.values())
    return tokens


def scaled(counts: np.ndarray, tokens: float) -> np.ndarray:
    """Returns counts [..., E] scaled to add up to `tokens` (token, choice) pairs; zeros if all are zero.

    >>> scaled(np.array([[0.0, 3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), 8).tolist()
    [[0.0, 6.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    totals = counts.sum(-1, keepdims=True)
    return counts * np.divide(tokens, totals, out=np.zeros_like(totals), where=totals > 0)
