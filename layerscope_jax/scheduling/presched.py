"""PreSched: decides this layer's experts and the prefetches for the next layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from layerscope_jax.scheduling import weighing
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import need_costs
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase

CERTAIN = {"prefill": 0.0, "decode": 0.5}
"""Share of a prefetch's gain that a load for this layer must gain, by phase: a load's gain is certain. In a
prefill nearly all experts of all layers are needed, and the link is busy with this layer until it ends."""


@dataclass(frozen=True)
class PreSchedState:
    """State of PreSched; arrays are copied before they are changed.

    Attributes:
        costs, geometry: costs of the machine, geometry of the model.
        popularity: [L, E] mean tokens of an expert for each token of the step.
        worth: [L, E] time (ms) that an expert on the device saves in its layer's next turn, by its
            popularity.
        present: [L, E] bool, resident or in flight.
        span_ms: [L] time (ms) from a layer's plan to the next plan, as last expected.
        price: [L] share in 0..1 of a layer's time that a millisecond of device work costs; a millisecond of
            host work costs the rest. 0 if the host ends last in any case.
        queue: experts put on the link, in order.
    """

    costs: HardwareProfile
    geometry: Geometry
    popularity: np.ndarray
    worth: np.ndarray
    present: np.ndarray
    span_ms: np.ndarray
    price: np.ndarray
    queue: tuple[ExpertId, ...] = ()


class PreSched(PolicyBase):
    """Ranks every possible transfer by the time that it saves, over all layers that a forecast covers.

    Extends the LayerScope paper (arXiv 2509.23638). This layer's experts are assigned so that device and host
    end together (`balance`). Until the next plan the link then copies the experts of the coming layers that
    save most time: expected host time, less their time on the device, if they can arrive in time. Each
    replaces the resident expert that is expected to save least when its layer runs next, and only if it saves
    more. A load for this layer must gain more than the prefetch that it would delay. No more is queued than
    the link can begin before the next plan, so that little goes stale. Without a predictor, each layer's
    popular experts are the forecast.
    """

    name = "presched"
    uses_costs = True

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> PreSchedState:
        layers, experts = geometry.num_layers, geometry.num_experts
        return PreSchedState(
            need_costs(profile, self.name),
            geometry,
            popularity=np.zeros((layers, experts)),
            worth=np.zeros((layers, experts)),
            present=np.zeros((layers, experts), bool),
            span_ms=np.zeros(layers),
            price=np.zeros(layers),
        )

    def plan(self, state: PreSchedState, seen: Observation) -> tuple[PreSchedState, LayerPlan]:
        return self.decide(state, seen)

    def decide(
        self, state: PreSchedState, seen: Observation, *, move: bool = True
    ) -> tuple[PreSchedState, LayerPlan]:
        """Plans a layer as `plan` does; if `move` is False, copies nothing in it."""
        costs, layer, demand = state.costs, seen.layer, seen.demand
        rows = sum(demand.values()) / state.geometry.experts_per_token
        queue = [expert for expert in state.queue if expert in seen.in_flight]
        if len(queue) < len(seen.in_flight):  # the link has copies that this policy did not ask for
            queue += sorted(set(seen.in_flight).difference(queue))
        coming, ahead_ms = arrivals(queue, layer, demand, costs.transfer_ms, state.geometry.arrays_per_expert)
        fitting = int(state.span_ms[layer] / max(costs.transfer_ms, 1e-6)) + 1 - len(queue)
        number = state.geometry.num_experts
        every = numbered(state.geometry.num_layers, number)
        books = weighing.Books(
            state.popularity.copy(),
            state.worth.copy(),
            presence(state, seen),
            state.span_ms.copy(),
            state.price.copy(),
        )
        turn = weighing.Turn(
            layer=layer,
            rows=rows,
            other_ms=costs.layer_ms(round(rows)),
            transfer_ms=costs.transfer_ms,
            alone_ms=np.inf if costs.alone is None else costs.alone.host_ms.total(demand.values()),
            ahead_ms=ahead_ms,
            queued=len(queue),
            free=state.geometry.slots - len(seen.resident) - len(seen.in_flight),
            fitting=max(0, fitting) if move else 0,
            crowd=len(demand) if seen.phase == "prefill" else 0,  # then many, on the first turns of all
            certain=CERTAIN[seen.phase],
            move=move,
        )
        device, host, load, prefetch, evict = (
            part.tolist()
            for part in weighing.decide(
                costs.curves,
                books,
                turn,
                np.array([*demand], np.int64),
                np.array([*demand.values()], np.int64),
                np.array([number * copy.layer + copy.expert for copy in queue], np.int64),
                np.array([expert for expert, _ in coming], np.int64),
                np.array([ms for _, ms in coming]),
                np.array(seen.forecast, float).reshape(-1, number),
            )
        )
        plan = LayerPlan(
            step=seen.step,
            layer=layer,
            device=tuple(device),
            host=tuple(host),
            evict=tuple([every[flat] for flat in evict]),
            load=tuple([every[layer * number + expert] for expert in load]),
            prefetch=tuple([every[flat] for flat in prefetch]),
        )
        copies = [every[layer * number + expert] for expert in device]
        if not agree(plan, copies, seen):  # experts were loaded and evicted that this policy did not plan
            return self.decide(replace(state, present=counted(state, seen)), seen, move=move)
        state = PreSchedState(costs, state.geometry, *books, queue=(*queue, *plan.load, *plan.prefetch))
        return state, plan


@lru_cache(maxsize=8)
def numbered(layers: int, experts: int) -> tuple[ExpertId, ...]:
    """Returns the experts by flat number, made once: making them takes longer than deciding about them.

    >>> numbered(2, 3)[4]
    ExpertId(layer=1, expert=1)
    """
    return tuple(ExpertId(layer, expert) for layer in range(layers) for expert in range(experts))


def presence(state: PreSchedState, seen: Observation) -> np.ndarray:
    """Returns which experts [L, E] are resident or in flight by the policy's own books, as a new array."""
    present = state.present.copy()
    for copy in state.queue:
        if copy not in seen.resident and copy not in seen.in_flight:  # lost, or dropped as stale
            present[copy] = False
    if np.count_nonzero(present) == len(seen.resident) + len(seen.in_flight):
        return present
    return counted(state, seen)


