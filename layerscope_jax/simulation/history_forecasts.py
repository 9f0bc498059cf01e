"""Forecasts of recorded demand that are computed from the demand alone: from its past or its future."""

from __future__ import annotations

import numpy as np

from layerscope_jax.prediction.history import History
from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.scheduling.plan import Observation, Phase


def remembered(
    predictor: History, model: RoutedExperts, before: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Returns a predictor's forecasts after each layer of each step, as an engine would get them.

    Args:
        predictor: a predictor that forecasts from earlier routing.
        model: numbers of the model's layers and experts.
        before: [L, E] tokens of each expert in the step before the first one.
        counts: [S, L, E] tokens of each expert in the steps.

    Returns:
        [S, L, W, E] float32 tokens expected of the W layers after each.

    >>> from layerscope_jax.prediction.history import PreviousToken
    >>> model = RoutedExperts(num_layers=1, num_experts=2, experts_per_token=1)
    >>> remembered(PreviousToken(1), model, np.array([[0, 3]]), np.array([[[2, 1]], [[1, 2]]])).tolist()
    [[[[0.0, 3.0]]], [[[2.0, 1.0]]]]
    """

    def seen(step: int, layer: int, tokens: np.ndarray, phase: Phase) -> Observation:
        active = np.flatnonzero(tokens)
        demand = dict(zip(active.tolist(), tokens[active].tolist(), strict=True))
        return Observation(step=step, layer=layer, phase=phase, demand=demand, resident=(), in_flight=())

    state = predictor.init(model)
    for layer, tokens in enumerate(before):
        state = predictor.update(state, seen(0, layer, tokens, "prefill"))
    forecasts = np.zeros((*counts.shape[:2], predictor.look_ahead, model.num_experts), np.float32)
    for step, layer in np.ndindex(*counts.shape[:2]):
        tokens = counts[step, layer]
        forecasts[step, layer] = predictor.expected(state, layer, int(tokens.sum()))
        state = predictor.update(state, seen(step + 1, layer, tokens, "decode"))
    return forecasts


def foretold(counts: np.ndarray, look_ahead: int) -> np.ndarray:
    """Returns a perfect forecast, which is the demand itself.

    Args:
        counts: [S, L, E] tokens of each expert.
        look_ahead: W.

    Returns:
        [S, L, W, E] float32 tokens of the W layers after each, the first layers of the next step following
        the last; zeros past the last step.

    >>> foretold(np.array([[[2, 0], [0, 2]], [[1, 1], [2, 0]]]), 1)[:, :, 0].tolist()
    [[[0.0, 2.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]]
    """
    steps, layers, experts = counts.shape
    turns = np.concatenate([counts.reshape(-1, experts), np.zeros((look_ahead, experts), counts.dtype)])
    place = np.arange(steps * layers)[:, None] + 1 + np.arange(look_ahead)
    return turns[place].reshape(steps, layers, look_ahead, experts).astype(np.float32)
