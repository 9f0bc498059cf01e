"""The engine on a virtual clock: the same policies, plans and books over recorded routing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from layerscope_jax.offload.residency import Residency
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import (
    ExpertId,
    Geometry,
    LayerPlan,
    Observation,
    Phase,
    Policy,
    ask,
    check_plan,
)
from layerscope_jax.scheduling.policy import PolicyBase, completed
from layerscope_jax.simulation.contention import side_by_side
from layerscope_jax.simulation.virtual_link import CHUNKS, Link

NO_WEIGHTS: Any = None
"""What the books are given of an expert: nothing is computed here."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a batch asks for, step by step.

    Attributes:
        phase: of all steps.
        tokens: of a step: its requests in decode, all of their prompts' tokens in prefill.
        counts: [S, L, E] tokens routed to each expert.
        forecasts: [S, L, W, E] tokens expected of the W layers after each, or None; see
            `layerscope_jax.scheduling.plan.Observation`.
    """

    phase: Phase
    tokens: int
    counts: np.ndarray
    forecasts: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a run came to; times in milliseconds of the virtual clock.

    Attributes:
        policy: its name.
        step_ms: of each step.
        device_share, host_share, link_share: busy time of each by all time.
        hit_rate, token_hit_rate: as in `layerscope_jax.runtime.statistics.RunStats`.
        bytes_demand, bytes_prefetch, bytes_wasted: over the link; prefetched and never used.
        forecast_recall, prefetch_on_time: as there.
        peak_bytes: most of the budget in use at any time.
    """

    policy: str
    step_ms: tuple[float, ...]
    device_share: float
    host_share: float
    link_share: float
    hit_rate: float
    token_hit_rate: float
    bytes_demand: int
    bytes_prefetch: int
    bytes_wasted: int
    forecast_recall: float | None
    prefetch_on_time: float | None
    peak_bytes: int

    @property
    def bytes_moved(self) -> int:
        return self.bytes_demand + self.bytes_prefetch

    @property
    def total_ms(self) -> float:
        return sum(self.step_ms)


def simulate(
    policy: Policy,
    workloads: Sequence[Workload],
    geometry: Geometry,
    costs: HardwareProfile,
    resident: Iterable[ExpertId] = (),
    record: Callable[[LayerPlan], None] | None = None,
) -> list[Simulated]:
    """Runs a policy over recorded demand, on three serial resources: device, host and link.

    A layer's attention and router run on the device; then the policy plans, the host computes its experts one
    after the other, the device its resident ones and then the others as they arrive; the layer ends when
    both have. Where the costs say what parts take alone, they take that while the others rest: see
    `simulation.contention`; of copies it is said layer by layer, by whether the host computes there.
    Deterministic: the same input gives the same floating-point numbers.

    Args:
        policy: the object that an engine would run.
        workloads: the demand, one after the other in one run: a prefill and the decode steps after it. What
            is resident stays from one to the next.
        geometry: of the model, with the budget's slots.
        costs: of the machine.
        resident: experts on the device at the beginning; they have cost nothing.
        record: is given every plan.

    Returns:
        What each workload came to.

    Raises:
        ValueError: if the policy refuses the budget, a plan is none (see `check_plan`), a workload is of
            another geometry or has a layer without tokens, or `resident` does not fit.
    """
    for workload in workloads:
        _check(workload, geometry)
    run = _Run(completed(policy), geometry, costs, resident, record)
    return [run.workload(workload) for workload in workloads]


