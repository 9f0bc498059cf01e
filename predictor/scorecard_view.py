"""Prints a scorecard: recall, batches, and conclusions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

FREE = ("popularity", "previous-token", "gate")
"""Predictors that are not trained."""


def show(result: dict[str, Any], console: Console) -> None:
    """Prints a report of `predictor.report.report`."""
    model = result["model"]
    console.print(
        f"{model['family']}, {model['num_layers']} layers of {model['num_experts']} experts, "
        f"{model['experts_per_token']} a token; {result['heldout_rows']:,} held-out tokens. Means over the "
        "layers whose target is in the same step\n",
        highlight=False,
    )
    console.print("Exact top-k recall in %, by layers ahead")
    console.print(recall_table(result))
    console.print(f"In batches of {main_phase(result)} rows, mean over domains")
    console.print(batch_table(result))
    console.print("Recall of as many experts as a batch of B needs, weighed by their tokens, in %")
    console.print(batch_recall_table(result))
    for line in (*verdict(result), *left_out(result)):
        console.print(line, highlight=False)


def main_phase(result: dict[str, Any]) -> str:
    """Returns "decode", or "prefill" if the trace has only prompts."""
    return "decode" if any(row["phase"] == "decode" for row in result["rows"]) else "prefill"


def mean_of(result: dict[str, Any], key: str, **fixed: Any) -> float | None:
    """Returns the mean of a figure over the rows that have the fixed values; None if no row has it."""
    figures = [
        row[key]
        for row in result["rows"]
        if not row["wraps"] and all(row[name] == value for name, value in fixed.items())
    ]
    figures = [value for value in figures if value is not None]
    return float(np.mean(figures)) if figures else None


def names(rows: Iterable[dict[str, Any]], key: str) -> list[Any]:
    """Returns the distinct values, in the order of their first rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def recall_table(result: dict[str, Any]) -> Table:
    """Returns a table with a line for each domain and predictor, at most 80 columns wide."""
    rows, phases = result["rows"], names(result["rows"], "phase")
    table = new_table("domain", "predictor")
    for phase in phases:
        for place, horizon in enumerate(result["horizons"]):
            table.add_column(f"{'' if place else phase}\n{horizon}", justify="right", vertical="bottom")
    for domain in names(rows, "domain"):
        for predictor in names(rows, "predictor"):
            values = [
                percent(mean_of(result, "recall", **fixed(predictor, horizon, phase), domain=domain))
                for phase in phases
                for horizon in result["horizons"]
            ]
            first = predictor == rows[0]["predictor"]
            label = domain + (" *" if domain in result["unseen"] else "")
            table.add_row(label if first else "", predictor, *values)
        table.add_section()
    if result["unseen"]:
        table.caption = "*: nothing of this domain was trained on"
    return table


def batch_table(result: dict[str, Any]) -> Table:
    """Returns a table with a line for each predictor and horizon, at most 80 columns wide."""
    rows, phase = result["rows"], main_phase(result)
    sizes = names(rows, "batch")
    table = new_table("predictor", "ahead")
    for size in sizes:
        for title in (f"B={size}\nprec", "rec", "err"):
            table.add_column(title, justify="right", vertical="bottom")
    table.add_column("calib\nerr", justify="right", vertical="bottom")
    for predictor in names(rows, "predictor"):
        for place, horizon in enumerate(result["horizons"]):
            point = fixed(predictor, horizon, phase)
            figures = [
                mean_of(result, key, **point, batch=size)
                for size in sizes
                for key in ("presence_precision", "presence_recall", "count_error_relative")
            ]
            cells = ["-" if figure is None else f"{100 * figure:.0f}" for figure in figures]
            errors = [
                row["error"]
                for row in result["calibration"]
                if all(row[name] == value for name, value in point.items())
            ]
            table.add_row("" if place else predictor, str(horizon), *cells, f"{np.mean(errors):.3f}")
        table.add_section()
    table.caption = (
        "prec, rec: of the experts present in a batch of B, in %; err: of an expert's expected tokens, in % "
        "of their mean; calib err: of the probabilities"
    )
    return table


