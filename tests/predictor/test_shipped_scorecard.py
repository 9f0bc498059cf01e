"""What is shipped does better than what is free, on rows that come along."""

import numpy as np
import pytest

from predictor import scorecard as module
from predictor.scorecard import ScoreConfig, scorecard

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_its_scorecard(monkeypatch):
    monkeypatch.setattr(module, "SIZES", (1,))  # recall is the same in batches of any size
    # A sixth of the rows: recall is within 0.005 of that of all.
    card = scorecard(ScoreConfig(shipped=True, tokens=512), progress=False)
    recall = {}
    for row in card["rows"]:
        if row["batch"] == 1 and not row["wraps"]:
            recall.setdefault((row["predictor"], row["horizon"]), []).append(row["recall"])
    mean = {key: np.mean(values) for key, values in recall.items()}
    for horizon in (1, 2, 4, 8):
        assert mean["oracle", horizon] == 1
        for free in ("popularity", "previous-token", "gate", "linear"):
            assert mean["llapor", horizon] > mean[free, horizon]
