"""Forecasts of any recall, made from the truth: what would such a predictor be worth?"""

from __future__ import annotations

import numpy as np


def forecast_of_recall(counts: np.ndarray, recall: float, look_ahead: int, seed: int) -> np.ndarray:
    """Forecasts of recorded demand that are right with a given probability.

    Each choice of a token is forecast correctly with probability `recall`; otherwise an expert is drawn in
    its place by the layer's popularity over all steps, which is all that a forecast without knowledge of the
    token has. So at 1 the forecast is the truth, at 0 it is popularity alone. A drawn expert may be right by
    chance: the more tokens and the fewer experts, the more often. Forecasts of one layer made at different
    times are drawn independently.

    Args:
        counts: [S, L, E] tokens routed to each expert.
        recall: 0..1.
        look_ahead: W.
        seed: of the random numbers.

    Returns:
        [S, L, W, E] float32 tokens expected of the W layers after each, the first layers of the next step
        following the last; zeros past the last step.

    Raises:
        ValueError: if `recall` or `look_ahead` is out of range.

    >>> counts = np.array([[[2, 0, 0], [0, 1, 1]], [[0, 2, 0], [0, 0, 2]]])
    >>> forecast_of_recall(counts, 1.0, 1, seed=0)[:, :, 0].astype(int).tolist()
    [[[0, 1, 1], [0, 2, 0]], [[0, 0, 2], [0, 0, 0]]]
    >>> int(forecast_of_recall(counts, 0.0, 1, seed=0)[0, 1].sum())  # two tokens still, wherever they are
    2
    """
    if not 0 <= recall <= 1:
        raise ValueError(f"recall must lie in 0..1, got {recall}")
    if look_ahead < 1:
        raise ValueError(f"look_ahead must be 1 or more, got {look_ahead}")
    steps, layers, experts = counts.shape
    turns = steps * layers
    popularity = counts.sum(0) / np.maximum(1, counts.sum((0, 2)))[:, None]  # [L, E]
    random = np.random.default_rng(seed)
    forecasts = np.zeros((turns, look_ahead, experts), np.float32)
    flat = counts.reshape(turns, experts)
    for ahead in range(1, min(look_ahead + 1, turns)):
        coming = flat[ahead:]  # of the turns from the first on
        right = random.binomial(coming, recall)
        layer = np.arange(ahead, turns) % layers
        forecasts[:-ahead, ahead - 1] = right + random.multinomial((coming - right).sum(1), popularity[layer])
    return forecasts.reshape(steps, layers, look_ahead, experts)
