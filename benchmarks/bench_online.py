"""Does tuning on recent tokens help when the traffic changes, and does it do harm when it changes back?

Held-out passages of one domain, then of another, then others of the first, then others of the second, go past
a predictor as a stream of rows: once with tuning, once without. Errors are of rows before they are learned
from. Needs a recorded trace (`layerscope trace`).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import predictor
from benchmarks import harness
from layerscope_jax.prediction.traces import Trace
from predictor.dataset import load_rows
from predictor.routers import Routers
from predictor.step import Batch
from predictor.train import batch_of
from predictor.tuning import CHECK_EVERY, Tuner, TuningConfig, part

TUNING = TuningConfig()

BLOCK = 2 * CHECK_EVERY
"""Rows of the shortest part of a stream, of which errors are told in halves."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    traces: Path
    """Folder made by `layerscope trace`."""
    predictor: Path = predictor.SHIPPED
    domains: tuple[str, str] = ("speeches", "instructions")
    """Before the change and after it."""
    rows: int = 4096
    """Of the second domain; half as many of the first one before it and after it, and of the second again."""
    threshold: float = TUNING.threshold
    window: int = TUNING.window


def rows_of(trace: Trace, domain: str, most: int) -> Batch:
    """Held-out rows of a domain as NumPy arrays, in order."""
    rows = load_rows(
        trace, lambda p: p.split == "heldout" and p.domain == domain, most=most, what=f"rows of {domain}"
    )
    return jax.tree.map(np.asarray, batch_of(rows, np.arange(len(rows))))


def streams(options: Options, trace: Trace) -> list[Batch]:
    """The first domain's rows, the second's, others of the first, others of the second; whole blocks, as many
    as there are.

    Raises:
        ValueError: if a domain has too few.
    """
    most, domains = 1024 if options.quick else options.rows, options.domains
    first, second = (
        rows_of(trace, domain, most * (2 + number) // 2) for number, domain in enumerate(domains)
    )
    half, third = (
        len(rows.has_next) // (2 + number) // BLOCK * BLOCK for number, rows in enumerate((first, second))
    )
    if min(half, third) < BLOCK:
        raise ValueError(
            f"expected {2 * BLOCK} held-out rows of {domains[0]} and {3 * BLOCK} of {domains[1]} or more, "
            f"got {len(first.has_next)} and {len(second.has_next)}; record more text"
        )
    return [
        part(first, slice(half)),
        part(second, slice(2 * third)),
        part(first, slice(half, 2 * half)),
        part(second, slice(2 * third, 3 * third)),
    ]


def spans_of(lengths: list[int]) -> dict[str, tuple[int, int]]:
    """Where in the stream is what: the rows from the first to before the last.

    >>> spans_of([64, 256, 128, 128])
    {'before': (0, 64), 'just after': (64, 128), 'later': (128, 256), 'at the end': (256, 320), ...
    """
    change, back, again, end = np.cumsum(lengths).tolist()
    quarter, half, last = lengths[1] // 4, lengths[2] // 2, lengths[3] // 2
    return {
        "before": (0, change),
        "just after": (change, change + quarter),
        "later": (change + quarter, back - quarter),
        "at the end": (back - quarter, back),
        "just back": (back, back + half),
        "back": (back + half, again),
        "just again": (again, again + last),
        "again": (again + last, end),
    }


def most_lost(tuned: dict[str, Any], untuned: dict[str, Any]) -> dict[str, float]:
    """The most that tuning adds to the error of a span.

    >>> most_lost({"error": {"before": 0.1, "back": 0.13}}, {"error": {"before": 0.1, "back": 0.11}})
    {'error': 0.02}
    """
    return {
        name: round(max(tuned[name][span] - error for span, error in untuned[name].items()), 6)
        for name in ("error", "error_ahead")
        if name in untuned
    }


def run(config: TuningConfig, options: Options, stream: list[Batch]) -> dict[str, Any]:
    """What one pass over the stream gives: errors by span, one layer ahead and over all horizons."""
    tuner = Tuner(predictor.load(options.predictor), Routers.load(options.traces), config)
    began = time.perf_counter()
    for rows in stream:
        tuner.feed(rows)
    seconds, looks = time.perf_counter() - began, tuner.looks
    errors: dict[str, dict[str, float]] = {"error": {}, "error_ahead": {}}
    for span, (first, last) in spans_of([len(rows.has_next) for rows in stream]).items():
        here = [look for look in looks if first < look.rows <= last]
        for name, found in errors.items():
            found[span] = float(np.mean([getattr(look, name) for look in here]))
    return errors | {
        "tried": sum(look.tried for look in looks),
        "accepted": sum(look.accepted for look in looks),
        "returned": sum(look.returned for look in looks),
        "resumed": sum(look.resumed for look in looks),
        "seconds": seconds,
        "tries": [look.to_json() for look in looks if look.tried or look.returned or look.resumed],
    }


def main(options: Options) -> dict[str, Any]:
    try:
        stream = streams(options, Trace.open(options.traces))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    tuning = TuningConfig(threshold=options.threshold, window=1024 if options.quick else options.window)
    settings = {"without tuning": replace(tuning, threshold=1.0), "with tuning": tuning}
    rows = [{"name": name} | run(config, options, stream) for name, config in settings.items()]
    record = harness.machine()
    spans = spans_of([len(part.has_next) for part in stream])
    first, second = options.domains
    harness.print_table(
        f"Error in %, one layer ahead / all horizons: {first}, {second}, {first}, {second}",
        ("", *spans, "tried", "kept", "returned", "resumed", "seconds"),
        [
            (
                row["name"],
                *(f"{100 * row['error'][span]:.1f} / {100 * row['error_ahead'][span]:.1f}" for span in spans),
                *(row[name] for name in ("tried", "accepted", "returned", "resumed")),
                f"{row['seconds']:.0f}",
            )
            for row in rows
        ],
    )
    result = {
        "benchmark": "online",
        "quick": options.quick,
        "machine": record,
        "predictor": str(options.predictor),
        "domains": options.domains,
        "spans": spans,
        "tuning": asdict(tuning),
        "most_lost": most_lost(rows[1], rows[0]),
        "rows": rows,
    }
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
