"""Tables of recall on the small geometries: means over what was kept out, and who is behind."""

import json

import pytest

from tools.geometry_tables import tables

RECALL = {
    "popularity": 0.1,
    "previous-token": 0.3,
    "gate": 0.7,
    "linear": 0.8,
    "llapor": 0.9,
    "llapor 2": 0.8,
}


def scorecard(less=0.0):
    """Figures that fall with the horizon; in batches of 4 the gate is ahead."""
    rows = [
        {
            "predictor": name,
            "domain": domain,
            "unseen": domain != "novels",
            "phase": phase,
            "horizon": horizon,
            "wraps": wraps,
            "batch": batch,
            "recall": round(value - less - 0.01 * horizon, 3) if domain != "novels" else 0.0,
            "batch_recall": 0.95 if name == "gate" and batch == 4 else value,
        }
        for name, value in RECALL.items()
        for domain in ("novels", "verse", "instructions")
        for phase in ("decode", "prefill")
        for horizon in (1, 2, 4, 8)
        for wraps in (False, True)
        for batch in (1, 4)
    ]
    return json.dumps({"horizons": [1, 2, 4, 8], "rows": rows})


def test_tables(tmp_path):
    with pytest.raises(ValueError, match=r"expected scorecard\.json in a folder .* found none"):
        tables(tmp_path)
    folder = tmp_path / "mixtral-8x7b"
    (folder / "third").mkdir(parents=True)
    (folder / "scorecard.json").write_text(scorecard())
    (folder / "third" / "scorecard.json").write_text(scorecard(less=0.05))
    lines = tables(tmp_path).splitlines()
    assert "| Mixtral-8x7B | popularity | 0.090 | 0.080 | 0.060 | 0.020 |" in lines
    assert "|  | llapor | 0.840 | 0.830 | 0.810 | 0.770 |" in lines  # the mean of two seeds
    assert "| aim | llapor | 0.90 | 0.86 | 0.80 | 0.72 |" in lines
    assert "| Mixtral-8x7B | 1 | 0.850 / 0.800 linear | 0.850 / 0.950 gate (behind) |" in lines
    assert (
        "| Mixtral-8x7B | gate | 0.640 -> 0.690 | 0.630 -> 0.680 | 0.610 -> 0.660 | 0.570 -> 0.620 |" in lines
    )
