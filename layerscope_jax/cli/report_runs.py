"""Runs of a report: what timelines hold of each, which slices are drawn, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerscope_jax.runtime.timeline_figures import Event, Figures, figures_of, lane_and_kind
from layerscope_jax.runtime.timeline_files import read_timeline

Range = tuple[int, int] | None
"""First and last of some numbers; None for all."""


@dataclass(frozen=True)
class Run:
    """A process of a timeline.

    Attributes:
        name, clock, left_out, outcomes: see `layerscope_jax.runtime.timeline.Recording`.
        slices: its slices.
        figures: their figures.
    """

    name: str
    clock: str
    left_out: int
    outcomes: Sequence[Mapping[str, Any]]
    slices: Sequence[Event]
    figures: Figures

    @property
    def title(self) -> str:
        """Name with the kind of clock."""
        return f"{self.name} ({'simulated' if self.clock == 'virtual' else 'measured'})"


def runs_of(file: Path) -> list[Run]:
    """Returns the runs of a timeline.

    Raises:
        ValueError: if the file is no timeline.
    """
    content = read_timeline(file)
    slices: dict[Any, list[Event]] = {process["pid"]: [] for process in content["otherData"]["processes"]}
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            slices[event["pid"]].append(event)
    return [
        Run(
            str(process["name"]),
            str(process.get("clock")),
            int(process.get("left_out", 0)),
            process.get("outcomes", ()),
            slices[process["pid"]],
            figures_of(slices[process["pid"]]),
        )
        for process in content["otherData"]["processes"]
    ]


def drawn(run: Run, steps: Range, most: int) -> tuple[list[Event], str]:
    """Returns the slices of a run to be drawn, and what is left out, in words; empty if nothing is.

    Args:
        run: the run.
        steps: its steps; None for as many, from the first on, as have `most` slices, but one at least.
        most: see `steps`.
    """
    if steps is not None:
        kept = [event for event in run.slices if steps[0] <= event["args"]["step"] <= steps[1]]
        return kept, f"steps {steps[0]} to {steps[1]} are drawn, as asked for"
    if len(run.slices) <= most:
        return list(run.slices), ""
    counts: dict[int, int] = {}
    for event in run.slices:
        counts[event["args"]["step"]] = counts.get(event["args"]["step"], 0) + 1
    total, last = 0, min(counts)
    for step in sorted(counts):
        total += counts[step]
        if total > most:
            break
        last = step
    kept = [event for event in run.slices if event["args"]["step"] <= last]
    return kept, f"steps up to {last} are drawn, of {max(counts)}; --steps FIRST:LAST draws others"


def window(slices: Sequence[Event], layers: Range) -> tuple[float, float]:
    """Returns the time (us) from the beginning of the first to the end of the last slice of some layers.

    Args:
        slices: the slices.
        layers: the layers; None for everything.
    """
    chosen = [
        event
        for event in slices
        if layers is None
        or (lane_and_kind(event)[1] == "layer" and layers[0] <= event["args"]["layer"] <= layers[1])
    ] or slices
    return (
        min((event["ts"] for event in chosen), default=0.0),
        max((event["ts"] + event["dur"] for event in chosen), default=1.0),
    )


def unknown(run: Run) -> list[str]:
    """Returns what is not known of a run, and why, in sentences."""
    figures, sentences = run.figures, []
    steps = sum(figures.steps.values())
    whole = sum(lane_and_kind(event)[1] == "whole step" for event in run.slices)
    if not run.slices:
        return ["No step was recorded."]
    if whole:
        sentences.append(
            f"{whole} of {steps} steps ran as one program each: of their layers nothing is known, and lanes "
            "show the whole step."
        )
    if run.left_out:
        sentences.append(
            f"{run.left_out:,} slices of the beginning made way for later ones; lanes and figures by layer "
            "cover what is left, the statistics the whole run."
        )
    if not any(layer.foreseeable for layer in figures.layers):
        sentences.append("No decode step that was planned had a forecast, so there is no recall.")
    if run.outcomes and all(outcome.get("share_of_bound") is None for outcome in run.outcomes):
        sentences.append("The share of the lower bound was not asked for (layerscope generate --bound).")
    if not run.outcomes:
        sentences.append("The file holds no statistics of it.")
    return sentences
