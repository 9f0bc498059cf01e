"""Policies that share each layer out anew between device, host and link, and keep a share of every layer."""

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
"""Of the newest share of demand in HybriMoE's score."""

WINDOW, SWAPS = 4, 2
"""After how many passes DALI changes what a layer keeps, and how many experts at most."""


@dataclass(frozen=True)
class Shares:
    """The model's shape, costs, and what passed through, to leave when room is needed next."""

    geometry: Geometry
    costs: HardwareProfile
    leaving: tuple[ExpertId, ...] = ()

    @property
    def each(self) -> int:
        """Experts that a layer keeps: three quarters of the budget; the rest is for passing through."""
        return self.geometry.slots * 3 // 4 // self.geometry.num_layers

    def gone(self, seen: Observation, kept: frozenset[int] = frozenset()) -> list[ExpertId]:
        """Who leaves before anything is loaded."""
        return [
            e
            for e in self.leaving
            if e in seen.resident
            and not (e.layer == seen.layer and (e.expert in seen.demand or e.expert in kept))
        ]

    def room(self, seen: Observation, gone: Sequence[ExpertId]) -> int:
        """How many copies find room."""
        return self.geometry.slots - len(seen.resident) - len(seen.in_flight) + len(gone)

    def here(self, seen: Observation, gone: Sequence[ExpertId]) -> set[int]:
        """Experts of this layer that are resident and stay for it."""
        copies = {ExpertId(seen.layer, expert) for expert in range(self.geometry.num_experts)}
        return {copy.expert for copy in copies.difference(gone) if copy in seen.resident}

    def coming(self, seen: Observation) -> list[tuple[int, float]]:
        """Active experts on their way, the busiest first, and when each should be there."""
        away = [e for e in busiest_first(seen) if ExpertId(seen.layer, e) in seen.in_flight]
        return [(expert, place * self.costs.transfer_ms) for place, expert in enumerate(away, 1)]

    def idle_copies(self, seen: Observation, split: Split) -> int:
        """How many more copies can begin while this layer runs, after its own and those under way."""
        if self.costs.transfer_ms <= 0:
            return self.geometry.slots
        tokens = max(1, sum(seen.demand.values()) // self.geometry.experts_per_token)
        layer_ms = max(split.device_ms, split.host_ms) + self.costs.layer_ms(tokens)
        return max(0, ceil(layer_ms / self.costs.transfer_ms) - len(split.load) - len(seen.in_flight))

    def ahead(self, seen: Observation, layers: int) -> list[tuple[int, dict[int, int]]]:
        """The next layers, this one excepted, and the whole tokens expected of their experts."""
        number = self.geometry.num_layers
        return [
            ((seen.layer + ahead) % number, {e: max(1, round(x)) for e, x in enumerate(tokens) if x >= 0.5})
            for ahead, tokens in enumerate(seen.forecast[: min(layers, number - 1)], 1)
        ]


@dataclass(frozen=True)
class HybriMoEState(Shares):
    """And the score of each layer's experts."""

    scores: Mapping[int, Mapping[int, float]] = field(default_factory=dict)


class HybriMoE(PolicyBase):
    """Each layer shared out greedily; prefetches by impact; who scored low of late leaves (arXiv 2504.05897).

    The device takes resident experts by falling load, the host the others by rising load, the link the
    busiest of these, and the host resident ones when the device would end last (`balance`). While the link
    would be idle, the experts are prefetched that save one of the next three layers most, each shared out in
    the same way. HybriMoE forecasts with those layers' routers (`predictor="gate"`). Simplified: its cache
    score (Minus Recent Score) averages routing probabilities; only token counts are seen here, so it is the
    moving average of each expert's share of the layer's demand. A layer keeps its share of three quarters
    of the budget, best scores first; the rest is room for experts passing through.
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
        room, here = state.room(seen, gone), state.here(seen, gone)
        coming = state.coming(seen)
        link_ms = len(coming) * state.costs.transfer_ms
        split = balance(state.costs, demand, here & demand.keys(), coming, link_ms=link_ms, loads=room)
        most = min(room - len(split.load), state.idle_copies(seen, split))
        prefetch = with_most_impact(state, seen, most)

        after = sorted(here.union(split.device))
        stay = set(nlargest(state.each, after, key=lambda expert: scores.get(expert, 0.0)))
        state = replace(
            state,
            scores={**state.scores, layer: scores},
            leaving=tuple(ExpertId(layer, expert) for expert in after if expert not in stay),
        )
        load = [ExpertId(layer, expert) for expert in split.load]
        return state, answer(seen, split.device, evict=gone, load=load, prefetch=prefetch)


def with_most_impact(state: Shares, seen: Observation, most: int) -> list[ExpertId]:
    """Experts of the next three layers, each the one whose presence saves its layer most after those before.

    Within a layer that is always the busiest that is absent.
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
    found: list[ExpertId] = []
    while len(found) < most and savings and max(savings) > 0:
        best = savings.index(max(savings))
        number, demand, held, absent = layers[best]
        held.append(absent.pop())
        found.append(ExpertId(number, held[-1]))
        ending[best] -= savings[best]
        savings[best] = ending[best] - ends(demand, [*held, absent[-1]]) if absent else 0.0
    return found


@dataclass(frozen=True)
class DALIState(Shares):
    """And what each layer keeps, with the tokens since that was last changed and over how many passes."""

    kept: Mapping[int, frozenset[int]] = field(default_factory=dict)
    windows: Mapping[int, tuple[int, Mapping[int, int]]] = field(default_factory=dict)


class DALI(PolicyBase):
    """Experts are assigned, cached and prefetched by their workload (arXiv 2602.03495).

    From the busiest on, each expert goes where it would be done first, on the device after its copy if it is
    not there, so that the later of device and host ends soon (`assign`). Of the next layer, what `assign`
    would load is prefetched. Every few passes a layer's cache takes in the experts with the most tokens of
    late, in place of those with the fewest. DALI forecasts with the next layer's router, on a hidden state
    corrected by the mean step of the residual stream between the two layers; `predictor="gate"` stands in.
    Simplified: window and number of swaps, which DALI tunes for each model, are fixed; the first prefill
    fills the cache with what it used most; then swaps and prefetches take the link only while it is idle. A
    layer keeps its share of three quarters of the budget; the rest is room for experts passing through.
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
        room, here = state.room(seen, gone), state.here(seen, gone)
        arrivals = dict(state.coming(seen)) | dict.fromkeys(here, 0.0)
        split = assign(state.costs, demand, arrivals, room)

        room -= len(split.load)
        most = max(0, min(room, state.idle_copies(seen, split)))
        prefetch: list[ExpertId] = []
        for number, expected in state.ahead(seen, 1) if most else ():
            there = {e: 0.0 for e in expected if present(ExpertId(number, e), seen)}
            prefetch += [ExpertId(number, e) for e in assign(state.costs, expected, there, most).load]
        absent = [e for e in kept.difference(here, split.load) if not present(ExpertId(layer, e), seen)]
        # At first the layer's cache is to be filled, however long that takes.
        most = most if layer in state.kept else room
        busiest = sorted(absent, key=lambda e: (-window[1].get(e, 0), e))
        prefetch += [ExpertId(layer, e) for e in busiest[: max(0, most - len(prefetch))]]
        state = replace(
            state,
            kept={**state.kept, layer: kept},
            windows={**state.windows, layer: window},
            leaving=tuple(ExpertId(layer, e) for e in sorted(here.union(split.device) - kept)),
        )
        load = [ExpertId(layer, expert) for expert in split.load]
        return state, answer(seen, split.device, evict=gone, load=load, prefetch=prefetch)


def assign(
    costs: HardwareProfile, demand: Mapping[int, int], there: Mapping[int, float], loads: int
) -> Split:
    """Sends each expert, the busiest first, to where it would be done first.

    Args:
        costs: of an expert.
        demand: expert -> tokens.
        there: experts on the device or on their way, with the ms until they are there.
        loads: most that may be loaded; one after the other, after all that is on its way.

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
        # The device takes experts as they come: it ends when all are done, and the last to come is.
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
    """What a layer keeps after this pass, and its window: passes and tokens since that last changed."""
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
