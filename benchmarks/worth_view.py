"""What `bench_worth` makes of its times: a table, and the figure of where prediction pays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness

LINKS = {"": "PCIe 3 x16", "pcie4-x16": "PCIe 4 x16", "pcie5-x16": "PCIe 5 x16", "disk": "half on a disk"}

MOST = 15
"""Percent of a step's time, saved or lost, from which on the colour says no more."""


def saved(row: dict[str, Any], forecast: str) -> float:
    """Percent of a step's time that a forecast saves.

    >>> round(saved({"to_none": {"llapor": 0.93}}, "llapor"))
    7
    """
    return 100 * (1 - row["to_none"][forecast])


def table(rows: Sequence[dict[str, Any]]) -> None:
    names = max((tuple(row["to_none"]) for row in rows), key=len)
    lines = [
        (
            row["model"],
            LINKS[row["link"]],
            row["batch"],
            f"{row['budget_percent']}%",
            f"{row['step_ms']['none']:.1f}",
            *(f"{saved(row, name):+.1f}%" if name in row["to_none"] else "-" for name in names),
        )
        for row in rows
    ]
    heads = ("model", "link", "batch", "budget", "no forecast, ms a step", *names)
    harness.print_table("Time that a forecast saves", heads, lines)


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """A field for every model and link: what LLaPor saves, and in brackets what a perfect forecast would."""
    from matplotlib import pyplot

    models, links = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "link"))
    batches, budgets = (sorted({row[key] for row in rows}) for key in ("batch", "budget_percent"))
    size = (2.6 * len(links) + 0.6, 1.7 * len(models) + 0.6)
    figure, fields = pyplot.subplots(
        len(models), len(links), figsize=size, squeeze=False, layout="constrained"
    )
    for model, line in zip(models, fields, strict=True):
        for link, field in zip(links, line, strict=True):
            found = {
                (row["budget_percent"], row["batch"]): row
                for row in rows
                if (row["model"], row["link"]) == (model, link)
            }
            values = np.full((len(budgets), len(batches)), np.nan)
            for at, row in found.items():
                values[budgets.index(at[0]), batches.index(at[1])] = saved(row, "llapor")
            field.imshow(values, cmap="RdYlGn", vmin=-MOST, vmax=MOST, origin="lower", aspect="auto")
            for y, budget in enumerate(budgets):
                for x, batch in enumerate(batches):
                    if (budget, batch) not in found:
                        continue
                    most = saved(found[budget, batch], "perfect")
                    field.text(x, y, f"{values[y, x]:+.0f} ({most:+.0f})", ha="center", va="center", size=8)
            field.set_xticks(range(len(batches)), batches)
            field.set_yticks(range(len(budgets)), [f"{budget}%" for budget in budgets])
            if model == models[0]:
                field.set_title(LINKS[link], size=10)
            if link == links[0]:
                field.set_ylabel(f"{model}\nbudget", size=9)
            if model == models[-1]:
                field.set_xlabel("requests in a batch", size=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
