"""Where is a forecast worth something?

Decode steps of published profiles on the virtual clock, by model, link, batch and device budget: without a
forecast, with those that predictors made when the routing was recorded (the routers' own, "gate", LLaPor's,
and in recordings made with `--linear` a linear map's), and with a perfect one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.worth_view import draw, table
from layerscope_jax import POLICIES, MachineProfile
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.geometry import Geometry
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.simulation.simulator import Workload, simulate

FORECASTS = {"gate": "gate", "linear": "linear", "llapor": "llapor", "perfect": "oracle"}
"""Beside none: names of this table, and of the routing's predictors, of which shipped ones lack "linear"."""

DISK = "disk"
"""As a link."""

DISK_BYTES_PER_S = 3e9
"""Of an NVMe drive over PCIe 3."""

DISK_START_MS = 0.1


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to simulate."""

    models: tuple[str, ...] = ("deepseek-v2-lite", "moonlight", "qwen3-30b-a3b", "mixtral-8x7b")
    links: tuple[str, ...] = ("", "pcie4-x16", "pcie5-x16")
    """Suffixes of profiles; "" for the published PCIe 3 x16. "disk" for that one, of a machine whose memory
    holds half of the experts: simulating it takes minutes."""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    budgets: tuple[int, ...] = (25, 50, 75)
    """Percent of the experts that the device holds."""
    policy: str = "presched"
    steps: int = 8
    """Decode steps, or as many as were recorded."""
    disk_batches: tuple[int, ...] = (4, 16)
    disk_budgets: tuple[int, ...] = (50,)
    disk_steps: int = 4
    """The same with a disk, which takes long to simulate."""
    recordings: Path | None = None
    """Folder of routing to use in place of the shipped one: a file `MODEL.npz` for each model
    (`tools.record_routing`)."""
    plot: Path | None = None
    """Also draws the figure."""


def loaded(model: str, link: str) -> tuple[MachineProfile, HardwareProfile]:
    """A profile, and the costs over a link."""
    profile = MachineProfile.load(f"{model}@{link}" if link not in ("", DISK) else model)
    if link != DISK:
        return profile, profile.costs
    read_ms = 1e3 * profile.model.expert_bytes / DISK_BYTES_PER_S
    return profile, replace(profile.costs, read_ms=read_ms, read_start_ms=DISK_START_MS)


def step_ms(
    options: Options,
    workloads: Sequence[Workload],
    geometry: Geometry,
    costs: HardwareProfile,
    host_slots: int | None,
) -> float:
    """Milliseconds of a decode step, after the prefill."""
    made = POLICIES[options.policy]()
    found = simulate(made, workloads, geometry, costs, host_slots=host_slots)[1]
    return found.total_ms / len(workloads[1].counts)


def cells(model: str, link: str, options: Options) -> list[dict[str, Any]]:
    """Every batch and budget of a model over a link, with every forecast."""
    profile, costs = loaded(model, link)
    if profile.routing is None:
        raise ValueError(f"the profile {model} names no recorded routing")
    if options.recordings is None:
        routing = Routing.shipped(profile.routing)
    else:
        routing = Routing.load(options.recordings / f"{model}.npz")
    forecasts = {name: made for name, made in FORECASTS.items() if made in routing.predictors}
    rows = []
    total = profile.model.num_layers * profile.model.num_experts
    host_slots, steps = (total // 2, options.disk_steps) if link == DISK else (None, options.steps)
    batches = options.disk_batches if link == DISK else options.batches
    budgets = options.disk_budgets if link == DISK else options.budgets
    for batch in batches:
        requests = range(batch)
        tokens = int(routing.prefill_lengths[:batch].sum())
        prefill = Workload(phase="prefill", tokens=tokens, counts=routing.prefill(requests)[None])
        for budget in budgets:
            geometry, times = replace(profile.geometry(), slots=total * budget // 100), {}
            for name in (None, *forecasts):
                made = routing.batch(requests, forecasts[name] if name else "none")
                counts, expected = made.counts[:steps], made.forecasts[:steps] if name else None
                decode = Workload(phase="decode", tokens=batch, counts=counts, forecasts=expected)
                times[name or "none"] = step_ms(options, [prefill, decode], geometry, costs, host_slots)
            rows.append(
                {
                    "model": model,
                    "link": link,
                    "batch": batch,
                    "budget_percent": budget,
                    "step_ms": times,
                    "to_none": {name: times[name] / times["none"] for name in forecasts},
                }
            )
    return rows


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {"links": ("", DISK), "batches": (1, 4), "budgets": (50,), "steps": 2}
        small: Any = {"disk_batches": (1, 4), "disk_steps": 2}
        options = replace(options, models=options.models[:1], **small, **changes)
    record, progress, rows = harness.machine(), Console(stderr=True), []
    try:
        for model in options.models:
            for link in options.links:
                rows += cells(model, link, options)
                progress.print(f"simulated {model} over {link or 'pcie3-x16'}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    result = {
        "benchmark": "worth",
        "quick": options.quick,
        "machine": record,
        "policy": options.policy,
        "steps": options.steps,
        "disk_steps": options.disk_steps,
        "disk_bytes_per_s": DISK_BYTES_PER_S,
        "rows": rows,
    }
    table(rows)
    if options.plot is not None:
        draw(rows, options.plot)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