def counted(state: PreSchedState, seen: Observation) -> np.ndarray:
    """Returns the same as `presence`, counted from the observation: slower, but always right."""
    present = np.zeros_like(state.present)
    for copy in (*seen.resident, *seen.in_flight):
        present[copy] = True
    return present


def agree(plan: LayerPlan, device: Sequence[ExpertId], seen: Observation) -> bool:
    """Whether every expert that the plan takes to be present is present, and every absent one absent."""
    resident, away = seen.resident.__contains__, seen.in_flight.__contains__
    new = (*plan.load, *plan.prefetch)
    absent = [copy for copy in device if not resident(copy)]
    return (
        all(map(resident, plan.evict))
        and not any(map(resident, new))
        and not any(map(away, new))
        and all(away(copy) or copy in plan.load for copy in absent)
    )


def arrivals(
    queue: Sequence[ExpertId], layer: int, demand: Mapping[int, int], transfer_ms: float, arrays: int
) -> tuple[list[tuple[int, float]], float]:
    """Returns the time (ms) until each active expert in `queue` arrives, and until a load could begin.

    Args:
        queue: experts on the link, in order.
        layer, demand: the layer that is planned.
        transfer_ms: time of one copy.
        arrays: number of arrays of an expert, each copied by itself.
    """
    arriving: list[tuple[int, float]] = []
    ahead = 0.0
    for position, expert in enumerate(queue):
        if expert.layer == layer and expert.expert in demand:
            # The first copy is half done on average; a demand overtakes the others at the next array.
            ahead += (0.5 if position == 0 else 1.0) * transfer_ms
            arriving.append((expert.expert, ahead))
        elif position == 0:
            ahead = transfer_ms / (2 * arrays)
    return arriving, ahead
