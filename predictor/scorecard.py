"""Scores predictors on held-out rows: `python -m predictor.scorecard --traces DIR --predictor DIR`.

`--shipped` scores the shipped predictor on the held-out rows that are shipped with it. Recall and calibration
are of all rows, the rest of batches of them; see `predictor.batches`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("predictor.scorecard")

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from layerscope_jax.prediction.traces import Trace
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.files import write_file
from layerscope_jax.support.option_errors import writing
from predictor import SHIPPED, metrics
from predictor.baselines import (
    Candidate,
    Gate,
    Learned,
    Linear,
    Oracle,
    Popularity,
    PreviousToken,
    truth,
)
from predictor.batches import Batching
from predictor.dataset import load_rows
from predictor.fitted import load_or_fit
from predictor.llapor import LLaPor
from predictor.network import multi_hot
from predictor.pca import Basis
from predictor.report import Sums, report
from predictor.routers import Routers
from predictor.scorecard_plots import draw, need_matplotlib
from predictor.scorecard_view import show
from predictor.train import bar

HORIZONS = (1, 2, 4, 8)
SIZES = (1, 4, 16, 64)
CALIBRATED_ROWS = 16_384


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Settings of a scorecard.

    Attributes:
        traces: folder made by `layerscope trace`; its held-out passages are scored.
        predictor: folders made by `predictor.train`; several, trained from other seeds, give the spread.
        shipped: score the shipped predictor on the shipped held-out rows, instead of `traces` and
            `predictor`.
        out: also write all figures to this file, as JSON.
        json: print all figures as one JSON document instead of tables.
        plots: also draw them into this folder.
        tokens: maximum number of held-out rows.
        fit_tokens: maximum number of training rows that popularity and the linear map are fitted to. The
            fitted baselines are stored beside the first predictor.
        seed: seed of the batches.
    """

    traces: Path | None = None
    predictor: tuple[Path, ...] = ()
    shipped: bool = False
    out: Path | None = None
    json: bool = False
    plots: Path | None = None
    tokens: int = 131_072
    fit_tokens: int = 196_608
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least(self, tokens=1, fit_tokens=1)
        if self.shipped and (self.traces or self.predictor):
            problems.add("shipped names a trace and a predictor itself: leave out traces and predictor")
        if not self.shipped and not (self.traces and self.predictor):
            problems.add("expected traces and predictor, or shipped alone")
        problems.raise_any()

    @property
    def folders(self) -> tuple[Path, tuple[Path, ...]]:
        """Folders of the trace and of the predictors."""
        if self.shipped:
            return SHIPPED / "heldout", (SHIPPED,)
        assert self.traces is not None
        return self.traces, self.predictor


def scorecard(config: ScoreConfig, *, progress: bool = True) -> dict[str, Any]:
    """Scores LLaPor and every baseline; `predictor.report.report` describes the result.

    Raises:
        ValueError: if the trace has no held-out rows or no hidden states, or a predictor is of another model.
    """
    folder, predictors = config.folders
    trace = Trace.open(folder)
    model = trace.header.model
    trained = [LLaPor.load(path) for path in predictors]
    for path, llapor in zip(predictors, trained, strict=True):
        model.check(llapor.model, f"the predictor in {path}")
    rows = load_rows(
        trace, lambda passage: passage.split == "heldout", most=config.tokens, what="held-out passages"
    )
    basis, routers = Basis.load(trace.folder), Routers.load(trace.folder)
    furthest = min(*(llapor.look_ahead for llapor in trained), model.num_layers - 1)
    horizons = tuple(horizon for horizon in HORIZONS if horizon <= furthest)
    fitted = load_or_fit(predictors[0], trace, horizons, config.fit_tokens, progress=progress)
    popularity = Popularity(fitted.share, horizons)
    candidates: list[Candidate] = [
        popularity,
        PreviousToken(popularity),
        Gate(routers, basis, popularity, model.experts_per_token),
        Linear(fitted.linear),
    ]
    for number, llapor in enumerate(trained, 1):
        name = "llapor" if number == 1 else f"llapor {number}"
        candidates.append(Learned(llapor, routers, basis, horizons, name))
    candidates.append(Oracle(popularity))
    batching = Batching(rows, SIZES, config.seed)
    sums = score(candidates, batching, horizons, progress=progress)
    return report(
        sums,
        batching,
        horizons,
        unseen=tuple(trace.header.settings.get("heldout_domains", ())),
        about={
            "model": model.to_json(),
            "trace": trace.header.settings | {"complete": trace.complete, "hidden": trace.header.hidden},
            "predictors": [
                {"name": f"llapor {number}" if number > 1 else "llapor", "folder": str(path)}
                | {"size_bytes": llapor.size_bytes, "look_ahead": llapor.look_ahead}
                for number, (path, llapor) in enumerate(zip(predictors, trained, strict=True), 1)
            ],
            "heldout_rows": len(rows),
            "fitted_rows": fitted.made["rows"],
            "seed": config.seed,
        },
    )


