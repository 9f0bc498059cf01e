"""What `bench_growth` makes of its measurements: growth of time by growth of work, tables, a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import harness
from layerscope_jax.support.files import write_file

PHASES = ("prefill", "decode")

CLIFF = 1.5
"""Growth of time by growth of work from which on a step of an axis is one."""


def series(rows: Sequence[dict[str, Any]], axis: str, policy: str) -> list[dict[str, Any]]:
    """One policy's points along an axis."""
    return [row for row in rows if row["axis"] == axis and row["policy"] == policy]


def names(rows: Iterable[dict[str, Any]], key: str) -> list[Any]:
    """What there is under a key, in the order in which it comes first."""
    return list(dict.fromkeys(row[key] for row in rows))


def growth(rows: Sequence[dict[str, Any]], phase: str) -> dict[str, Any]:
    """From one end of an axis to the other, and step by step.

    >>> rows = [{"value": n, "ms": {"decode": {"median": ms}}, "work_ms": {"decode": {"experts": work}}}
    ...     for n, ms, work in ((1, 1.0, 0.5), (2, 1.5, 1.0), (4, 6.0, 2.0))]
    >>> found = growth(rows, "decode")
    >>> found["time"], found["work"], found["time_to_work"]
    (6.0, 4.0, 1.5)
    >>> found["steps"], found["cliffs"]
    ([0.75, 2.0], [[2, 4]])
    """

    def of(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float]:
        work = [sum(row["work_ms"][phase].values()) for row in (before, after)]
        return after["ms"][phase]["median"] / before["ms"][phase]["median"], work[1] / work[0]

    steps = [(before, after, *of(before, after)) for before, after in pairwise(rows)]
    time, work = of(rows[0], rows[-1])
    return {
        "time": time,
        "work": work,
        "time_to_work": time / work,
        "steps": [time / work for _, _, time, work in steps],
        "cliffs": [[a["value"], b["value"]] for a, b, time, work in steps if time > CLIFF * work],
    }


def growths(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every axis, policy and phase."""
    return [
        {"axis": axis, "policy": policy, "phase": phase} | growth(points, phase)
        for axis in names(rows, "axis")
        for policy in names(rows, "policy")
        if (points := series(rows, axis, policy))
        for phase in PHASES
    ]


def tables(result: dict[str, Any]) -> None:
    rows = result["rows"]
    for axis in names(rows, "axis"):
        policies = [policy for policy in names(rows, "policy") if series(rows, axis, policy)]
        lines = []
        for value in names((row for row in rows if row["axis"] == axis), "value"):
            here = [
                next(row for row in series(rows, axis, policy) if row["value"] == value)
                for policy in policies
            ]
            cells = []
            for phase in PHASES:
                cells += [f"{row['tokens_per_s'][phase]['median']:,.0f}" for row in here]
                cells += [f"{sum(here[0]['work_ms'][phase].values()) / here[0]['ms'][phase]['median']:.2f}"]
            lines.append((value, *cells))
        headings = [f"{phase}: {name}" for phase in PHASES for name in (*policies, "work / time")]
        harness.print_table(f"{axis}: tokens a second, medians", (axis, *headings), lines)
    harness.print_table(
        "From the first value of an axis to the last",
        ("axis", "policy", "phase", "time grows", "work grows", "time / work", "steepest step", "cliffs"),
        (
            (
                found["axis"],
                found["policy"],
                found["phase"],
                f"{found['time']:.2f}",
                f"{found['work']:.2f}",
                f"{found['time_to_work']:.2f}",
                f"{max(found['steps'], default=1.0):.2f}",
                ", ".join(f"{a} to {b}" for a, b in found["cliffs"]) or "-",
            )
            for found in result["growth"]
        ),
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Tokens a second along every axis, a line a policy. Dashed: if time grew as work does."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state left behind

    rows = result["rows"]
    axes = names(rows, "axis")
    figure = Figure(figsize=(1 + 2.6 * len(axes), 5.4), layout="constrained")
    panels = figure.subplots(len(PHASES), len(axes), squeeze=False)
    for line, phase in zip(panels, PHASES, strict=True):
        line[0].set_ylabel(f"{phase}, tokens/s")
        for panel, axis in zip(line, axes, strict=True):
            for number, policy in enumerate(names(rows, "policy")):
                points = series(rows, axis, policy)
                if not points:
                    continue
                values = [str(row["value"]) for row in points]
                rates = [row["tokens_per_s"][phase]["median"] for row in points]
                panel.plot(values, rates, ".-", color=f"C{number}", linewidth=1, label=policy)
                # Tokens by work, through the first point.
                pace = [
                    rate * row["ms"][phase]["median"] / sum(row["work_ms"][phase].values())
                    for rate, row in zip(rates, points, strict=True)
                ]
                as_work = [rates[0] * each / pace[0] for each in pace]
                panel.plot(values, as_work, "--", color=f"C{number}", linewidth=0.6)
            panel.set_yscale("log")
            low, high = panel.get_ylim()
            if high < 4 * low:  # else what differs by noise alone would look like much
                middle = (low * high) ** 0.5
                panel.set_ylim(middle / 2, middle * 2)
            panel.set_title(axis, fontsize=9)
            panel.tick_params(labelsize=7)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=110))