def batch_recall_table(result: dict[str, Any]) -> Table:
    """Returns a table with a line for each predictor and horizon, and a column for each batch size."""
    rows, phase = result["rows"], main_phase(result)
    sizes = names(rows, "batch")
    table = new_table("predictor", "ahead", *(f"B={size}" for size in sizes))
    for predictor in names(rows, "predictor"):
        for place, horizon in enumerate(result["horizons"]):
            point = fixed(predictor, horizon, phase)
            figures = [percent(mean_of(result, "batch_recall", **point, batch=size)) for size in sizes]
            table.add_row("" if place else predictor, str(horizon), *figures)
        table.add_section()
    return table


def fixed(predictor: str, horizon: int, phase: str) -> dict[str, Any]:
    return {"predictor": predictor, "horizon": horizon, "phase": phase}


def verdict(result: dict[str, Any]) -> list[str]:
    """Returns sentences on LLaPor's smallest lead over the others, its seeds and its relaxed recall."""
    trained = [name for name in names(result["rows"], "predictor") if name.startswith("llapor")]
    lines = []
    for what, others in (("all that is untrained", FREE), ("the gate", ("gate",)), ("linear", ("linear",))):
        leads = []
        for horizon in result["horizons"]:
            margin, domain, phase = min(margins(result, trained, others, horizon))
            leads.append(f"{100 * margin:+.1f} {horizon} ahead ({domain}, {phase})")
        lines.append(f"LLaPor's lead over {what}, in points of recall, is least: {', '.join(leads)}.")
    if len(trained) > 1:
        points = 100 * spread(result, trained)
        lines.append(f"The recalls of the {len(trained)} LLaPors differ by {points:.1f} points at most.")
    phase = main_phase(result)
    relaxed = (
        f"{percent(mean_of(result, 'relaxed_recall', **fixed(trained[0], horizon, phase)))} {horizon} ahead"
        for horizon in result["horizons"]
    )
    lines.append(
        "By the paper's relaxed measure, the 2K/3 likeliest counted inside the true K, LLaPor would have "
        f"{', '.join(relaxed)} (%, {phase})."
    )
    return lines


def places(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns every domain and phase that has rows."""
    return list(dict.fromkeys((row["domain"], row["phase"]) for row in result["rows"]))


def margins(
    result: dict[str, Any], trained: Sequence[str], others: Sequence[str], horizon: int
) -> list[tuple[float, str, str]]:
    """Returns the lead in recall of the trained predictors' mean over the best of the others."""
    leads = []
    for domain, phase in places(result):

        def recall(name: str, domain: str = domain, phase: str = phase) -> float:
            return mean_of(result, "recall", **fixed(name, horizon, phase), domain=domain) or 0.0

        ours = sum(map(recall, trained)) / len(trained)
        leads.append((ours - max(map(recall, others)), domain, phase))
    return leads


def spread(result: dict[str, Any], trained: Sequence[str]) -> float:
    """Returns the largest difference of two trained predictors' recalls in any domain, phase and horizon."""
    values = [
        [mean_of(result, "recall", **fixed(name, horizon, phase), domain=domain) or 0.0 for name in trained]
        for domain, phase in places(result)
        for horizon in result["horizons"]
    ]
    return max(max(recalls) - min(recalls) for recalls in values)


def left_out(result: dict[str, Any]) -> list[str]:
    """Returns sentences on the batches that could not be formed."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for row in result["left_out"]:
        sizes.setdefault((row["phase"], f"{row['domain']} ({row['passages']})"), []).append(str(row["batch"]))
    domains: dict[tuple[str, str], list[str]] = {}
    for (phase, domain), missing in sizes.items():
        domains.setdefault((phase, ", ".join(missing)), []).append(domain)
    return [
        f"Too few passages for batches of {missing} in {phase}: {', '.join(places)}."
        for (phase, missing), places in domains.items()
    ]


def percent(share: float | None) -> str:
    """Returns a share in %; a dash for None.

    >>> percent(0.8766), percent(1.0), percent(None)
    ('87.7', '100', '-')
    """
    if share is None:
        return "-"
    return "100" if share >= 0.9995 and share < 1.0005 else f"{100 * share:.1f}"


def new_table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in columns:
        table.add_column(column, vertical="bottom", no_wrap=True)
    return table
