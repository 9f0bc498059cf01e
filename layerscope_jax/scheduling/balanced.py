"""Policies that balance each layer between device, host and link, and keep some experts of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from math import ceil

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import answer, busiest_first, need_costs, present
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase
from layerscope_jax.scheduling.split import Split, balance

WEIGHT = 0.25
"""Weight of the newest share of demand in HybriMoE's score."""

WINDOW, SWAPS = 4, 2
"""Passes after which DALI changes what a layer keeps, and the most experts that it swaps then."""


@dataclass(frozen=True)
class Shares:
    """Model shape, costs, and the experts to evict when room is needed next."""

    geometry: Geometry
    costs: HardwareProfile
    leaving: tuple[ExpertId, ...] = ()

    @property
    def each(self) -> int:
        """Number of experts that each layer keeps: its share of three quarters of the budget."""
        return self.geometry.slots * 3 // 4 // self.geometry.num_layers

    def gone(self, seen: Observation, kept: frozenset[int] = frozenset()) -> list[ExpertId]:
        """Returns the experts to evict before anything is loaded."""
        return [
            e
            for e in self.leaving
            if e in seen.resident
            and not (e.layer == seen.layer and (e.expert in seen.demand or e.expert in kept))
        ]

    def room(self, seen: Observation, gone: Sequence[ExpertId]) -> int:
        """Returns the number of copies that fit after the evictions."""
        return self.geometry.slots - len(seen.resident) - len(seen.in_flight) + len(gone)

    def held(self, seen: Observation, gone: Sequence[ExpertId]) -> set[int]:
        """Returns this layer's experts that are resident and not evicted."""
        copies = {ExpertId(seen.layer, expert) for expert in range(self.geometry.num_experts)}
        return {copy.expert for copy in copies.difference(gone) if copy in seen.resident}

    def coming(self, seen: Observation) -> list[tuple[int, float]]:
        """Returns active experts in flight, busiest first, with the time (ms) until each should arrive."""
        away = [e for e in busiest_first(seen) if ExpertId(seen.layer, e) in seen.in_flight]
        return [(expert, place * self.costs.transfer_ms) for place, expert in enumerate(away, 1)]

    def idle_copies(self, seen: Observation, split: Split) -> int:
        """Returns how many more copies the link can begin while this layer runs, after those queued."""
        if self.costs.transfer_ms <= 0:
            return self.geometry.slots
        tokens = max(1, sum(seen.demand.values()) // self.geometry.experts_per_token)
        layer_ms = max(split.device_ms, split.host_ms) + self.costs.layer_ms(tokens)
        return max(0, ceil(layer_ms / self.costs.transfer_ms) - len(split.load) - len(seen.in_flight))

    def ahead(self, seen: Observation, layers: int) -> list[tuple[int, dict[int, int]]]:
        """Returns the next layers, each with the whole tokens expected for its experts."""
        number = self.geometry.num_layers
        return [
            ((seen.layer + ahead) % number, {e: max(1, round(x)) for e, x in enumerate(tokens) if x >= 0.5})
            for ahead, tokens in enumerate(seen.forecast[: min(layers, number - 1)], 1)
        ]


@dataclass(frozen=True)
class HybriMoEState(Shares):
    """The state of `Shares`, with the score of each layer's experts."""

    scores: Mapping[int, Mapping[int, float]] = field(default_factory=dict)


class HybriMoE(PolicyBase):
    """Balances each layer greedily, prefetches by impact, evicts by recent score (arXiv 2504.05897).

    The device computes resident experts, those with most tokens first; the host computes the others, those
    with fewest first; the link copies the busiest of these; and the host takes over resident experts where
    the device would end last (`balance`). While the link would be idle, it prefetches the experts that save
    most time in the next three layers. HybriMoE forecasts with those layers' routers (`predictor="gate"`).

    Simplified: HybriMoE's cache score averages routing probabilities (Minus Recent Score); a policy sees only
    token counts, so the score is the moving average of an expert's share of the layer's demand. Three
    quarters of the budget are split evenly between layers, which keep their best-scored experts; the rest is
    room for experts that are evicted soon.
    """

    name = "hybrimoe"
    uses_costs = True

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> HybriMoEState:
        return HybriMoEState(geometry, need_costs(profile, self.name))

    def plan(self, state: HybriMoEState, seen: Observation) -> tuple[HybriMoEState, LayerPlan]:
        layer, demand = seen.layer, seen.demand
        total = sum(demand.values())
        scores = {e: (1 - WEIGHT) * score for e, score in state.scores.get(layer, {}).items()}
        for expert, tokens in demand.items():
            scores[expert] = scores.get(expert, 0.0) + WEIGHT * tokens / total

        gone = state.gone(seen)
        room, held = state.room(seen, gone), state.held(seen, gone)
        coming = state.coming(seen)
        link_ms = len(coming) * state.costs.transfer_ms
        split = balance(state.costs, demand, held & demand.keys(), coming, link_ms=link_ms, loads=room)
        most = min(room - len(split.load), state.idle_copies(seen, split))
        prefetch = with_most_impact(state, seen, most)

        after = sorted(held.union(split.device))
        stay = set(nlargest(state.each, after, key=lambda expert: scores.get(expert, 0.0)))
        state = replace(
            state,
            scores={**state.scores, layer: scores},
            leaving=tuple(ExpertId(layer, expert) for expert in after if expert not in stay),
        )
        load = [ExpertId(layer, expert) for expert in split.load]
        return state, answer(seen, split.device, evict=gone, load=load, prefetch=prefetch)


def with_most_impact(state: Shares, seen: Observation, most: int) -> list[ExpertId]:
    """Returns experts of the next three layers to prefetch, each the one that saves its layer most time next.

    Within a layer, that is always the busiest absent expert.
    """

    def ends(demand: dict[int, int], held: list[int]) -> float:
        split = balance(state.costs, demand, held, loads=len(demand))
        return max(split.device_ms, split.host_ms)

    layers, ending, savings = [], [], []
    for number, demand in state.ahead(seen, 3) if most > 0 else ():
        held = [expert for expert in demand if present(ExpertId(number, expert), seen)]
        absent = sorted(demand.keys() - set(held), key=lambda e: (demand[e], -e))
        if absent:
            layers.append((number, demand, held, absent))
            ending.append(ends(demand, held))
            savings.append(ending[-1] - ends(demand, [*held, absent[-1]]))
    prefetch: list[ExpertId] = []
    while len(prefetch) < most and savings and max(savings) > 0:
        best = savings.index(max(savings))
        number, demand, held, absent = layers[best]
        held.append(absent.pop())
        prefetch.append(ExpertId(number, held[-1]))
        ending[best] -= savings[best]
        savings[best] = ending[best] - ends(demand, [*held, absent[-1]]) if absent else 0.0
    return prefetch


@dataclass(frozen=True)
class DALIState(Shares):
    """The state of `Shares`, with what each layer keeps, and its passes and tokens since the last swap."""

    kept: Mapping[int, frozenset[int]] = field(default_factory=dict)
    windows: Mapping[int, tuple[int, Mapping[int, int]]] = field(default_factory=dict)


class DALI(PolicyBase):
    """Assigns, caches and prefetches experts by their workload (arXiv 2602.03495).

    Starting with the busiest, each expert is assigned to the side that would finish it first; on the device
    that includes its copy, if it is absent (`assign`). The experts of the next layer that `assign` would load
    are prefetched. Every few passes a layer's cache swaps the cached experts with the fewest recent tokens
    for those with the most. DALI forecasts with the next layer's router, on a hidden state corrected by the
    mean step of the residual stream between the two layers; `predictor="gate"` stands in.

    Simplified: window and number of swaps are fixed, while DALI tunes them for each model; the first prefill
    fills the cache with the experts it used most; later swaps and prefetches use the link only while it is
    idle. Three quarters of the budget are split evenly between layers; the rest is room for experts that are
    evicted soon.
    """

    name = "dali"
    uses_costs = True

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> DALIState:
        return DALIState(geometry, need_costs(profile, self.name))

    def plan(self, state: DALIState, seen: Observation) -> tuple[DALIState, LayerPlan]:
        layer, demand = seen.layer, seen.demand
        kept, window = keep_workload(
            state.kept.get(layer), state.windows.get(layer, (0, {})), demand, state.each
        )
        gone = state.gone(seen, kept)
        room, held = state.room(seen, gone), state.held(seen, gone)
        arrivals = dict(state.coming(seen)) | dict.fromkeys(held, 0.0)
        split = assign(state.costs, demand, arrivals, room)

        room -= len(split.load)
        most = max(0, min(room, state.idle_copies(seen, split)))
        prefetch: list[ExpertId] = []
        for number, expected in state.ahead(seen, 1) if most else ():
            there = {e: 0.0 for e in expected if present(ExpertId(number, e), seen)}
            prefetch += [ExpertId(number, e) for e in assign(state.costs, expected, there, most).load]
        absent = [e for e in kept.difference(held, split.load) if not present(ExpertId(layer, e), seen)]
        # The first pass fills the layer's cache, however long that takes.
        most = most if layer in state.kept else room
        busiest = sorted(absent, key=lambda e: (-window[1].get(e, 0), e))
        prefetch += [ExpertId(layer, e) for e in busiest[: max(0, most - len(prefetch))]]
        state = replace(
            state,
            kept={**state.kept, layer: kept},
            windows={**state.windows, layer: window},
            leaving=tuple(ExpertId(layer, e) for e in sorted(held.union(split.device) - kept)),
        )
        load = [ExpertId(layer, expert) for expert in split.load]
        return state, answer(seen, split.device, evict=gone, load=load, prefetch=prefetch)


def assign(
    costs: HardwareProfile, demand: Mapping[int, int], there: Mapping[int, float], loads: int
) -> Split:
    """Assigns each expert, the busiest first, to the side that would finish it first.

    Args:
        costs: of the machine.
        demand: expert -> tokens.
        there: experts resident or in flight, with the time (ms) until each is resident.
        loads: most experts to load, one after the other, behind those in flight.

    >>> from layerscope_jax import TimeTable
    >>> costs = HardwareProfile(host_ms=TimeTable((1, 9), (2.0, 18.0)), device_ms=TimeTable((1,), (1.0,)),
    ...     transfer_ms=3.0, source="an example")
    >>> assign(costs, {0: 1, 1: 1, 2: 3, 3: 2}, {0: 0.0}, loads=4)
    Split(device=[2, 0], host=[3, 1], load=[2], device_ms=4.0, host_ms=6.0, moved=0)
    """
    device: list[int] = []
    host: list[int] = []
    load: list[int] = []
    device_busy = device_end = host_end = 0.0
    link_end = max(there.values(), default=0.0)
    for expert in sorted(demand, key=lambda e: (-demand[e], e)):
        arrival = there.get(expert, link_end + costs.transfer_ms)
        device_ms = costs.device_ms(demand[expert])
        # The device computes experts as they arrive: it ends after all of them, and after the last arrival.
        on_device = max(device_end, device_busy + device_ms, arrival + device_ms)
        on_host = host_end + costs.host_ms(demand[expert])
        if on_device <= on_host and (expert in there or len(load) < loads):
            device_busy, device_end = device_busy + device_ms, on_device
            device.append(expert)
            if expert not in there:
                load.append(expert)
                link_end = arrival
        else:
            host_end = on_host
            host.append(expert)
    return Split(device, host, load, device_end, host_end)


def keep_workload(
    kept: frozenset[int] | None, window: tuple[int, Mapping[int, int]], demand: Mapping[int, int], size: int
) -> tuple[frozenset[int], tuple[int, Mapping[int, int]]]:
    """Returns what a layer keeps after this pass, and its window: passes and tokens since the last swap."""
    passes, tokens = window[0] + 1, dict(window[1])
    for expert, count in demand.items():
        tokens[expert] = tokens.get(expert, 0) + count
    if kept is None:
        return frozenset(sorted(demand, key=lambda e: (-demand[e], e))[:size]), (passes, tokens)
    if passes < WINDOW:
        return kept, (passes, tokens)
    busiest = sorted(tokens.keys() - kept, key=lambda e: (-tokens[e], e))[:SWAPS]
    idlest = sorted(kept, key=lambda e: (tokens.get(e, 0), e))
    free = size - len(kept)  # fewer experts than that were active at first
    taken = set(busiest[:free])
    swapped = [
        (new, old)
        for new, old in zip(busiest[free:], idlest, strict=False)
        if tokens[new] > tokens.get(old, 0)
    ]
    taken.update(new for new, _ in swapped)
    return kept.difference(old for _, old in swapped) | taken, (0, {})
