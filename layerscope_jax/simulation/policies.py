"""Workloads from recorded routing, and simulations of policies, including the oracle, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from layerscope_jax.runtime.timeline import Timeline
from layerscope_jax.scheduling.baselines import Resident
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.oracle import Oracle
from layerscope_jax.scheduling.plan import Geometry
from layerscope_jax.scheduling.registry import FORECASTING, POLICIES
from layerscope_jax.simulation.devices import Server, simulate_server
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.simulation.simulator import Simulated, Workload, simulate

# "resident" is left out: it would begin with every expert resident, which others have to copy.
SIMULATED = (*(name for name in POLICIES if name != Resident.name), Oracle.name)
"""Policies that can be compared by name; the oracle is given all future demand."""

BATCHES = (4, 16, 64)
"""Batch sizes that are compared by default, where that many requests were recorded."""


def batches_of(routing: Routing) -> tuple[int, ...]:
    """Returns the batch sizes that are compared by default: `BATCHES`, but no more than were recorded."""
    return tuple(sorted({min(batch, routing.requests) for batch in BATCHES}))


def forecast_of(routing: Routing) -> str:
    """Returns the predictor whose forecasts are used by default: the first that was recorded, or "none"."""
    return next(iter(routing.forecasts), "none")


def workloads(routing: Routing, batch: int, predictor: str) -> tuple[Workload, Workload]:
    """Returns the demand of the first `batch` requests: their prompts in one step, and their decode steps.

    Raises:
        ValueError: if the routing has fewer requests, or for an unknown predictor.
    """
    if not 1 <= batch <= routing.requests:
        raise ValueError(f"batch must lie in 1..{routing.requests}, the requests recorded; got {batch}")
    requests = range(batch)
    counts, forecasts = routing.batch(requests, predictor)
    tokens = int(routing.prefill_lengths[:batch].sum())
    # An engine without a predictor has no forecast, instead of one that expects no tokens.
    named = None if predictor == "none" else predictor
    return (
        Workload(phase="prefill", tokens=tokens, counts=routing.prefill(requests)[None], predictor=named),
        Workload(
            phase="decode",
            tokens=batch,
            counts=counts,
            forecasts=None if named is None else forecasts,
            predictor=named,
        ),
    )


def run(
    policy: str,
    workloads: Sequence[Workload],
    geometry: Geometry,
    costs: HardwareProfile,
    host_slots: int | None = None,
    timeline: Timeline | None = None,
    server: Server | None = None,
) -> list[Simulated]:
    """Simulates one of `SIMULATED` from an empty device; only policies that use forecasts get them.

    Args:
        policy: its name.
        workloads, geometry, costs, host_slots, timeline: as of `simulate`.
        server: several devices instead, without a disk or a timeline; None for one.
    """
    if policy not in FORECASTING:
        workloads = [replace(part, forecasts=None, predictor=None) for part in workloads]
    if server is not None:
        demand = zip(*(server.parts(part.counts) for part in workloads), strict=True)
        own = [Oracle(counts) if policy == Oracle.name else POLICIES[policy]() for counts in demand]
        return simulate_server(own, workloads, geometry, costs, server)
    made = Oracle([part.counts for part in workloads]) if policy == Oracle.name else POLICIES[policy]()
    return simulate(made, workloads, geometry, costs, host_slots=host_slots, timeline=timeline)


def refusals(policies: Iterable[str], geometry: Geometry, costs: HardwareProfile) -> dict[str, str]:
    """Returns why policies cannot run within the budget, by name; the oracle always can."""
    reasons = {}
    for name in policies:
        if name != Oracle.name:
            try:
                POLICIES[name]().init(geometry, costs)
            except ValueError as error:
                reasons[name] = str(error)
    return reasons
