"""What accuracy does a predictor need?

Decode steps on the virtual clock, with forecasts of any recall made from the truth, and without a forecast:
where prediction pays, and whether nothing is lost where it does not. Recorded routing of a profile's model,
over its own link and a faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.traffic import traffic
from layerscope_jax import POLICIES, MachineProfile
from layerscope_jax.runtime.lower_bound import ROUNDS, lower_bound_ms
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.simulation.simulator import Workload, simulate
from layerscope_jax.simulation.synthetic_forecasts import forecast_of_recall

PAYS = 0.99
"""A forecast pays where a step takes less than so much of one without."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to simulate."""

    profiles: tuple[str, ...] = tuple(
        model + link for model in ("qwen3-30b-a3b", "mixtral-8x7b") for link in ("", "@pcie5-x16")
    )
    policies: tuple[str, ...] = ("presched", "auto")
    batches: tuple[int, ...] = (4, 16, 64)
    recalls: tuple[int, ...] = (100, 95, 90, 80, 70, 60, 40, 20, 0)
    """Percent; beside them there is always a run without a forecast."""
    look_ahead: int = 4
    steps: int = 12
    """Decode steps."""
    seed: int = 0
    """Of the forecasts."""


def cell(
    profile: MachineProfile, routing: Routing, batch: int, options: Options, rounds: int
) -> list[dict[str, Any]]:
    """One profile and batch: every policy with every forecast."""
    requests = range(batch)
    geometry, costs = profile.geometry(), profile.costs
    tokens = int(routing.prefill_lengths[:batch].sum())
    prefill = Workload(phase="prefill", tokens=tokens, counts=routing.prefill(requests)[None])
    decode = Workload(phase="decode", tokens=batch, counts=routing.batch(requests).counts[: options.steps])
    steps = len(decode.counts)
    bound_ms = lower_bound_ms(decode.counts, batch, geometry, costs, rounds=rounds) / steps
    rows: list[dict[str, Any]] = []
    for policy in options.policies:
        without_ms = 0.0
        for percent in (None, *options.recalls):
            forecasts = None
            if percent is not None:
                forecasts = forecast_of_recall(decode.counts, percent / 100, options.look_ahead, options.seed)
            workloads = [prefill, replace(decode, forecasts=forecasts)]
            found = simulate(POLICIES[policy](), workloads, geometry, costs)[1]
            step_ms = found.total_ms / steps
            if percent is None:
                without_ms = step_ms
            rows.append(
                {
                    "profile": profile.name,
                    "batch": batch,
                    "policy": policy,
                    "recall_percent": percent,
                    "experts_foreseen": found.forecast_recall,
                    "step_ms": step_ms,
                    "to_without": step_ms / without_ms,
                    "share_of_bound": bound_ms / step_ms,
                    "mb_moved_per_step": found.bytes_moved / steps / 1e6,
                    "mb_wasted_per_step": found.bytes_wasted / steps / 1e6,
                    "hit_rate": found.hit_rate,
                    "prefetch_on_time": found.prefetch_on_time,
                }
            )
    return rows


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each profile, batch and policy: from which recall on a forecast pays, and what the worst one costs.

    >>> row = {"profile": "p", "batch": 4, "policy": "auto"}
    >>> times = {None: 1.0, 100: 0.8, 50: 0.9, 0: 1.1}
    >>> verdicts([row | {"recall_percent": r, "to_without": t} for r, t in times.items()])[0]["pays_from"]
    50
    """
    groups: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if row["recall_percent"] is not None:
            key = row["profile"], row["batch"], row["policy"]
            groups.setdefault(key, {})[row["recall_percent"]] = row["to_without"]
    found = []
    for (profile, batch, policy), times in groups.items():
        pays_from = None
        for recall in sorted(times, reverse=True):
            if times[recall] >= PAYS:
                break
            pays_from = recall
        found.append(
            {
                "profile": profile,
                "batch": batch,
                "policy": policy,
                "best": min(times.values()),
                "pays_from": pays_from,
                "worst": max(times.values()),
            }
        )
    return found


def table(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f}%"

    lines = [
        (
            row["profile"],
            row["batch"],
            row["policy"],
            "none" if row["recall_percent"] is None else f"{row['recall_percent']}%",
            percent(row["experts_foreseen"]),
            f"{row['step_ms']:.2f}",
            f"{row['to_without']:.3f}",
            percent(row["share_of_bound"]),
            percent(row["hit_rate"]),
            f"{row['mb_moved_per_step']:.0f}",
            f"{row['mb_wasted_per_step']:.1f}",
        )
        for row in rows
    ]
    headings = ("profile", "batch", "policy", "recall", "experts foreseen", "step ms", "to no forecast")
    more = ("bound / time", "hits", "MB moved a step", "of it in vain")
    harness.print_table("Forecasts of given recall", (*headings, *more), lines)
    lines = [
        (
            row["profile"],
            row["batch"],
            row["policy"],
            f"{row['best']:.3f}",
            "never" if row["pays_from"] is None else f"{row['pays_from']}%",
            f"{row['worst']:.3f}",
        )
        for row in found
    ]
    headings = ("profile", "batch", "policy", "best to no forecast", "pays from a recall of", "worst")
    harness.print_table("Where prediction pays", headings, lines)


def main(options: Options) -> dict[str, Any]:
    rounds = ROUNDS
    if options.quick:
        changes: Any = {"profiles": options.profiles[:1], "batches": (4,), "recalls": (100, 0), "steps": 3}
        options, rounds = replace(options, **changes), 5
    record, progress = harness.machine(), Console(stderr=True)
    rows = []
    try:
        for name in options.profiles:
            profile = MachineProfile.load(name)
            routing, called = traffic(profile, max(options.batches), options.steps)
            for batch in options.batches:
                rows += [{"routing": called} | row for row in cell(profile, routing, batch, options, rounds)]
                progress.print(f"simulated {name} at batch {batch}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    found = verdicts(rows)
    result = {
        "benchmark": "recall",
        "quick": options.quick,
        "machine": record,
        "look_ahead": options.look_ahead,
        "steps": options.steps,
        "seed": options.seed,
        "rows": rows,
        "verdicts": found,
    }
    table(rows, found)
    print(f"\nrouting: {', '.join(sorted({row['routing'] for row in rows}))}")
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
