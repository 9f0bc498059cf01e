"""Plots of a scorecard, one for each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax.support.files import replace_files
from predictor.scorecard_view import main_phase, names


def need_matplotlib() -> None:
    """Raises ValueError that says what to install, if plots cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(
            "plots need matplotlib, which is not installed: pip install 'layerscope-jax[plot]', or draw none"
        ) from None


def draw(result: dict[str, Any], folder: Path) -> None:
    """Writes the plots of a report of `predictor.report.report` into a folder, as PNG.

    All are of one phase, means over the domains.
    """
    need_matplotlib()
    plots = {"recall_by_layer": by_layer, "calibration": calibration, "recall_by_bytes": by_bytes}
    figures = {f"{name}.png": plot(result) for name, plot in plots.items()}
    writers = {
        name: lambda file, figure=figure: figure.savefig(file, format="png", dpi=110)
        for name, figure in figures.items()
    }
    replace_files(folder, writers)


def by_layer(result: dict[str, Any]) -> Any:
    """How good is each predictor's recall, by layer?"""
    horizons = result["horizons"]

    def line(axis: Any, predictor: str, horizon: int, _: int) -> tuple[Sequence[float], Sequence[float]]:
        recall = mean_over_domains(result, "layers", "recall", predictor=predictor, horizon=horizon)[0]
        inside = len(recall) - horizon
        return range(inside), recall[:inside]

    return grid(
        result,
        [(horizon, 0) for horizon in horizons],
        line,
        title=lambda horizon, _: f"{horizon} ahead",
        labels=("from layer", "exact recall"),
        columns=min(2, len(horizons)),
    )


def calibration(result: dict[str, Any]) -> Any:
    """How often are experts chosen, by their predicted probability?"""
    horizons = result["horizons"]

    def line(axis: Any, predictor: str, horizon: int, _: int) -> tuple[Sequence[float], Sequence[float]]:
        axis.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        bins = [
            tenth
            for row in chosen(result, "calibration", predictor=predictor, horizon=horizon)
            for tenth in row["bins"]
            if tenth["count"]
        ]
        sums: dict[int, np.ndarray] = {}
        for tenth in bins:
            place = min(9, int(10 * tenth["probability"]))
            values = tenth["count"] * np.array([1.0, tenth["probability"], tenth["observed"]])
            sums[place] = sums.get(place, np.zeros(3)) + values
        means = [sums[place][1:] / sums[place][0] for place in sorted(sums)]
        return [mean[0] for mean in means], [mean[1] for mean in means]

    return grid(
        result,
        [(horizon, 0) for horizon in horizons],
        line,
        title=lambda horizon, _: f"{horizon} ahead",
        labels=("probability", "share that came true"),
        columns=min(2, len(horizons)),
    )


def by_bytes(result: dict[str, Any]) -> Any:
    """What share of a batch's choices is covered, by the number of prefetched experts?"""
    sizes = names(result["waste"], "batch")

    def line(axis: Any, predictor: str, horizon: int, size: int) -> tuple[Sequence[float], Sequence[float]]:
        (covered,) = mean_over_domains(
            result, "waste", "covered", predictor=predictor, horizon=horizon, batch=size
        )
        return range(1, len(covered) + 1), covered

    return grid(
        result,
        [(horizon, size) for horizon in result["horizons"] for size in sizes],
        line,
        title=lambda horizon, size: f"{horizon} ahead, batch {size}",
        labels=("experts moved", "share of choices covered"),
        columns=len(sizes),
    )


def chosen(result: dict[str, Any], part: str, **fixed: Any) -> list[dict[str, Any]]:
    """Records of a part of the report with these values, of the main phase."""
    fixed["phase"] = main_phase(result)
    return [row for row in result[part] if all(row[name] == value for name, value in fixed.items())]


def mean_over_domains(result: dict[str, Any], part: str, key: str, **fixed: Any) -> np.ndarray:
    """[1, ...] of a list that records hold; empty lists where there is none."""
    values = [np.array(row[key], float) for row in chosen(result, part, **fixed)]
    return np.mean(values, 0)[None] if values else np.zeros((1, 0))


def grid(
    result: dict[str, Any],
    panels: Sequence[tuple[int, int]],
    line: Callable[[Any, str, int, int], tuple[Sequence[float], Sequence[float]]],
    *,
    title: Callable[[int, int], str],
    labels: tuple[str, str],
    columns: int,
) -> Any:
    """A panel for each horizon (and batch size), in each a line for each predictor; one legend.

    Args:
        result: of the scorecard.
        panels: horizon and size of each.
        line: gives x and y.
        title: of a panel.
        labels: of the axes.
        columns: of panels.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no state left behind

    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 3.2 * columns, 0.8 + 2.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, predictor in enumerate(names(result["rows"], "predictor")):
            x, y = line(axis, predictor, *panel)
            dashes = "--" if predictor == "oracle" else "-"
            axis.plot(
                x, y, dashes, color=f"C{number}", marker=".", markersize=3, linewidth=1, label=predictor
            )
        axis.set_title(title(*panel), fontsize=9)
        axis.set_ylim(0, 1.03)
    for axis in axes[-1]:
        axis.set_xlabel(labels[0])
        axis.locator_params("x", integer=labels[0] != "probability")
    for axis in axes[:, 0]:
        axis.set_ylabel(labels[1])
    handles, predictors = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        predictors,
        loc="outside upper center",
        ncols=min(6, len(predictors)),
        fontsize=8,
        frameon=False,
        title=f"{main_phase(result)} rows, mean over domains",
        title_fontsize=8,
    )
    return figure