def hottest(counts: np.ndarray, slots: int) -> list[ExpertId]:
    """A hot-expert table: the experts with most tokens, as many as the budget holds.

    Args:
        counts: [L, E] tokens, of the prompts for example.
        slots: of the budget.

    >>> hottest(np.array([[1, 5], [3, 0]]), 2)
    [ExpertId(layer=0, expert=1), ExpertId(layer=1, expert=0)]
    """
    order = np.argsort(-counts, axis=None, kind="stable")[:slots]
    return [ExpertId(int(i) // counts.shape[1], int(i) % counts.shape[1]) for i in order]


def _check(workload: Workload, geometry: Geometry) -> None:
    """Refuses what no engine would run: another geometry, or a layer that nobody asks anything of."""
    layers, experts = geometry.num_layers, geometry.num_experts
    if workload.phase not in get_args(Phase):
        raise ValueError(
            f"phase must be one of {', '.join(get_args(Phase))}, got {str(workload.phase)[:40]!r}"
        )
    shape = _numbers(workload.counts, "counts", np.integer).shape
    if len(shape) != 3 or shape[1:] != (layers, experts):
        raise ValueError(f"expected counts [S, {layers}, {experts}] of the geometry, got {list(shape)}")
    if not workload.counts.any(axis=2).all():
        raise ValueError("expected tokens in every layer of every step, got a layer without")
    if workload.forecasts is not None:
        found = _numbers(workload.forecasts, "forecasts", np.number).shape
        if len(found) != 4 or found[:2] != shape[:2] or found[3] != experts:
            raise ValueError(
                f"expected forecasts [{shape[0]}, {layers}, W, {experts}] for counts {list(shape)}, "
                f"got {list(found)}"
            )


def _numbers(array: Any, name: str, kind: type) -> np.ndarray:
    """Refuses what are no counts of tokens."""
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, kind):
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must be an array of {'whole ' * (kind is np.integer)}numbers, got {got}")
    if array.size and not (array.min() >= 0 and array.max() < np.inf):  # nor NaN
        raise ValueError(f"{name} must be 0 or more and finite, got {array.min()}..{array.max()}")
    return array


class _Run:
    """The state of one simulated run."""

    def __init__(
        self,
        policy: PolicyBase,
        geometry: Geometry,
        costs: HardwareProfile,
        resident: Iterable[ExpertId],
        record: Callable[[LayerPlan], None] | None,
    ):
        self.policy, self.geometry, self.costs, self.record = policy, geometry, costs, record
        self.known = {
            ExpertId(layer, expert)
            for layer in range(geometry.num_layers)
            for expert in range(geometry.num_experts)
        }
        self.state: Any = policy.init(geometry, costs)
        self.link = Link(costs.transfer_ms)
        self.books = Residency(geometry.slots * geometry.expert_bytes, geometry.expert_bytes)
        resident = set(resident)
        if len(resident) > self.books.slots or not resident <= self.known:
            raise ValueError(
                f"expected at most {self.books.slots} experts of the model on the device at the beginning, "
                f"got {sorted(resident)}"
            )
        for expert in sorted(resident):
            self.books.reserve(expert, prefetched=False)
            self.books.arrive(expert, NO_WEIGHTS)
        self.now = 0.0
        self.steps = 0
        self.planned = 0.0  # when the last layer was planned

    def workload(self, workload: Workload) -> Simulated:
        """All of its steps; counts begin anew, what is resident stays."""
        self.meter = Meter()
        self.books.reset()
        self.link.reset(self.now)
        self.device_ms = self.host_ms = 0.0
        forecasts = None if workload.forecasts is None else workload.forecasts.tolist()
        ends = [self.now]
        for step, counts in enumerate(workload.counts):
            for layer, row in enumerate(counts):
                active = np.flatnonzero(row)
                looks_ahead = forecasts is not None and self.policy.wants_forecast(self.state)
                other_ms = self._other_ms(workload.tokens, looks_ahead)
                seen = Observation(
                    step=self.steps,
                    layer=layer,
                    phase=workload.phase,
                    demand=dict(zip(active.tolist(), row[active].tolist(), strict=True)),
                    resident=self.books.resident,
                    in_flight=self.books.coming,
                    forecast=() if forecasts is None else forecasts[step][layer],
                    elapsed_ms=self.now - self.planned + (other_ms if layer else 0.0),
                )
                self.layer(seen, other_ms)
            self.steps += 1
            ends.append(self.now)
        return self.result(ends)

    def layer(self, seen: Observation, other_ms: float) -> None:
        """One layer, as `layerscope_jax.runtime.layerwise.LayerByLayer` runs it."""
        self.now += other_ms
        self.device_ms += other_ms
        plan = self._decide(seen)
        demand = seen.demand
        host_ms, pace = side_by_side(self.costs, plan, demand, copying=not self.link.idle(self.now))
        device = self.now
        resident = self.books.resident
        missing = set()
        for expert in plan.device:
            copy = ExpertId(seen.layer, expert)
            if copy in resident:
                device += self._compute(copy, pace * self.costs.device_ms(demand[expert]))
            else:
                missing.add(copy)
        while missing:
            device = max(device, self.link.next_arrival(missing))
            self._absorb(device)
            found = missing & resident
            for copy in sorted(found):
                device += self._compute(copy, pace * self.costs.device_ms(demand[copy.expert]))
            missing -= found
        self.host_ms += host_ms
        self.now = max(device, self.now + host_ms)

    def _other_ms(self, tokens: int, looks_ahead: bool) -> float:
        """Of everything in a layer that begins now but its experts."""
        alone = self.costs.alone
        costs = self.costs if alone is None or not self.link.idle(self.now) else alone
        return costs.layer_ms(tokens) + (costs.forecast_ms(tokens) if looks_ahead else 0.0)

    def _compute(self, expert: ExpertId, took: float) -> float:
        self.books.use(expert.layer, [expert.expert])
        self.device_ms += took
        return took

    def _decide(self, seen: Observation) -> LayerPlan:
        books, link = self.books, self.link
        self._absorb(self.now)
        self.planned = self.now
        if seen.in_flight and self.policy.awaits_link(self.state, seen):
            self.now = link.rest(self.now)
            self._absorb(self.now)  # `seen` looks at the books
        now = self.now
        state, plan = ask(self.policy, self.state, seen)
        check_plan(plan, seen, books.slots, self.known, self.policy.name)
        self.state = state
        self.meter.count(seen, books.idle_prefetches)
        if self.record is not None:
            self.record(plan)
        demanded = books.follow(plan, lambda stale: link.drop(stale, now))
        if self.costs.alone is not None:
            link.pace((self.costs if plan.host else self.costs.alone).transfer_ms, now)
        link.submit(demanded, plan.prefetch, now)
        return plan

    def _absorb(self, now: float) -> None:
        for expert in self.link.arrivals(now):
            self.books.arrive(expert, NO_WEIGHTS)

    def result(self, ends: Sequence[float]) -> Simulated:
        self._absorb(self.now)  # what the link began during the last layer is this workload's
        meter, chunk_bytes = self.meter, self.geometry.expert_bytes / CHUNKS
        used = meter.on_time + meter.late
        total = ends[-1] - ends[0]

        def share(busy_ms: float) -> float:
            return min(1.0, busy_ms / total) if total else 0.0  # sums are rounded

        return Simulated(
            policy=self.policy.name,
            step_ms=tuple(np.diff(ends).tolist()),
            device_share=share(self.device_ms),
            host_share=share(self.host_ms),
            link_share=share(self.link.busy_ms(self.now)),
            hit_rate=meter.expert_hits / meter.experts if meter.experts else 1.0,
            token_hit_rate=meter.token_hits / meter.tokens if meter.tokens else 1.0,
            bytes_demand=round(self.link.demanded * chunk_bytes),
            bytes_prefetch=round(self.link.prefetched * chunk_bytes),
            bytes_wasted=self.books.unused_prefetch_bytes(),
            forecast_recall=meter.foreseen / meter.foreseeable if meter.foreseeable else None,
            prefetch_on_time=meter.on_time / used if used else None,
            peak_bytes=self.books.peak_bytes,
        )
