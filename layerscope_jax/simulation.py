"""The engine on a virtual clock: the same policies, plans and books over recorded routing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerscope_jax.experts.residency import Residency
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import (
    ExpertId,
    Geometry,
    LayerPlan,
    Observation,
    Phase,
    Policy,
    check_plan,
)
from layerscope_jax.statistics import Meter

CHUNKS = 3
"""Parts that an expert crosses the link in, its matrices; see `layerscope_jax.experts.transfers`."""


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
        hit_rate, token_hit_rate: as in `layerscope_jax.statistics.RunStats`.
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


class Link:
    """A serial link: demand before prefetch, a chunk that has begun is finished.

    Args:
        transfer_ms: of one expert.

    Attributes:
        busy_ms: since the last reset, of chunks begun.
        demanded, prefetched: chunks.

    >>> link = Link(3.0)
    >>> link.submit([], [ExpertId(1, 0)], now=0.0)
    >>> link.submit([ExpertId(0, 0)], [], now=0.5)  # waits for one chunk of the prefetch
    >>> link.next_arrival({ExpertId(0, 0)}), link.next_arrival({ExpertId(1, 0)})
    (4.0, 6.0)
    """

    def __init__(self, transfer_ms: float):
        self.reset()
        self._chunk_ms = transfer_ms / CHUNKS
        self._free = 0.0  # when the chunk on the link ends
        self._demand: deque[ExpertId] = deque()
        self._prefetch: deque[ExpertId] = deque()
        self._left: dict[ExpertId, int] = {}  # chunks that have not begun
        self._arrived: dict[ExpertId, float] = {}

    def reset(self) -> None:
        """Begins the counts anew."""
        self.busy_ms = 0.0
        self.demanded = self.prefetched = 0

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId], now: float) -> None:
        """Queues copies; a load that is on its way as a prefetch is moved ahead."""
        self._run(now)
        if not self._left:
            self._free = max(self._free, now)
        for expert in load:
            if expert in self._left:
                self._prefetch.remove(expert)
            elif expert in self._arrived:
                continue
            else:
                self._left[expert] = CHUNKS
            self._demand.append(expert)
        for expert in prefetch:
            self._left[expert] = CHUNKS
            self._prefetch.append(expert)

    def drop(self, stale: Callable[[ExpertId], bool], now: float) -> list[ExpertId]:
        """Takes prefetches that have not begun off the queue."""
        self._run(now)
        gone = [expert for expert in self._prefetch if self._left[expert] == CHUNKS and stale(expert)]
        for expert in gone:
            self._prefetch.remove(expert)
            del self._left[expert]
        return gone

    def arrivals(self, now: float) -> list[ExpertId]:
        """What has come since the last call."""
        self._run(now)
        found = [expert for expert, when in self._arrived.items() if when <= now]
        for expert in found:
            del self._arrived[expert]
        return found

    def next_arrival(self, wanted: Collection[ExpertId]) -> float:
        """When the first of them will be there."""
        while not any(expert in self._arrived for expert in wanted):
            self._run(self._free)
        return min(self._arrived[expert] for expert in wanted if expert in self._arrived)

    def _run(self, now: float) -> None:
        """Begins every chunk that begins until `now`."""
        while self._left and self._free <= now:
            queue = self._demand or self._prefetch
            expert = queue[0]
            self._free += self._chunk_ms
            self.busy_ms += self._chunk_ms
            self._left[expert] -= 1
            if queue is self._demand:
                self.demanded += 1
            else:
                self.prefetched += 1
            if not self._left[expert]:
                queue.popleft()
                del self._left[expert]
                self._arrived[expert] = self._free


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
    both have. Deterministic: the same input gives the same floating-point numbers.

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
        ValueError: if the policy refuses the budget, a plan is none (see `check_plan`), or a workload is of
            another geometry.
    """
    for workload in workloads:
        found = workload.counts.shape[1:]
        if found != (geometry.num_layers, geometry.num_experts):
            raise ValueError(
                f"expected workloads of {geometry.num_layers} layers and {geometry.num_experts} experts, "
                f"got {found[0]} and {found[1]}"
            )
    run = _Run(policy, geometry, costs, resident, record)
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