def score(
    candidates: list[Candidate], batching: Batching, horizons: tuple[int, ...], *, progress: bool = True
) -> dict[str, Sums]:
    """Returns the sums of every candidate's scores by name, computed layer by layer to save memory."""
    rows, groups = batching.rows, len(batching.groups)
    layers = rows.experts.shape[1]
    sums = {candidate.name: Sums.zeros(layers, len(horizons), groups) for candidate in candidates}
    member = jnp.asarray(batching.member)
    some = jnp.asarray(np.linspace(0, len(rows) - 1, min(CALIBRATED_ROWS, len(rows))), jnp.int32)
    with bar(layers * len(candidates), progress) as advance:
        for layer in range(layers):
            true = truth(rows, layer, horizons)
            for number, candidate in enumerate(candidates):
                interrupts.check()
                advance(layer * len(candidates) + number, f"layer {layer}, {candidate.name}")
                forecast = candidate.forecast(rows, layer)
                for place in range(len(horizons)):
                    experts = jnp.asarray(true.experts[:, place], jnp.int32)
                    known = jnp.asarray(true.known[:, place], jnp.float32)
                    probabilities = jnp.asarray(forecast.probabilities[:, place])
                    ranking = jnp.asarray(forecast.ranking[:, place])
                    probabilities, hot, absent = masked(probabilities, experts, known)
                    scores = sums[candidate.name]
                    scores.rows[layer, place] = row_sums(member, ranking, experts, known)
                    scores.bins[layer, place] = bin_sums(member, probabilities, hot, known, some)
                    for phase in ("decode", "prefill"):
                        expected, none, counts = batching.sums(phase, probabilities, absent, hot)
                        for size in expected:
                            scores.add(
                                (layer, place),
                                size,
                                metrics.BatchSums(expected[size], none[size], counts[size]),
                                batching.formed[phase, size].group,
                            )
        advance(layers * len(candidates), "scored")
    return sums


@jax.jit
def masked(probabilities: jax.Array, experts: jax.Array, known: jax.Array) -> tuple[jax.Array, ...]:
    """Returns probabilities, truth and log-absence [N, E], all zero in rows without a known target."""
    known = known[:, None]
    probabilities *= known
    hot = known * multi_hot(experts, probabilities.shape[-1])
    return probabilities, hot, metrics.log_absence(probabilities)


@jax.jit
def row_sums(member: jax.Array, ranking: jax.Array, experts: jax.Array, known: jax.Array) -> jax.Array:
    """Returns exact and relaxed recall summed over rows, and the number of rows: [groups, 3]."""
    place = metrics.places(ranking, experts)
    each = jnp.stack([metrics.exact_recall(place), metrics.relaxed_recall(place), jnp.ones_like(known)], 1)
    return jnp.matmul(member, each * known[:, None], precision="highest")


@jax.jit
def bin_sums(
    member: jax.Array, probabilities: jax.Array, hot: jax.Array, known: jax.Array, some: jax.Array
) -> jax.Array:
    """Returns `metrics.reliability` summed over some of the rows: [groups, 10, 3]."""
    each = metrics.reliability(probabilities[some], hot[some]) * known[some, None, None]
    return jnp.einsum("gn,nbc->gbc", member[:, some], each, precision="highest")


def main() -> None:
    """Runs the command line; see `layerscope_jax.support.exits`."""
    exits.end(lambda args: score_and_show(tyro.cli(ScoreConfig, description=__doc__, args=args)))


def score_and_show(config: ScoreConfig) -> None:
    """Scores, prints the tables, and writes what else is wanted."""
    exits.need_output()
    if config.plots is not None:
        need_matplotlib()  # before the work, not after it
    with nullcontext() if config.out is None else writing("--out", config.out):
        result = scorecard(config)
        figures = json.dumps(result, allow_nan=False)
        if config.json:
            print(figures)
        else:
            show(result, Console(width=None if sys.stdout.isatty() else 120))
        if config.out is not None:
            write_file(config.out, figures + "\n")
    if config.plots is not None:
        draw(result, config.plots)
