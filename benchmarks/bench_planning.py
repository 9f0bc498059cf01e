"""How long does it take to plan a layer?

Each policy is run on the virtual clock, over routing of a model's shape and within its budget; some of the
states and observations that it met in decode are kept, and planned again, timed. Forecasts are of recall 0.9.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.traffic import made_up
from layerscope_jax import POLICIES, LayerPlan, MachineProfile, Policy
from layerscope_jax.scheduling.plan import Observation
from layerscope_jax.scheduling.registry import FORECASTING
from layerscope_jax.simulation.simulator import Workload, simulate
from layerscope_jax.simulation.synthetic_forecasts import forecast_of_recall

RECALL = 0.9

SHAPES = {"qwen3-30b-a3b": 2100, "mixtral-8x7b": 88, "deepseek-v2-lite": 570}
"""Profiles of 128 experts of which a token takes 8, 8 of which 2, and 64 of which 6; a third is resident."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to time."""

    profiles: tuple[str, ...] = tuple(SHAPES)
    policies: tuple[str, ...] = tuple(name for name in POLICIES if name != "resident")
    look_aheads: tuple[int, ...] = (2, 8)
    """W of the forecasts; policies that make no use of them are timed once."""
    batch: int = 64
    scenes: int = 200
    """Layers that are planned, of the last steps of the run."""
    steps: int = 12
    """Decode steps simulated."""
    rounds: int = 5


class Camera:
    """A policy, with what it was given for its last decode layers."""

    def __init__(self, policy: Policy):
        self.policy, self.scenes = policy, list[tuple[Any, Observation]]()
        self.name, self.uses_costs, self.init = policy.name, policy.uses_costs, policy.init

    def plan(self, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
        if seen.phase == "decode":
            # The books go on; what they were is kept.
            kept = replace(seen, resident=set(seen.resident), in_flight=set(seen.in_flight))
            self.scenes.append((state, kept))
        return self.policy.plan(state, seen)


def scenes(
    policy: str, profile: MachineProfile, workloads: Sequence[Workload], count: int
) -> list[tuple[Any, Observation]]:
    """The last states and observations of a simulated run."""
    camera = Camera(POLICIES[policy]())
    simulate(camera, workloads, profile.geometry(SHAPES.get(profile.name)), profile.costs)
    return camera.scenes[-count:]


def microseconds(policy: Policy, found: Sequence[tuple[Any, Observation]], rounds: int) -> list[float]:
    """Of each scene: the median over rounds, after one that is not timed."""
    times = np.zeros((rounds + 1, len(found)))
    for row in times:
        for index, (state, seen) in enumerate(found):
            began = time.perf_counter()
            policy.plan(state, seen)
            row[index] = 1e6 * (time.perf_counter() - began)
    return np.median(times[1:], 0).tolist()


def cell(profile: MachineProfile, options: Options) -> list[dict[str, Any]]:
    """Every policy at one shape."""
    model, batch = profile.model, options.batch
    requests = range(batch)
    routing = made_up(model, batch, options.steps, seed=0)
    tokens = int(routing.prefill_lengths.sum())
    prefill = Workload(phase="prefill", tokens=tokens, counts=routing.prefill(requests)[None])
    decode = Workload(phase="decode", tokens=batch, counts=routing.batch(requests).counts)
    rows: list[dict[str, Any]] = []
    for policy in options.policies:
        for ahead in options.look_aheads if policy in FORECASTING else (None,):
            forecasts = None
            if ahead is not None:
                forecasts = forecast_of_recall(decode.counts, RECALL, ahead, seed=0)
            workloads = [prefill, replace(decode, forecasts=forecasts)]
            row: dict[str, Any] = {
                "experts": model.num_experts,
                "choices": model.experts_per_token,
                "policy": policy,
                "look_ahead": ahead,
            }
            try:
                found = scenes(policy, profile, workloads, options.scenes)
            except ValueError as error:
                rows.append(row | {"refused": str(error)})
                continue
            times = microseconds(POLICIES[policy](), found, options.rounds)
            seen = [observation for _, observation in found]
            rows.append(
                row
                | {
                    "assignments": sum(seen[-1].demand.values()),
                    "active": float(np.mean([len(one.demand) for one in seen])),
                    "resident": float(np.mean([len(one.resident) for one in seen])),
                    "in_flight": float(np.mean([len(one.in_flight) for one in seen])),
                    "us": harness.spread(times),
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        start = (f"{row['experts']}, {row['choices']} a token", row["policy"], row["look_ahead"] or "-")
        if "refused" in row:
            lines.append((*start, "budget too small", "", "", ""))
            continue
        lines.append(
            (
                *start,
                f"{row['us']['median']:.0f} ({row['us']['p90']:.0f})",
                f"{row['active']:.0f}",
                f"{row['resident']:.0f}",
                f"{row['in_flight']:.1f}",
            )
        )
    headings = ("experts", "policy", "look-ahead", "µs a layer (p90)", "active", "resident", "on the link")
    harness.print_table("Time to plan a layer", headings, lines)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {
            "profiles": options.profiles[:1],
            "look_aheads": options.look_aheads[:1],
            "batch": 4,
            "scenes": 4,
            "steps": 1,
            "rounds": 1,
        }
        options = replace(options, **changes)
    record, progress = harness.machine(), Console(stderr=True)
    rows = []
    try:
        for name in options.profiles:
            rows += [{"profile": name} | row for row in cell(MachineProfile.load(name), options)]
            progress.print(f"timed the shape of {name}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    result = {
        "benchmark": "planning",
        "quick": options.quick,
        "machine": record,
        "batch": options.batch,
        "scenes": options.scenes,
        "rounds": options.rounds,
        "rows": rows,
    }
    table(rows)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
