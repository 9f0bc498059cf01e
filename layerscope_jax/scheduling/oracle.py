"""Oracle policy, which is given all future demand; for the simulator, as an engine does not know it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import answer, need_costs
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase
from layerscope_jax.scheduling.presched import arrivals
from layerscope_jax.scheduling.split import Split, balance

AHEAD = 64
"""Layers ahead that are searched for experts to prefetch; the link is usually full long before."""

LOAD_GAIN = 0.25
"""Least gain of an on-demand load that delays prefetches, as a share of its time on the link."""


@dataclass(frozen=True)
class OracleState:
    """State of the oracle: future demand and copies on the link.

    Attributes:
        costs, geometry: costs of the machine, geometry of the model.
        useful: for each turn (a layer of a step), the experts that the device should compute if all were
            resident, most tokens first.
        next_turn: [S + 1][L][E] the first turn, from each step on, that an expert is useful in; the number of
            turns if there is none. Lists, as numbers are taken out of them one by one.
        queue: experts put on the link, in order.
    """

    costs: HardwareProfile
    geometry: Geometry
    useful: tuple[tuple[int, ...], ...]
    next_turn: list[list[list[int]]]
    queue: tuple[ExpertId, ...] = ()


class Oracle(PolicyBase):
    """Prefetches the expert that is needed soonest and evicts the one that is needed last.

    Each layer's experts are divided between device and host by `balance`. Then, while the link has time until
    the next plan, absent experts of the coming layers are copied: the next layer's first, and within a layer
    those with most tokens. Each replaces the resident expert whose next turn is farthest, if that comes later
    than its own (Cao, Felten, Karlin and Li, "A study of integrated prefetching and caching strategies",
    SIGMETRICS 1995). An expert's turns are those in which the device should compute it if every expert were
    resident. This is near the optimum but not equal to it; no policy can beat the bound of
    `layerscope_jax.runtime.lower_bound`.

    Args:
        counts: future demand: [S, L, E] tokens of each workload, in the order in which they run.
    """

    name = "oracle"
    uses_costs = True
    uses_forecasts = False

    def __init__(self, counts: Iterable[np.ndarray]):
        self.counts = np.concatenate([np.asarray(part) for part in counts])

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> OracleState:
        costs = need_costs(profile, self.name)
        steps, layers, experts = self.counts.shape
        if (layers, experts) != (geometry.num_layers, geometry.num_experts):
            raise ValueError(
                f"policy {self.name!r} was told of {layers} layers of {experts} experts, "
                f"the model has {geometry.num_layers} of {geometry.num_experts}"
            )
        at_once = replace(costs, transfer_ms=0.0)
        turns = np.full((steps + 1, layers, experts), steps * layers)
        useful = []
        for turn, (step, layer) in enumerate(np.ndindex(steps, layers)):
            demand = self._demand(step, layer)
            device = balance(at_once, demand, (), loads=len(demand)).device
            useful.append(tuple(device))
            turns[step, layer, device] = turn
        next_turn = np.minimum.accumulate(turns[::-1])[::-1].tolist()
        return OracleState(costs, geometry, tuple(useful), next_turn)

    def plan(self, state: OracleState, seen: Observation) -> tuple[OracleState, LayerPlan]:
        """Plans a layer as `Policy.plan` does; raises ValueError if its demand differs from the given one."""
        step, layer, demand = seen.step, seen.layer, seen.demand
        if step >= len(self.counts) or demand != self._demand(step, layer):
            raise ValueError(f"policy {self.name!r} was told of other demand for step {step}, layer {layer}")
        costs = state.costs
        queue = [expert for expert in state.queue if expert in seen.in_flight]
        free = state.geometry.slots - len(seen.resident) - len(seen.in_flight)
        leaving = self._leaving(state, seen)
        coming, link_ms = arrivals(queue, layer, demand, costs.transfer_ms, state.geometry.arrays_per_expert)
        split = balance(
            costs,
            demand,
            [expert for expert in demand if (layer, expert) in seen.resident],
            coming,
            link_ms=link_ms,
            loads=free + len(leaving),
            worth_ms=LOAD_GAIN * costs.transfer_ms,
        )
        load = [ExpertId(layer, expert) for expert in split.load]
        gone = max(0, len(load) - free)
        prefetch, kept = self._prefetch(
            state, seen, split, len(queue), max(0, free - len(load)), leaving[gone:]
        )
        evict = [expert for expert, _ in leaving[: len(leaving) - kept]]
        plan = answer(seen, split.device, evict=evict, load=load, prefetch=prefetch)
        return replace(state, queue=(*queue, *load, *prefetch)), plan

    def _demand(self, step: int, layer: int) -> dict[int, int]:
        row = self.counts[step, layer]
        active = np.flatnonzero(row)
        return dict(zip(active.tolist(), row[active].tolist(), strict=True))

    def _leaving(self, state: OracleState, seen: Observation) -> list[tuple[ExpertId, int]]:
        """Returns residents that this layer does not need, with their next turns, the farthest first."""
        this_step, next_step = state.next_turn[seen.step], state.next_turn[seen.step + 1]
        idle = [e for e in seen.resident if e.layer != seen.layer or e.expert not in seen.demand]
        turns = [-(this_step if e.layer > seen.layer else next_step)[e.layer][e.expert] for e in idle]
        return [(e, -turn) for turn, e in sorted(zip(turns, idle, strict=True))]

    def _prefetch(
        self,
        state: OracleState,
        seen: Observation,
        split: Split,
        queued: int,
        free: int,
        leaving: list[tuple[ExpertId, int]],
    ) -> tuple[list[ExpertId], int]:
        """Returns what to prefetch until the next plan, and how many of `leaving`, from its end, may stay."""
        costs, layers, transfer_ms = state.costs, state.geometry.num_layers, state.costs.transfer_ms
        tokens = sum(seen.demand.values()) / state.geometry.experts_per_token
        # The first copy of the queue is half done, on average.
        queue_ms = (queued - 0.5 * bool(queued) + len(split.load)) * transfer_ms
        left_ms = max(split.device_ms, split.host_ms) + costs.layer_ms(round(tokens)) - queue_ms
        now, gone = seen.step * layers + seen.layer, 0
        turns = range(now + 1, min(now + 1 + AHEAD, len(state.useful)))
        prefetch: list[ExpertId] = []
        copied = {ExpertId(seen.layer, expert) for expert in split.load}
        for turn, expert in [(t, expert) for t in turns for expert in state.useful[t]]:
            copy = ExpertId(turn % layers, expert)
            if left_ms <= 0:
                break
            if copy in seen.resident or copy in seen.in_flight or copy in copied:
                continue
            if free:
                free -= 1
            elif gone < len(leaving) and leaving[gone][1] > turn:
                gone += 1
            else:
                break
            copied.add(copy)
            prefetch.append(copy)
            left_ms -= transfer_ms
        return prefetch, len(leaving) - gone
