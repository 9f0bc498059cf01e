"""Does tuning on recent tokens help when the traffic changes?

Held-out passages of one domain, then of another, go past the predictor as a stream of rows. Its error, one
minus the exact recall one layer ahead, is taken before a row is learned from; once with tuning, once without.
Needs a recorded trace (`layerscope trace`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import predictor
from benchmarks import harness
from layerscope_jax.traces import Trace
from predictor.dataset import load_rows
from predictor.routers import Routers
from predictor.step import Batch
from predictor.train import batch_of
from predictor.tuning import Look, Tuner, TuningConfig


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    traces: Path
    """Folder made by `layerscope trace`."""
    predictor: Path = predictor.SHIPPED
    domains: tuple[str, str] = ("speeches", "instructions")
    """Before the change and after it."""
    rows: int = 8192
    """Of each domain, at most."""
    threshold: float = 0.05
    window: int = 4096
    steps: int = 16
    learning_rate: float = 5e-4


def rows_of(trace: Trace, domain: str, most: int) -> Batch:
    """Held-out rows of a domain as NumPy arrays, in order."""
    rows = load_rows(
        trace, lambda p: p.split == "heldout" and p.domain == domain, most=most, what=f"rows of {domain}"
    )
    return jax.tree.map(np.asarray, batch_of(rows, np.arange(len(rows))))


def run(options: Options, streams: list[Batch], threshold: float) -> tuple[list[Look], float]:
    """Every look at the stream, and the seconds it took."""
    config = TuningConfig(
        window=options.window,
        threshold=threshold,
        steps=options.steps,
        learning_rate=options.learning_rate,
    )
    tuner = Tuner(predictor.load(options.predictor), Routers.load(options.traces), config)
    began = time.perf_counter()
    for stream in streams:
        tuner.feed(stream)
    return list(tuner.looks), time.perf_counter() - began


def main(options: Options) -> dict[str, Any]:
    most = 1024 if options.quick else options.rows
    trace = Trace.open(options.traces)
    streams = [rows_of(trace, domain, most) for domain in options.domains]
    change = len(streams[0].has_next)
    end = change + len(streams[1].has_next)
    part = (end - change) // 4
    spans = {
        "before": (0, change),
        "just after": (change, change + part),
        "later": (change + part, end - part),
        "at the end": (end - part, end),
    }
    rows = []
    for name, threshold in (("without tuning", 1.0), ("with tuning", options.threshold)):
        looks, seconds = run(options, streams, threshold)
        errors = {
            span: float(np.mean([look.error for look in looks if first < look.rows <= last]))
            for span, (first, last) in spans.items()
        }
        tried = sum(look.tried for look in looks)
        accepted = sum(look.accepted for look in looks)
        rows.append({"name": name, "error": errors, "tried": tried, "accepted": accepted, "seconds": seconds})
    record = harness.machine()
    harness.print_table(
        f"Error in %, {options.domains[0]} and then {options.domains[1]}, {end:,} rows",
        ("", *spans, "tried", "kept", "seconds"),
        [
            (
                row["name"],
                *(f"{100 * row['error'][span]:.2f}" for span in spans),
                row["tried"],
                row["accepted"],
                f"{row['seconds']:.0f}",
            )
            for row in rows
        ],
    )
    print("\n" + harness.describe(record))
    result = {
        "benchmark": "online",
        "quick": options.quick,
        "machine": record,
        "domains": options.domains,
        "rows": rows,
        "change_at": change,
        "end_at": end,
    }
    if options.json is not None:
        harness.write_json(options.json, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
