"""How much of the way to the lower bound is that it knows the future?

Decode steps of published profiles: the bound that knows all demand, the one that knows some layers ahead and
of the rest how often each expert is asked for, and PreSched; on the recorded demand, with the forecasts that
were recorded, and on demand drawn by the second bound's law, with perfect forecasts as far as it knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from layerscope_jax import POLICIES, MachineProfile
from layerscope_jax.runtime.lower_bound import ROUNDS, lower_bound_ms
from layerscope_jax.simulation.causal_bound import causal_bound_ms
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.simulation.simulator import Workload, simulate
from layerscope_jax.simulation.synthetic_forecasts import forecast_of_recall


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to compare."""

    profiles: tuple[str, ...] = ("mixtral-8x7b",)
    batches: tuple[int, ...] = (4, 16, 64)
    look_ahead: int = 8
    """Layers that the second bound knows ahead."""
    seed: int = 0
    """Of the demand that is drawn."""


def drawn(counts: np.ndarray, seed: int) -> np.ndarray:
    """Demand [S, L, E] with each layer's steps in a random order of its own."""
    random = np.random.default_rng(seed)
    return np.stack([layer[random.permutation(len(layer))] for layer in counts.swapaxes(0, 1)], 1)


def cell(profile: MachineProfile, routing: Routing, batch: int, options: Options) -> dict[str, Any]:
    """A batch of a profile: milliseconds of a step."""
    geometry, costs, requests = profile.geometry(), profile.costs, range(batch)
    recorded, forecasts = routing.batch(requests, "llapor")
    tokens = int(routing.prefill_lengths[:batch].sum())
    prefill = Workload(phase="prefill", tokens=tokens, counts=routing.prefill(requests)[None])
    if options.quick:
        recorded, forecasts = recorded[:2], forecasts[:2]
    steps, rounds = len(recorded), 20 if options.quick else ROUNDS

    def presched(counts: np.ndarray, forecasts: np.ndarray) -> float:
        decode = Workload(phase="decode", tokens=batch, counts=counts, forecasts=forecasts)
        return simulate(POLICIES["presched"](), [prefill, decode], geometry, costs)[1].total_ms / steps

    law = drawn(recorded, options.seed)
    knows = causal_bound_ms(recorded, batch, geometry, costs, options.look_ahead, rounds=rounds)
    return {
        "profile": profile.name,
        "batch": batch,
        "steps": steps,
        "bound_ms": lower_bound_ms(recorded, batch, geometry, costs, rounds=rounds) / steps,
        "causal_bound_ms": knows / steps,
        "presched_ms": presched(recorded, forecasts),
        "presched_drawn_ms": presched(law, forecast_of_recall(law, 1.0, options.look_ahead, options.seed)),
    }


def table(rows: Sequence[dict[str, Any]], look_ahead: int) -> None:
    lines = []
    for row in rows:
        bound = max(row["bound_ms"], row["causal_bound_ms"])
        lines.append(
            (
                row["profile"],
                row["batch"],
                f"{row['bound_ms']:.1f}",
                f"{row['causal_bound_ms']:.1f}",
                f"{row['presched_ms']:.1f}",
                f"{100 * row['bound_ms'] / row['presched_ms']:.1f}%",
                f"{100 * bound / row['presched_ms']:.1f}%",
                f"{row['presched_drawn_ms']:.1f}",
            )
        )
    harness.print_table(
        "PreSched and what a policy could reach, ms a decode step",
        (
            *("profile", "batch", "knows all", f"knows {look_ahead} layers", "PreSched"),
            *("of the first", "of the higher", "by perfect forecasts"),
        ),
        lines,
    )


def main(options: Options) -> dict[str, Any]:
    record, progress, rows = harness.machine(), Console(stderr=True), []
    try:
        for name in options.profiles:
            profile = MachineProfile.load(name)
            if profile.routing is None:
                raise ValueError(f"the profile {name} names no recorded routing")
            routing = Routing.shipped(profile.routing)
            for batch in options.batches[:1] if options.quick else options.batches:
                rows.append(cell(profile, routing, batch, options))
                progress.print(f"{name}, batch {batch}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    table(rows, options.look_ahead)
    result = {
        "benchmark": "foresight",
        "quick": options.quick,
        "machine": record,
        "look_ahead": options.look_ahead,
        "seed": options.seed,
        "rows": rows,
    }
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
