"""The engine on a virtual clock: the same policies, plans and residency over recorded routing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layerscope_jax.offload.pool import DiskStats
from layerscope_jax.offload.residency import Residency
from layerscope_jax.runtime.decisions import Reads, decide
from layerscope_jax.runtime.outcome import Outcome, busy, counted, read
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.runtime.timeline import Timeline
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import (
    ExpertId,
    Geometry,
    LayerPlan,
    Observation,
    Phase,
    Policy,
)
from layerscope_jax.scheduling.policy import PolicyBase, completed
from layerscope_jax.simulation.contention import side_by_side
from layerscope_jax.simulation.drawn import Drawn
from layerscope_jax.simulation.virtual_disk import Disk, StagedLink
from layerscope_jax.simulation.virtual_link import Link
from layerscope_jax.simulation.workload import Workload

NO_WEIGHTS: Any = None
"""Placeholder for the weights of an expert in the residency; the simulator computes nothing."""


@dataclass(frozen=True, kw_only=True)
class Simulated(Outcome):
    """Times, hit rates and bytes of one workload, by the virtual clock.

    Attributes:
        phase: phase of all its steps; `ttft_s` is 0 in decode, `tpot_s` in prefill.
        step_ms: milliseconds of each step.
    """

    phase: Phase
    step_ms: tuple[float, ...]

    @property
    def total_ms(self) -> float:
        """Milliseconds of all steps."""
        return sum(self.step_ms)


def simulate(
    policy: Policy,
    workloads: Sequence[Workload],
    geometry: Geometry,
    costs: HardwareProfile,
    resident: Iterable[ExpertId] = (),
    record: Callable[[LayerPlan], None] | None = None,
    host_slots: int | None = None,
    timeline: Timeline | None = None,
) -> list[Simulated]:
    """Runs a policy over recorded demand, on serial resources: device, host, link, and a disk if one is
    needed.

    A layer's attention and router run on the device; then the policy plans. The host computes its experts one
    after the other, the device its resident ones first and then the others as they arrive, and the layer ends
    when both are done. If the costs have separate times for parts that run alone, a part takes these while
    the others are idle (`simulation.contention`), and a copy does so in a layer that leaves the host idle.
    The link copies an expert in `geometry.arrays_per_expert` parts. If host memory holds `host_slots`
    experts, the others are read from the disk, as in `layerscope_jax.offload.pool`; it is empty at first. The
    simulation is deterministic: the same input gives the same floating-point numbers.

    Args:
        policy: the policy, the same object that an engine runs.
        workloads: the demand, for example a prefill and then its decode steps; each workload begins with the
            experts that the previous one left resident.
        geometry: geometry of the model, with the budget's slots.
        costs: costs of the machine.
        resident: experts on the device at the beginning, at no cost.
        record: called with every plan.
        host_slots: number of experts that host memory holds; None for all.
        timeline: where to record what ran when, in seconds of the virtual clock; None to record nothing.

    Returns:
        The outcome of each workload.

    Raises:
        ValueError: if the policy refuses the budget, a plan is invalid (see `check_plan`), a workload does
            not fit the geometry or has a layer without tokens, or `resident` does not fit the budget; if host
            memory holds no expert, or the costs of the disk are not known.
    """
    for workload in workloads:
        workload.check(geometry)
    run = VirtualRun(completed(policy), geometry, costs, resident, record, host_slots)
    if timeline is not None:
        run.draw(timeline)
    return [run.workload(workload) for workload in workloads]


class VirtualRun:
    """State of a simulated run: clock, link, residency and counts."""

    def __init__(
        self,
        policy: PolicyBase,
        geometry: Geometry,
        costs: HardwareProfile,
        resident: Iterable[ExpertId],
        record: Callable[[LayerPlan], None] | None,
        host_slots: int | None,
    ):
        self.policy, self.geometry, self.costs, self.record = policy, geometry, costs, record
        self.known = set(geometry.every_expert())
        self.state: Any = policy.init(geometry, costs)
        self.disk = None if host_slots is None else disk_of(costs, host_slots, geometry)
        self.reads: Reads | None = None
        self.link = Link(costs.transfer_ms, geometry.arrays_per_expert)
        if self.disk is not None:
            self.link = StagedLink(costs.transfer_ms, geometry.arrays_per_expert, self.disk)
            self.reads = Reads(self.disk, geometry)
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
        self.planned_ms = 0.0  # when the last layer was planned
        self.drawn: Drawn | None = None

    def draw(self, timeline: Timeline) -> None:
        """Records from now on what runs when."""
        self.drawn = Drawn(timeline, self.geometry)
        self.link.told = self.drawn.copy
        if self.disk is not None:
            self.disk.told = self.drawn.read

    def workload(self, workload: Workload) -> Simulated:
        """Runs all steps of a workload; resets the counts and keeps the residency."""
        self.begin(self.now)
        if self.disk is not None:
            self.disk.stats = DiskStats()
        forecasts = None if workload.forecasts is None else workload.forecasts.tolist()
        ends = [self.now]
        for step, counts in enumerate(workload.counts):
            if self.drawn is not None:
                self.drawn.timeline.step = self.steps
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
                    elapsed_ms=self.now - self.planned_ms + (other_ms if layer else 0.0),
                )
                self.layer(seen, other_ms)
            self.steps += 1
            if self.drawn is not None:
                self.drawn.add("scheduler", workload.phase, ends[-1], self.now)
            ends.append(self.now)
        return self.result(workload, ends)

    def begin(self, now: float) -> None:
        """Begins to count for a workload."""
        self.meter = Meter()
        self.books.reset()
        self.link.reset(now)
        self.device_ms = self.host_ms = 0.0

    def layer(self, seen: Observation, other_ms: float) -> None:
        """Runs one layer as `layerscope_jax.runtime.layerwise.LayerByLayer` does.

        Args:
            seen: the policy's observation of the layer.
            other_ms: time (ms) of everything in the layer but its experts.
        """
        began, drawn = self.now, self.drawn
        self.now += other_ms
        self.device_ms += other_ms
        if drawn is not None:
            drawn.add("device", "attention", began, self.now, seen.layer)
        plan = self.decide(seen)
        demand = seen.demand
        host_ms, pace = side_by_side(self.costs, plan, demand, copying=not self.link.idle(self.now))
        host_end = self.now + host_ms
        if self.disk is not None and plan.host:
            host_end = self._from_disk(plan, demand, host_ms)
        if drawn is not None and plan.host and self.disk is None:
            drawn.add("host", "experts", self.now, host_end, seen.layer, plan.host)
        device_end = self.on_device(plan, demand, pace)
        self.host_ms += host_ms
        self.now = max(device_end, host_end)
        if drawn is not None:
            if host_end > device_end and plan.device:
                drawn.add("scheduler", "wait for host", device_end, host_end, seen.layer)
            drawn.timeline.end_layer(seen.layer, 1e-3 * began, 1e-3 * self.now)

    def on_device(self, plan: LayerPlan, demand: Mapping[int, int], pace: float) -> float:
        """Computes a layer's experts on the device, those that are missing as they arrive.

        Args:
            plan: plan of the layer.
            demand: expert -> tokens.
            pace: factor on the device's times.

        Returns:
            When the device has done so (ms).
        """
        drawn, resident, device_end = self.drawn, self.books.resident, self.now
        missing = set()
        for expert in plan.device:
            copy = ExpertId(plan.layer, expert)
            if copy in resident:
                device_end += self._compute(copy, pace * self.costs.device_ms(demand[expert]))
            else:
                missing.add(copy)
        if drawn is not None:
            drawn.experts(plan.layer, plan.device, missing, self.now, device_end)
        while missing:
            arrival = max(device_end, self.link.next_arrival(missing))
            if self.disk is not None and not any(
                (self.disk.ready_at(copy) or arrival) <= device_end for copy in missing
            ):
                self.disk.stats.link_wait_s += arrival - device_end
            if drawn is not None:
                drawn.add("scheduler", "wait for link", device_end, arrival, plan.layer)
            device_end = arrival
            self._absorb(device_end)
            arrived = missing & resident
            for copy in sorted(arrived):
                device_end += self._compute(copy, pace * self.costs.device_ms(demand[copy.expert]))
            missing -= arrived
            if drawn is not None:
                drawn.experts(plan.layer, [copy.expert for copy in arrived], (), arrival, device_end)
        return device_end

    def _from_disk(self, plan: LayerPlan, demand: Mapping[int, int], host_ms: float) -> float:
        """Returns when the host has computed its experts (ms), each as soon as it has been read.

        Args:
            plan: plan of the layer.
            demand: expert -> tokens.
            host_ms: time (ms) of the host without any wait.
        """
        disk, link = self.disk, self.link
        assert disk is not None
        assert isinstance(link, StagedLink)
        left = [ExpertId(plan.layer, expert) for expert in plan.host]
        times = {expert: self.costs.host_ms(demand[expert.expert]) for expert in left}
        total = self.costs.host_start_ms + sum(times.values())
        pace = host_ms / total if total else 1.0
        now = self.now + pace * self.costs.host_start_ms
        while left:
            link.until(now)
            ready = [expert for expert in left if (when := disk.ready_at(expert)) is not None and when <= now]
            if not ready:
                came = link.next_ready(left)
                disk.stats.host_wait_s += max(0.0, came - now)
                now = max(now, came)
                continue
            began, now = now, now + pace * sum(times[expert] for expert in ready)
            if self.drawn is not None:
                experts = [expert.expert for expert in ready]
                self.drawn.add("host", "experts", began, now, plan.layer, experts)
            disk.let_go("host", ready, now)
            left = [expert for expert in left if expert not in ready]
        return now

    def _other_ms(self, tokens: int, looks_ahead: bool) -> float:
        """Returns the time (ms) of everything but the experts in a layer that begins now."""
        alone = self.costs.alone
        costs = self.costs if alone is None or not self.link.idle(self.now) else alone
        return costs.layer_ms(tokens) + (costs.forecast_ms(tokens) if looks_ahead else 0.0)

    def _compute(self, expert: ExpertId, took_ms: float) -> float:
        """Counts a resident expert as computed on the device; returns its time (ms)."""
        self.books.use(expert.layer, [expert.expert])
        self.device_ms += took_ms
        return took_ms

    def decide(self, seen: Observation) -> LayerPlan:
        """Plans the layer, and carries out the plan's evictions and copies."""
        books, link = self.books, self.link
        self._absorb(self.now)
        self.planned_ms = self.now
        if seen.in_flight and self.policy.awaits_link(self.state, seen):
            self.now = link.rest(self.now)
            self._absorb(self.now)  # `seen` is a view of the residency and includes what has arrived
        now = self.now
        self.state, plan = decide(self.policy, self.state, seen, books, self.known, self._enter, self.reads)
        demanded = books.follow(plan, lambda stale: link.drop(stale, now))
        if self.costs.alone is not None:
            link.pace((self.costs if plan.host else self.costs.alone).transfer_ms, now)
        link.submit(demanded, plan.prefetch, now)
        if self.disk is not None:
            self.disk.hold("host", [ExpertId(plan.layer, expert) for expert in plan.host], True, now)
            self.disk.read_ahead(plan.read_ahead, now)
        return plan

    def _enter(self, seen: Observation, plan: LayerPlan, idle_prefetches: Set[ExpertId]) -> None:
        """Counts a plan, and records it if plans are recorded."""
        if self.drawn is not None:
            self.drawn.timeline.decide(seen, plan, self.meter.forecast)
        self.meter.count(seen, idle_prefetches)
        if self.record is not None:
            self.record(plan)

    def _absorb(self, now: float) -> None:
        """Makes the experts resident that have arrived by `now`."""
        for expert in self.link.arrivals(now):
            self.books.arrive(expert, NO_WEIGHTS)

    def result(self, workload: Workload, ends: Sequence[float]) -> Simulated:
        """Returns the outcome of the workload that has just run.

        Args:
            workload: the workload.
            ends: [S + 1] times (ms) at which its steps began and ended.
        """
        self._absorb(self.now)  # copies begun during the last layer count for this workload
        geometry, link = self.geometry, self.link
        chunk_bytes = geometry.expert_bytes / geometry.arrays_per_expert
        step_ms = tuple(np.diff(ends).tolist())
        mean_s = 1e-3 * sum(step_ms) / len(step_ms) if step_ms else 0.0
        busy_ms = {"device": self.device_ms, "host": self.host_ms, "link": link.busy_ms(self.now)}
        return Simulated(
            policy=self.policy.name,
            predictor=workload.predictor,
            phase=workload.phase,
            budget_bytes=geometry.slots * geometry.expert_bytes,
            peak_expert_bytes=self.books.peak_bytes,
            step_ms=step_ms,
            total_s=1e-3 * (ends[-1] - ends[0]),
            ttft_s=mean_s if workload.phase == "prefill" else 0.0,
            tpot_s=mean_s if workload.phase == "decode" else 0.0,
            **busy(ends[-1] - ends[0], **busy_ms),
            **counted(
                self.meter,
                demand_bytes=round(link.demanded * chunk_bytes),
                prefetch_bytes=round(link.prefetched * chunk_bytes),
                wasted_bytes=self.books.unused_prefetch_bytes(),
            ),
            share_of_bound=None,
            **({} if self.disk is None else self._disk_figures(self.disk.stats, ends[-1] - ends[0])),
        )

    def _disk_figures(self, counts: DiskStats, total_ms: float) -> dict[str, Any]:
        """Returns the fields of an `Outcome` about the disk, whose counts are in experts and milliseconds."""
        size = self.geometry.expert_bytes
        counts = replace(
            counts, demand_bytes=counts.demand_bytes * size, ahead_bytes=counts.ahead_bytes * size
        )
        figures = read(counts, size, total_ms)
        return figures | {"disk_wait_s": 1e-3 * counts.wait_s}


def disk_of(costs: HardwareProfile, host_slots: int, geometry: Geometry) -> Disk:
    """Returns the disk of a machine, with host memory for `host_slots` experts.

    Raises:
        ValueError: if that is none, or the costs of the disk are not known.
    """
    if host_slots < 1:
        raise ValueError(f"host_slots must be 1 expert or more, got {host_slots}")
    if not costs.read_ms:
        raise ValueError(
            "the profile has no costs of a disk (read_ms): run `layerscope calibrate --host-budget` on the "
            "machine, or leave out the host budget"
        )
    return Disk(costs.read_ms, costs.read_start_ms, host_slots, geometry.num_layers)
