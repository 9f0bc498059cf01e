"""Whether a trained predictor beats the next layers' routers: what an engine of a model is to use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from layerscope_jax.prediction.predictors import NextGate
from layerscope_jax.prediction.traces import Passage, Trace, decode_rows
from layerscope_jax.support.files import read_json, write_file
from predictor.baselines import Candidate, Gate, Learned, Popularity, truth
from predictor.dataset import Rows, load_rows
from predictor.llapor import LLaPor
from predictor.metrics import ranked_recall
from predictor.pca import Basis
from predictor.routers import Routers

FILE = "verdict.json"
HORIZONS = (1, 2, 4, 8)
FORECASTS = (LLaPor.name, NextGate.name)
AGAIN = "measure it again with `layerscope predictor train`"
MOST_ROWS = 32_768
"""Held-out tokens that are measured on, at most; passages are in random order."""

SURE = 2.0
"""Standard errors by which a lead must exceed zero."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Content of `verdict.json`, beside a predictor.

    Attributes:
        forecast: what an engine is to use: "llapor", the predictor in the folder, or "gate".
        horizons: layers ahead that were measured.
        recall: predictor -> exact top-k recall at each horizon, in decode steps of held-out passages.
        lead, error: LLaPor's mean recall over the horizons less the gate's, and the standard error of that,
            from passages.
        heldout_tokens, trained_tokens: number of tokens measured, and trained on.
        more_tokens: about how many more tokens to train on would put LLaPor ahead, if it is not; None if it
            is, or if more text is not seen to help.
    """

    forecast: Literal["llapor", "gate"]
    horizons: tuple[int, ...]
    recall: Mapping[str, list[float]]
    lead: float
    error: float
    heldout_tokens: int
    trained_tokens: int
    more_tokens: int | None = None

    def save(self, folder: Path) -> None:
        write_file(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")


def chosen(folder: Path) -> LLaPor | str | None:
    """Returns what an engine is to use by the verdict in a folder: its predictor, or the name "gate".

    Returns:
        None if the folder has no verdict.

    Raises:
        ValueError: if the verdict or the predictor is damaged.
    """
    if not (folder / FILE).exists():
        return None
    record = read_json(folder / FILE, AGAIN)
    forecast = record.get("forecast") if isinstance(record, dict) else record
    if forecast not in FORECASTS:
        raise ValueError(
            f"{folder / FILE}: forecast must be one of {', '.join(FORECASTS)}, got "
            f"{str(forecast)[:40]!r}; {AGAIN}"
        )
    return LLaPor.load(folder) if forecast == LLaPor.name else NextGate.name


def judge(trace: Trace, llapor: LLaPor, trained_tokens: int) -> Verdict:
    """Measures a predictor and the gate on the trace's held-out passages.

    LLaPor is chosen if its mean recall over the horizons is higher by more than twice the standard error.

    Raises:
        ValueError: if the trace has too few held-out passages.
    """
    rows = load_rows(trace, is_heldout, most=MOST_ROWS, what="held-out passages")
    basis, routers, model = Basis.load(trace.folder), Routers.load(trace.folder), trace.header.model
    horizons = tuple(h for h in HORIZONS if h <= min(llapor.look_ahead, model.num_layers - 1))
    nothing = Popularity(np.zeros((model.num_layers, model.num_experts), np.float32), horizons)
    candidates: list[Candidate] = [
        Learned(llapor, routers, basis, horizons),
        Gate(routers, basis, nothing, model.experts_per_token),
    ]
    recalls = [recall_of_rows(candidate, rows, horizons) for candidate in candidates]  # [N, H] each
    decoded = decode_rows(rows.passages)
    passage = rows.passage_of_row()
    means = [
        np.stack([each[decoded & (passage == index)].mean(0) for index in np.unique(passage[decoded])])
        for each in recalls
    ]
    leads = (means[0] - means[1]).mean(1)  # by passage
    if len(leads) < 2:
        raise ValueError(
            f"expected two held-out passages or more to measure on, got {len(leads)}; add more documents"
        )
    error = float(leads.std(ddof=1) / len(leads) ** 0.5)
    lead = float(leads.mean())
    return Verdict(
        forecast="llapor" if lead > SURE * error else "gate",
        horizons=horizons,
        recall={
            candidate.name: [round(float(value), 4) for value in mean.mean(0)]
            for candidate, mean in zip(candidates, means, strict=True)
        },
        lead=lead,
        error=error,
        heldout_tokens=int(decoded.sum()),
        trained_tokens=trained_tokens,
    )


def is_heldout(passage: Passage) -> bool:
    return passage.split == "heldout"


def recall_of_rows(candidate: Candidate, rows: Rows, horizons: tuple[int, ...]) -> np.ndarray:
    """Exact top-k recall [N, H], mean over the layers whose target is in the same step."""
    layers = rows.experts.shape[1]
    total, counted = np.zeros((len(rows), len(horizons))), np.zeros(len(horizons))
    for layer in range(layers - 1):
        inside = np.array([layer + horizon < layers for horizon in horizons])
        true = truth(rows, layer, horizons).experts.astype(np.int32)
        ranking = candidate.forecast(rows, layer).ranking
        total += np.asarray(ranked_recall(jnp.asarray(ranking), jnp.asarray(true))) * inside
        counted += inside
    return total / counted


def more_tokens(tokens: int, wrong: float, wrong_at_quarter: float, gate_wrong: float) -> int | None:
    """About how many more tokens to train on bring a predictor's share of wrong experts down to the gate's.

    The share is taken to fall as a power of the tokens, which two trainings tell.

    Args:
        tokens: trained on.
        wrong: share of wrong experts then.
        wrong_at_quarter: the same after a quarter of the tokens.
        gate_wrong: the gate's.

    Returns:
        The number; None where a quarter of the tokens is as good, so that more are not seen to help.

    >>> more_tokens(10_000, wrong=0.2, wrong_at_quarter=0.4, gate_wrong=0.1)
    30000
    """
    if wrong <= gate_wrong:
        return 0
    power = math.log(max(wrong_at_quarter, 1e-9) / wrong) / math.log(4)
    if power < 0.01 or gate_wrong <= 0:
        return None
    return round(tokens * ((wrong / gate_wrong) ** (1 / power) - 1))
