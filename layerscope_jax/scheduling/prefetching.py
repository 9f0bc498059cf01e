"""Policies that copy experts of the coming layers ahead of their turn, as a predictor forecasts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, filterfalse, islice

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import answer, busiest_first, expected_next, need_a_layer, present
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase


@dataclass(frozen=True)
class RecentState:
    """The model's shape, and what was used or prefetched, least recently first (the order of a dict)."""

    geometry: Geometry
    recent: dict[ExpertId, None] = field(default_factory=dict)


def ahead_of_lru(
    state: RecentState, seen: Observation, coming: Sequence[ExpertId], most: int
) -> tuple[RecentState, LayerPlan]:
    """LRU for what is needed now; prefetches at most so many of what is coming.

    A prefetch pushes out nothing that is needed or coming; demand pushes out what is coming last of all.

    Args:
        state: the policy's.
        seen: the layer.
        coming: experts of later layers, the one that should be there first in front.
        most: limit of prefetches; what is absent beyond it waits for the next layer.
    """
    wanted = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
    needed = set(wanted)
    coming = list(dict.fromkeys(expert for expert in coming if expert not in needed))
    missing = [expert for expert in wanted if not present(expert, seen)]
    absent = [expert for expert in coming if not present(expert, seen)][: max(0, most)]
    free = state.geometry.slots - len(seen.resident) - len(seen.in_flight)
    idle: list[ExpertId] = []
    last: list[ExpertId] = []
    if len(missing) + len(absent) > free:
        kept = needed.union(coming)
        # Experts that came in some other way were never used: they go first. Of what is coming, which goes
        # last and for demand alone, the last in line first.
        unknown = sorted(filterfalse(state.recent.__contains__, seen.resident))
        leaving = (e for e in chain(unknown, state.recent) if e in seen.resident and e not in kept)
        idle = list(islice(leaving, len(missing) + len(absent) - free))
        last = [expert for expert in reversed(coming) if expert in seen.resident]
    load = missing[: max(0, free + len(idle) + len(last))]
    short = max(0, len(load) - free)
    evict, idle = (idle + last)[:short], idle[short:]
    spare = max(0, free - len(load))
    prefetch = absent[: spare + len(idle)]
    evict += idle[: max(0, len(prefetch) - spare)]
    host = set(missing).difference(load)
    recent = dict(state.recent)
    for expert in evict:
        recent.pop(expert, None)
    for expert in (*reversed(prefetch), *reversed(wanted)):
        recent.pop(expert, None)
        recent[expert] = None
    return replace(state, recent=recent), answer(
        seen, [e.expert for e in wanted if e not in host], evict=evict, load=load, prefetch=prefetch
    )


def room_ahead(seen: Observation, geometry: Geometry) -> int:
    """How many prefetches may be sent off so that the next layer finds room for all of its experts.

    What is on its way when a layer is planned can not be made to leave.
    """
    away = sum(not (e.layer == seen.layer and e.expert in seen.demand) for e in seen.in_flight)
    return max(0, geometry.slots - geometry.num_experts - away)


class Fate(PolicyBase):
    """LRU that also prefetches what the next layer is expected to use (arXiv 2502.12224).

    An expert of the next layer is copied ahead if half a token or more is expected for it, most tokens first,
    as long as that pushes out nothing of this layer or of the forecast. Fate forecasts with the next layer's
    router (`predictor="gate"`); any predictor will do. Simplified: the cache is LRU for all layers alike,
    experts cross the link at full precision, and what finds no room is computed on the host.
    """

    name = "fate"

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> RecentState:
        return RecentState(geometry)

    def plan(self, state: RecentState, seen: Observation) -> tuple[RecentState, LayerPlan]:
        return ahead_of_lru(state, seen, expected_next(seen, state.geometry), state.geometry.slots)


class ProMoE(PolicyBase):
    """LRU that keeps prefetching for several layers ahead; everything on the device (arXiv 2410.22134).

    The nearest layer comes first, in it the expert with the most tokens. Demand overtakes prefetches, and
    what is already there is computed first, as in every plan. ProMoE forecasts with a small trained network
    a layer, some layers ahead (its stride); give it a trained predictor, or `predictor="gate"`. Simplified:
    every forecast layer counts, not only the one a stride away; one LRU cache for all layers instead of one a
    layer; experts cross the link whole or in matrices, as the engine has it.
    """

    name = "promoe"

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> RecentState:
        need_a_layer(geometry, self.name)
        return RecentState(geometry)

    def plan(self, state: RecentState, seen: Observation) -> tuple[RecentState, LayerPlan]:
        coming = expected_next(seen, state.geometry, len(seen.forecast))
        return ahead_of_lru(state, seen, coming, room_ahead(seen, state.geometry))


@dataclass(frozen=True)
class KlotskiState:
    """The model's shape, how many layers (the first ones) stay whole, and what is there of the others."""

    geometry: Geometry
    kept_layers: int
    passed: tuple[ExpertId, ...] = ()


class Klotski(PolicyBase):
    """Hot experts of the next layer ahead; computing them hides the loads of the cold (arXiv 2502.06888).

    All prompts of a batch go through an expert together. As many experts of the next layer as a token has are
    prefetched, those with the most expected tokens; they are computed first, while the others are loaded, the
    busiest first. An expert that was used is given up at once. Nothing is computed on the host. What memory
    is left beyond two layers keeps the first layers whole. Klotski forecasts with a table of which experts
    followed which in a test run; `predictor="gate"` stands in. Simplified: the batch is the caller's choice
    (Klotski plans how many to run together), and there is no disk.
    """

    name = "klotski"

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> KlotskiState:
        need_a_layer(geometry, self.name)
        return KlotskiState(geometry, max(0, geometry.slots // geometry.num_experts - 2))

    def plan(self, state: KlotskiState, seen: Observation) -> tuple[KlotskiState, LayerPlan]:
        geometry = state.geometry
        wanted = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
        hot = [e for e in expected_next(seen, geometry)[: geometry.experts_per_token] if e not in wanted]
        kept = {*wanted, *hot}
        evict = [expert for expert in state.passed if expert in seen.resident and expert not in kept]
        missing = [expert for expert in wanted if not present(expert, seen)]
        free = geometry.slots - len(seen.resident) - len(seen.in_flight) + len(evict)
        if len(missing) > free:
            # Something came in some other way, or is still on its way: all that is not needed now may go.
            others = (expert for expert in seen.resident if expert not in evict and expert not in wanted)
            more = sorted(others, key=lambda e: (e in hot, e.layer < state.kept_layers, e))
            evict += more[: len(missing) - free]
            free += len(more[: len(missing) - free])
        load = missing[:free]
        room = min(free - len(load), room_ahead(seen, geometry))
        prefetch = [expert for expert in hot if not present(expert, seen)][:room]
        host = set(missing).difference(load)
        device = [expert for expert in wanted if expert not in host]
        left = {e for e in state.passed if present(e, seen)}.difference(evict)
        passed = sorted(left.union(device, prefetch))
        return replace(state, passed=tuple(e for e in passed if e.layer >= state.kept_layers)), answer(
            seen, [expert.expert for expert in device], evict=evict, load=load, prefetch=prefetch
        )
