"""Policies compared on a profile's machine: recorded routing on the virtual clock, beside the bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.runtime.lower_bound import lower_bound_ms
from layerscope_jax.scheduling.baselines import Resident
from layerscope_jax.scheduling.belady import belady_hit_rate
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.geometry import Geometry, RoutedExperts
from layerscope_jax.scheduling.plan import Phase
from layerscope_jax.scheduling.presched import PreSched
from layerscope_jax.scheduling.registry import FORECASTING, is_policy
from layerscope_jax.simulation.policies import BATCHES, SIMULATED, refusals, run, workloads
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.simulation.simulator import Simulated, Workload


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one policy came to in one phase of one batch. Bytes are of all steps together.

    Attributes:
        profile, policy: their names.
        predictor: whose forecasts the policy is given in decode; None if none.
        batch: requests.
        phase: "prefill", of all prompts in one step that begins with an empty device, or "decode" after it.
        steps: S.
        step_ms: milliseconds of a step, on average.
        bound_ms: what no policy could take less than, in decode whatever was resident at its beginning.
        share_of_bound: bound_ms by step_ms; 1 if the bound is reached.
        ratio_to_presched: step_ms by that of policy "presched"; None if that was not simulated.
        hit_rate, token_hit_rate: experts, and tokens, that found their expert resident, by all.
        belady_hit_rate: highest hit rate within the budget if nothing is copied before it is asked for.
        bytes_moved, bytes_demand, bytes_prefetch: over the link, by demand, and ahead of it.
        bytes_wasted: prefetched and never used.
        device_share, host_share, link_share: busy time of each by all time.
        forecast_recall, prefetch_on_time: as in `layerscope_jax.runtime.statistics.RunStats`.
        peak_bytes: most of the budget in use at any time.
    """

    profile: str
    policy: str
    predictor: str | None
    batch: int
    phase: Phase
    steps: int
    step_ms: float
    bound_ms: float
    share_of_bound: float
    ratio_to_presched: float | None
    hit_rate: float
    token_hit_rate: float
    belady_hit_rate: float
    bytes_moved: int
    bytes_demand: int
    bytes_prefetch: int
    bytes_wasted: int
    device_share: float
    host_share: float
    link_share: float
    forecast_recall: float | None
    prefetch_on_time: float | None
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Policies on one profile and routing, within one budget.

    Attributes:
        profile: its name.
        source: where its costs come from.
        routing: name or file of the recorded routing.
        budget_experts, all_experts: that the device has room for; that there are.
        expert_bytes: of one.
        refused: policy -> why it does not run within this budget.
        rows: by batch, then by policy, prefill before decode.
    """

    profile: str
    source: str
    routing: str
    budget_experts: int
    all_experts: int
    expert_bytes: int
    refused: dict[str, str]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def simulate_profile(
    profile: MachineProfile | str | Path,
    routing: Routing | str | Path | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    slots: int | None = None,
    policies: Sequence[str] = SIMULATED,
    predictor: str = "llapor",
    progress: bool = False,
) -> Comparison:
    """Runs recorded routing under policies on the machine of a profile, on a virtual clock.

    Each policy prefills the prompts of a batch, in one step that begins with an empty device, and goes on
    with the decode steps and what is resident by then. A batch is the first requests of the routing.

    Args:
        profile: what `layerscope calibrate` measured, or the name of a shipped one.
        routing: recorded of a model with as many layers, experts and choices as the profile's; None for the
            one that the profile names.
        batches: requests of each batch.
        slots: experts that the device has room for; None for what the profile says.
        policies: some of `SIMULATED`, or names of registered policies.
        predictor: one of the routing's, for the policies that make use of forecasts; prefills have none.
        progress: whether to draw a bar on stderr, if that is a terminal.

    Raises:
        ValueError: for what is not known or out of range, saying what there is; if the routing is of another
            shape than the profile's model.

    >>> found = simulate_profile("mixtral-8x7b", batches=[4], policies=["presched", "lru"])
    >>> [(row.policy, row.predictor, row.phase, row.steps) for row in found.rows][1:3]
    [('presched', 'llapor', 'decode', 16), ('lru', None, 'prefill', 1)]
    >>> found.budget_experts, all(row.share_of_bound <= 1 for row in found.rows)
    (62, True)
    """
    if not isinstance(profile, MachineProfile):
        profile = MachineProfile.load(profile)
    policies, batches = tuple(dict.fromkeys(policies)), tuple(dict.fromkeys(batches))
    unknown = [name for name in policies if name not in SIMULATED and not _is_from_outside(name)]
    if unknown or not policies:
        raise ValueError(
            f"policies must be some of {', '.join(SIMULATED)}; got {', '.join(unknown) or 'none'}"
        )
    routing, named = _routing(profile, routing)
    geometry = _geometry(profile, routing, slots)
    demand = {batch: workloads(routing, batch, predictor) for batch in batches}
    if not demand:
        raise ValueError("expected a batch or more, got none")
    refused = refusals(policies, geometry, profile.costs)
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
    limits: dict[int, list[tuple[float, float]]] = {}
    for batch, name in runs:
        if batch not in limits:
            limits[batch] = [_limits(workload, geometry, profile.costs) for workload in demand[batch]]
        results = run(name, demand[batch], geometry, profile.costs)
        for workload, result, limit in zip(demand[batch], results, limits[batch], strict=True):
            rows.append(_row(profile.name, predictor, batch, workload, result, limit))
    return Comparison(
        profile=profile.name,
        source=profile.costs.source,
        routing=named,
        budget_experts=geometry.slots,
        all_experts=geometry.total_experts,
        expert_bytes=geometry.expert_bytes,
        refused=refused,
        rows=_with_ratios(rows),
    )


def _is_from_outside(name: str) -> bool:
    """Whether other code registered a policy of this name; "resident" has nothing to compare."""
    return name != Resident.name and is_policy(name)


def _routing(profile: MachineProfile, routing: Routing | str | Path | None) -> tuple[Routing, str]:
    """The routing, and what to call it."""
    if isinstance(routing, Routing):
        return routing, str(routing.header.get("name", "given"))
    if routing is not None:
        return Routing.load(routing), str(routing)
    if profile.routing is None:
        raise ValueError(
            f"the profile {profile.name!r} names no recorded routing: give an .npz file of its model's "
            "(tools/record_routing.py makes one)"
        )
    return Routing.shipped(profile.routing), profile.routing


def _geometry(profile: MachineProfile, routing: Routing, slots: int | None) -> Geometry:
    model, recorded = profile.model.routed, routing.routed
    if recorded != model:
        raise ValueError(
            f"expected routing of a model as that of profile {profile.name!r}, with {_sizes(model)}, got "
            f"{_sizes(recorded)}"
        )
    if slots is not None and slots < 0:
        raise ValueError(f"slots must be 0 or more experts, got {slots}")
    geometry = profile.geometry(slots)
    return replace(geometry, slots=min(geometry.slots, model.total_experts))


def _sizes(model: RoutedExperts) -> str:
    layers, experts, choices = model.num_layers, model.num_experts, model.experts_per_token
    return f"{layers} layers, {experts} experts and {choices} choices a token"


def _limits(workload: Workload, geometry: Geometry, costs: HardwareProfile) -> tuple[float, float]:
    """Milliseconds of a step, and the hit rate, that no policy can better.

    What is resident when decode begins is the policy's own doing: it may be the best there is.
    """
    counts, decode = workload.counts, workload.phase == "decode"
    bound = lower_bound_ms(counts, workload.tokens, geometry, costs, resident=None if decode else ())
    hits = belady_hit_rate(counts, geometry.slots, resident=geometry.every_expert() if decode else ())
    return bound / len(counts), hits


def _row(
    profile: str,
    predictor: str,
    batch: int,
    workload: Workload,
    result: Simulated,
    limits: tuple[float, float],
) -> Row:
    bound_ms, hits = limits
    steps, parts = len(result.step_ms), asdict(result)
    step_ms = result.total_ms / steps
    forecasts = result.policy in FORECASTING and predictor != "none"
    return Row(
        profile=profile,
        predictor=predictor if forecasts else None,
        batch=batch,
        phase=workload.phase,
        steps=steps,
        bound_ms=bound_ms,
        share_of_bound=bound_ms / step_ms if step_ms else 1.0,
        ratio_to_presched=None,
        belady_hit_rate=hits,
        bytes_moved=result.bytes_moved,
        **{**parts, "step_ms": step_ms},
    )


def _with_ratios(rows: Sequence[Row]) -> tuple[Row, ...]:
    best = {(row.batch, row.phase): row.step_ms for row in rows if row.policy == PreSched.name}
    return tuple(
        replace(row, ratio_to_presched=row.step_ms / best[row.batch, row.phase])
        if best.get((row.batch, row.phase))
        else row
        for row in rows
    )
