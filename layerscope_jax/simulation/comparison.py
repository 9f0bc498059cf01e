"""Compares policies on the machine of a profile: recorded routing on the virtual clock, with bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.runtime.lower_bound import lower_bound_ms
from layerscope_jax.runtime.outcome import Outcome
from layerscope_jax.runtime.timeline import Recording, Timeline
from layerscope_jax.runtime.timeline_files import check_place, write_timeline
from layerscope_jax.scheduling.baselines import Resident
from layerscope_jax.scheduling.belady import belady_hit_rate
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.geometry import Geometry, RoutedExperts
from layerscope_jax.scheduling.plan import Phase
from layerscope_jax.scheduling.presched import PreSched
from layerscope_jax.scheduling.registry import is_policy
from layerscope_jax.simulation.devices import Server, server_bound_ms
from layerscope_jax.simulation.policies import (
    SIMULATED,
    batches_of,
    forecast_of,
    refusals,
    run,
    workloads,
)
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.simulation.simulator import Simulated, Workload
from layerscope_jax.support.spans import MOST_BYTES
from layerscope_jax.support.units import is_integer

ROW_BYTES = 2
"""Bytes of a number of the rows that devices exchange: bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Row(Outcome):
    """Outcome of one policy in one phase of one batch; bytes are summed over all steps.

    The share of the bound is for the steps of this phase; 1 if the bound is reached.

    Attributes:
        profile: name of the profile.
        batch: number of requests.
        phase: "prefill" (all prompts in one step, from an empty device) or "decode" (the steps after it).
        steps: S, number of steps.
        bound_s: lower bound on the mean time (s) of a step under any policy; in decode, for any initial
            residency.
        ratio_to_presched: time of a step divided by that under "presched"; None if it was not simulated.
        belady_hit_rate: highest hit rate within the budget without prefetching.
    """

    profile: str
    batch: int
    phase: Phase
    steps: int
    bound_s: float
    ratio_to_presched: float | None
    belady_hit_rate: float

    @property
    def step_s(self) -> float:
        """Mean time (s) of a step: time to first token in prefill, time per output token in decode."""
        return self.ttft_s if self.phase == "prefill" else self.tpot_s


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of policies on one profile and routing, within one budget.

    Attributes:
        profile: name of the profile.
        source: where its costs come from.
        routing: name or file of the recorded routing.
        budget_experts: number of experts that the budget holds.
        all_experts: number of experts of the model.
        expert_bytes: size (bytes) of one expert.
        refused: policy -> why it cannot run within this budget.
        rows: by batch, then by policy, prefill before decode.
        host_experts: number of experts that host memory holds; None for all.
        devices: number of devices that share the experts; the budget is each one's.
    """

    profile: str
    source: str
    routing: str
    budget_experts: int
    all_experts: int
    expert_bytes: int
    refused: dict[str, str]
    rows: tuple[Row, ...]
    host_experts: int | None = None
    devices: int = 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def simulate_profile(
    profile: MachineProfile | str | Path,
    routing: Routing | str | Path | None = None,
    *,
    batches: Sequence[int] | None = None,
    steps: int | None = None,
    slots: int | None = None,
    policies: Sequence[str] = SIMULATED,
    predictor: str | None = None,
    host_slots: int | None = None,
    devices: int = 1,
    root_bandwidth: int | None = None,
    progress: bool = False,
    timeline: str | Path | None = None,
) -> Comparison:
    """Simulates policies over recorded routing on the machine of a profile.

    Each policy prefills the prompts of a batch in one step, from an empty device, then runs the decode steps
    from the residency that this leaves. A batch consists of the first requests of the routing.

    Args:
        profile: a profile that `layerscope calibrate` measured, or the name of a shipped profile.
        routing: recorded routing of a model with the numbers of layers, experts and choices of the profile's;
            None for the routing that the profile names.
        batches: batch sizes; None for 4, 16 and 64, but no more than were recorded.
        steps: decode steps, the first that were recorded; None for all.
        slots: number of experts that the budget holds; None for the profile's number.
        policies: some of `SIMULATED`, or names of registered policies.
        predictor: a predictor of the routing, for policies that use forecasts; prefills have none. None for
            the first that was recorded: "llapor" where there is one, otherwise "gate".
        host_slots: number of experts that host memory holds, if the others are on a disk; None for all. The
            bound takes all experts to be in host memory.
        devices: number of devices that share the experts (`layerscope_jax.simulation.devices`); the budget is
            each one's.
        root_bandwidth: bytes/s of what the links of several devices share; None if each is as fast as alone.
        progress: whether to show a progress bar on stderr, if that is a terminal.
        timeline: file for a timeline of every run (docs/timeline.md); together they take up to 128 MiB of
            memory, and of longer runs cover the ends. None for none.

    Raises:
        ValueError: for unknown names, with those that exist, and for values out of range; if the routing does
            not have the shape of the profile's model.

    >>> comparison = simulate_profile("mixtral-8x7b", batches=[4], steps=8, policies=["presched", "lru"])
    >>> [(row.policy, row.predictor, row.phase, row.steps) for row in comparison.rows][1:3]
    [('presched', 'llapor', 'decode', 8), ('lru', None, 'prefill', 1)]
    >>> comparison.budget_experts, all(row.share_of_bound <= 1 for row in comparison.rows)
    (62, True)
    """
    if not isinstance(profile, MachineProfile):
        profile = MachineProfile.load(profile)
    policies = tuple(dict.fromkeys(policies))
    unknown = [name for name in policies if name not in SIMULATED and not _is_from_outside(name)]
    if unknown or not policies:
        raise ValueError(
            f"policies must be some of {', '.join(SIMULATED)}; got {', '.join(unknown) or 'none'}"
        )
    if steps is not None and (not is_integer(steps) or steps < 1):
        raise ValueError(f"steps must be 1 or more, got {steps!r}")
    routing, named = _routing(profile, routing)
    batches = batches_of(routing) if batches is None else tuple(dict.fromkeys(batches))
    predictor = forecast_of(routing) if predictor is None else predictor
    if steps is not None:
        routing = routing.shortened(steps)
    geometry = _geometry(profile, routing, slots)
    server, own = None, geometry
    if devices != 1 or root_bandwidth is not None:
        if host_slots is not None or timeline is not None:
            raise ValueError("several devices are simulated without host_slots and timeline; leave them out")
        row_bytes = ROW_BYTES * profile.model.hidden_size
        server = Server.of(devices, geometry, profile.costs, row_bytes, root_bandwidth)
        own = server.part(geometry)
    demand = {batch: workloads(routing, batch, predictor) for batch in batches}
    if not demand:
        raise ValueError("batches must hold at least one batch size, got none")
    refused = refusals(policies, own, profile.costs)
    left = [name for name in policies if name not in refused]
    rows: list[Row] = []
    console = Console(stderr=True)
    runs = track(
        list(product(batches, left)),
        "simulating",
        console=console,
        transient=True,
        disable=not (progress and console.is_terminal),
    )
    recordings: list[Recording] = []
    if timeline is not None:
        check_place(timeline)
    most_bytes = MOST_BYTES // max(1, len(batches) * len(left))
    limits: dict[int, list[tuple[float, float]]] = {}
    for batch, name in runs:
        if batch not in limits:
            limits[batch] = [_limits(workload, geometry, profile.costs, server) for workload in demand[batch]]
        spans = None if timeline is None else Timeline(most_bytes)
        results = run(name, demand[batch], geometry, profile.costs, host_slots, spans, server)
        made = [_row(profile.name, batch, *pair) for pair in zip(results, limits[batch], strict=True)]
        rows += made
        if spans is not None:
            recordings.append(_recording(spans, made, geometry))
    if timeline is not None:
        write_timeline(timeline, recordings)
    return Comparison(
        profile=profile.name,
        source=profile.costs.source,
        routing=named,
        budget_experts=geometry.slots,
        all_experts=geometry.total_experts,
        expert_bytes=geometry.expert_bytes,
        refused=refused,
        rows=_with_ratios(rows),
        host_experts=host_slots,
        devices=devices,
    )


def _is_from_outside(name: str) -> bool:
    """Whether other code registered a policy of this name; "resident" is not compared."""
    return name != Resident.name and is_policy(name)


def _routing(profile: MachineProfile, routing: Routing | str | Path | None) -> tuple[Routing, str]:
    """Returns the routing and its name."""
    if isinstance(routing, Routing):
        return routing, str(routing.header.get("name", "given"))
    if routing is not None:
        return Routing.load(routing), str(routing)
    name = profile.routing or Routing.shipped_for(profile.model)
    if name is None:
        raise ValueError(
            f"the profile {profile.name!r} names no recorded routing, and none with its model's numbers of "
            "layers, experts and choices is shipped; pass an .npz file recorded with its model "
            "(`layerscope predictor routing` makes one of its trace)"
        )
    return Routing.shipped(name), name


def _geometry(profile: MachineProfile, routing: Routing, slots: int | None) -> Geometry:
    model, recorded = profile.model.routed, routing.routed
    if recorded != model:
        raise ValueError(
            f"expected routing of the model of profile {profile.name!r}, with {_sizes(model)}, got "
            f"{_sizes(recorded)}; use routing and profile of the same model"
        )
    if slots is not None and slots < 0:
        raise ValueError(f"slots must be 0 or more experts, got {slots}")
    geometry = profile.geometry(slots)
    return replace(geometry, slots=min(geometry.slots, model.total_experts))


def _sizes(model: RoutedExperts) -> str:
    layers, experts, choices = model.num_layers, model.num_experts, model.experts_per_token
    return f"{layers} layers, {experts} experts and {choices} choices a token"


def _limits(
    workload: Workload, geometry: Geometry, costs: HardwareProfile, server: Server | None = None
) -> tuple[float, float]:
    """Returns a lower bound on the time of a step (ms) and the highest hit rate of any policy.

    The policy decides what is resident when decode begins, so the best choice is assumed.
    """
    counts, decode = workload.counts, workload.phase == "decode"
    if server is not None:
        bound = server_bound_ms(workload, geometry, costs, server, from_empty=not decode)
        own, needed, found = server.part(geometry), 0, 0.0
        for part in server.parts(counts):
            start = own.every_expert() if decode else ()
            active = int((part > 0).sum())
            needed, found = needed + active, found + active * belady_hit_rate(part, own.slots, resident=start)
        return bound / len(counts), found / needed
    bound = lower_bound_ms(counts, workload.tokens, geometry, costs, resident=None if decode else ())
    hits = belady_hit_rate(counts, geometry.slots, resident=geometry.every_expert() if decode else ())
    return bound / len(counts), hits


def _row(profile: str, batch: int, result: Simulated, limits: tuple[float, float]) -> Row:
    bound_ms, hit_rate = limits
    steps = len(result.step_ms)
    step_ms = result.total_ms / steps
    shared = {field.name: getattr(result, field.name) for field in fields(Outcome)}
    return Row(
        **shared | {"share_of_bound": bound_ms / step_ms if step_ms else 1.0},
        profile=profile,
        batch=batch,
        phase=result.phase,
        steps=steps,
        bound_s=1e-3 * bound_ms,
        ratio_to_presched=None,
        belady_hit_rate=hit_rate,
    )


def _recording(spans: Timeline, rows: Sequence[Row], geometry: Geometry) -> Recording:
    """Returns the timeline of a policy's prefill and decode steps with what it is of."""
    first = rows[0]
    return Recording(
        name=f"{first.policy}, batch {first.batch} on {first.profile}",
        clock="virtual",
        spans=list(spans),
        left_out=spans.left_out,
        outcomes=[row.to_json() for row in rows],
        about={
            "profile": first.profile,
            "batch": first.batch,
            "moe_layers": geometry.num_layers,
            "experts": geometry.num_experts,
            "expert_bytes": geometry.expert_bytes,
        },
    )


def _with_ratios(rows: Sequence[Row]) -> tuple[Row, ...]:
    best = {(row.batch, row.phase): row.step_s for row in rows if row.policy == PreSched.name}
    return tuple(
        replace(row, ratio_to_presched=row.step_s / best[row.batch, row.phase])
        if best.get((row.batch, row.phase))
        else row
        for row in rows
    )
