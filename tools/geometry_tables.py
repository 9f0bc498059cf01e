"""Prints the tables of `predictor/README.md` on small published geometries, from their scorecards.

`python -m tools.geometry_tables --folder build/geometry`, where each geometry's folder has `scorecard.json`
(`python -m predictor.scorecard --out`), and `third/scorecard.json` of the model after a third of its steps.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("tools.geometry_tables")

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from layerscope_jax.support import exits
from layerscope_jax.support.files import read_json
from predictor.scorecard_view import FREE, main_phase, mean_of, names
from tools.shipped_model.geometries import GEOMETRIES

AIMS = {1: 0.90, 2: 0.86, 4: 0.80, 8: 0.72}
"""Exact recall on unseen text that is aimed at, by layers ahead."""

LEARNED = "llapor"
TRAINED = (*FREE, "linear", LEARNED)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is printed.

    Attributes:
        folder: with a folder for each geometry, named as in `tools.shipped_model.geometries`.
    """

    folder: Path


def recall(result: dict[str, Any], predictor: str, horizon: int, key: str, **where: Any) -> float | None:
    """Mean recall over domains that were kept out of training; LLaPor's is the mean over its seeds."""
    fixed = {"horizon": horizon, "phase": main_phase(result), "unseen": True, **where}
    seeds = [name for name in names(result["rows"], "predictor") if name.split()[0] == predictor]
    found = [mean_of(result, key, predictor=seed, **fixed) for seed in seeds]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def table(headings: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def by_horizon(results: dict[str, dict[str, Any]]) -> list[str]:
    """Exact recall of every predictor at every horizon, of one token."""

    def rows() -> Iterator[Sequence[str]]:
        for name, result in results.items():
            for predictor in TRAINED:
                values = [shown(recall(result, predictor, h, "recall", batch=1)) for h in result["horizons"]]
                yield (name if predictor == TRAINED[0] else "", predictor, *values)
        yield ("aim", LEARNED, *(f"{aim:.2f}" for aim in AIMS.values()))

    return table(("model", "predictor", *(f"{horizon} ahead" for horizon in AIMS)), rows())


def by_batch(results: dict[str, dict[str, Any]]) -> list[str]:
    """Recall of a batch's set of experts at every horizon and batch: LLaPor, and the best of the others."""

    def rows() -> Iterator[Sequence[str]]:
        for name, result in results.items():
            for horizon in result["horizons"]:
                cells = []
                for size in names(result["rows"], "batch"):
                    ours = recall(result, LEARNED, horizon, "batch_recall", batch=size)
                    others = {
                        predictor: recall(result, predictor, horizon, "batch_recall", batch=size)
                        for predictor in TRAINED[:-1]
                    }
                    best = max(others, key=lambda other: others[other] or 0.0)
                    mark = "" if (ours or 0.0) > (others[best] or 0.0) else " (behind)"
                    cells.append(f"{shown(ours)} / {shown(others[best])} {best}{mark}")
                yield (name if horizon == result["horizons"][0] else "", str(horizon), *cells)

    sizes = names(next(iter(results.values()))["rows"], "batch")
    return table(("model", "ahead", *(f"batch {size}" for size in sizes)), rows())


def by_training(results: dict[str, dict[str, Any]], thirds: dict[str, dict[str, Any]]) -> list[str]:
    """LLaPor and the gate, of a model after all of its training and after a third."""

    def rows() -> Iterator[Sequence[str]]:
        for name, third in thirds.items():
            for predictor in ("gate", LEARNED):
                cells = [
                    f"{shown(recall(third, predictor, horizon, 'recall', batch=1))} -> "
                    f"{shown(recall(results[name], predictor, horizon, 'recall', batch=1))}"
                    for horizon in third["horizons"]
                ]
                yield (name if predictor == "gate" else "", predictor, *cells)

    return table(("model", "predictor", *(f"{horizon} ahead" for horizon in AIMS)), rows())


def tables(folder: Path) -> str:
    """All tables of the geometries whose scorecards are there.

    Raises:
        ValueError: if none is.
    """
    results, thirds = {}, {}
    for geometry, described in GEOMETRIES.items():
        for found, file in ((results, "scorecard.json"), (thirds, "third/scorecard.json")):
            if (folder / geometry / file).exists():
                found[described.name] = read_json(folder / geometry / file)
    if not results:
        raise ValueError(
            f"expected scorecard.json in a folder of {folder} named {', '.join(GEOMETRIES)}, found none; "
            "`python -m predictor.scorecard --out` writes one"
        )
    thirds = {name: third for name, third in thirds.items() if name in results}
    parts = [by_horizon(results), by_batch(results)]
    parts += [by_training(results, thirds)] if thirds else []
    return "\n\n".join("\n".join(part) for part in parts)


def main() -> None:
    """Runs the command line; see `layerscope_jax.support.exits`."""
    exits.end(lambda args: print(tables(tyro.cli(Options, description=__doc__, args=args).folder)))