class _Run:
    """The state of one simulated run."""

    def __init__(
        self,
        policy: Policy,
        geometry: Geometry,
        costs: HardwareProfile,
        resident: Iterable[ExpertId],
        record: Callable[[LayerPlan], None] | None,
    ):
        self.policy, self.geometry, self.costs, self.record = policy, geometry, costs, record
        self.state: Any = policy.init(geometry, costs)
        self.link = Link(costs.transfer_ms)
        self.books = Residency(geometry.slots * geometry.expert_bytes, geometry.expert_bytes)
        for expert in resident:
            self.books.reserve(expert, prefetched=False)
            self.books.arrive(expert, None)
        self.now = 0.0
        self.steps = 0

    def workload(self, workload: Workload) -> Simulated:
        """All of its steps; counts begin anew, what is resident stays."""
        self.meter = Meter()
        self.books.reset()
        self.link.reset()
        self.device_ms = self.host_ms = 0.0
        forecasts = None if workload.forecasts is None else workload.forecasts.tolist()
        other_ms = self.costs.layer_ms(workload.tokens)
        ends = [self.now]
        for step, counts in enumerate(workload.counts):
            for layer, row in enumerate(counts):
                active = np.flatnonzero(row)
                seen = Observation(
                    step=self.steps,
                    layer=layer,
                    phase=workload.phase,
                    demand=dict(zip(active.tolist(), row[active].tolist(), strict=True)),
                    resident=self.books.resident,
                    in_flight=self.books.coming,
                    forecast=() if forecasts is None else forecasts[step][layer],
                )
                self.layer(seen, other_ms)
            self.steps += 1
            ends.append(self.now)
        return self.result(ends)

    def layer(self, seen: Observation, other_ms: float) -> None:
        """One layer, as `layerscope_jax.layerwise.LayerByLayer` runs it."""
        self.now += other_ms
        self.device_ms += other_ms
        plan = self._decide(seen)
        costs, demand = self.costs, seen.demand
        host_ms = 0.0
        for expert in plan.host:
            host_ms += costs.host_ms(demand[expert])
        device = self.now
        resident = self.books.resident
        missing = set()
        for expert in plan.device:
            copy = ExpertId(seen.layer, expert)
            if copy in resident:
                device += self._compute(copy, demand[expert])
            else:
                missing.add(copy)
        while missing:
            device = max(device, self.link.next_arrival(missing))
            self._absorb(device)
            for copy in sorted(missing & resident):
                device += self._compute(copy, demand[copy.expert])
            missing -= resident
        self.host_ms += host_ms
        self.now = max(device, self.now + host_ms)

    def _compute(self, expert: ExpertId, tokens: int) -> float:
        self.books.use(expert)
        took = self.costs.device_ms(tokens)
        self.device_ms += took
        return took

    def _decide(self, seen: Observation) -> LayerPlan:
        books, link, now = self.books, self.link, self.now
        self._absorb(now)
        self.state, plan = self.policy.plan(self.state, seen)
        check_plan(plan, seen, books.slots)
        self.meter.count(seen, books.is_prefetch)
        if self.record is not None:
            self.record(plan)
        wanted = {ExpertId(seen.layer, expert) for expert in plan.device}
        for expert in link.drop(lambda e: e.layer == seen.layer and e not in wanted, now):
            books.release(expert)
        for expert in plan.evict:
            books.evict(expert)
        for expert in plan.load:
            books.reserve(expert, prefetched=False)
        for expert in plan.prefetch:
            books.reserve(expert, prefetched=True)
        promoted = [e for e in sorted(wanted) if e in books.coming and e not in plan.load]
        link.submit([*promoted, *plan.load], plan.prefetch, now)
        return plan

    def _absorb(self, now: float) -> None:
        for expert in self.link.arrivals(now):
            self.books.arrive(expert, None)

    def result(self, ends: Sequence[float]) -> Simulated:
        meter, link, chunk_bytes = self.meter, self.link, self.geometry.expert_bytes / CHUNKS
        used = meter.on_time + meter.late
        total = ends[-1] - ends[0]
        return Simulated(
            policy=self.policy.name,
            step_ms=tuple(np.diff(ends).tolist()),
            device_share=self.device_ms / total,
            host_share=self.host_ms / total,
            link_share=min(1.0, link.busy_ms / total),
            hit_rate=meter.expert_hits / meter.experts,
            token_hit_rate=meter.token_hits / meter.tokens,
            bytes_demand=round(link.demanded * chunk_bytes),
            bytes_prefetch=round(link.prefetched * chunk_bytes),
            bytes_wasted=self.books.unused_prefetch_bytes(),
            forecast_recall=meter.foreseen / meter.foreseeable if meter.foreseeable else None,
            prefetch_on_time=meter.on_time / used if used else None,
            peak_bytes=self.books.peak_bytes,
        )
