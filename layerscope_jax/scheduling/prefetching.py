"""Policies that prefetch experts of the next layers by a predictor's forecast."""

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
    """Model shape, and the experts that were used or prefetched, least recent first."""

    geometry: Geometry
    recent: dict[ExpertId, None] = field(default_factory=dict)


def ahead_of_lru(
    state: RecentState, seen: Observation, coming: Sequence[ExpertId], most: int
) -> tuple[RecentState, LayerPlan]:
    """Plans a layer as LRU, and prefetches at most `most` of the experts in `coming`.

    A prefetch never evicts an expert that is needed or coming. On-demand loads evict coming ones last.

    Args:
        state: of the policy.
        seen: the layer to plan.
        coming: experts of later layers, the one needed first in front.
        most: limit of prefetches; the others are left to the next layer's plan.
    """
    active = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
    needed = set(active)
    coming = list(dict.fromkeys(expert for expert in coming if expert not in needed))
    missing = [expert for expert in active if not present(expert, seen)]
    absent = [expert for expert in coming if not present(expert, seen)][: max(0, most)]
    free = state.geometry.slots - len(seen.resident) - len(seen.in_flight)
    idle: list[ExpertId] = []
    last: list[ExpertId] = []
    if len(missing) + len(absent) > free:
        kept = needed.union(coming)
        # Experts that this policy did not load were never used: they are evicted first. Coming ones are
        # evicted last, and for on-demand loads alone, the one needed last first.
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
    for expert in (*reversed(prefetch), *reversed(active)):
        recent.pop(expert, None)
        recent[expert] = None
    return replace(state, recent=recent), answer(
        seen, [e.expert for e in active if e not in host], evict=evict, load=load, prefetch=prefetch
    )


def room_ahead(seen: Observation, geometry: Geometry) -> int:
    """Returns how many prefetches leave enough room for all experts of the next layer.

    An expert in flight cannot be evicted when that layer is planned.
    """
    away = sum(not (e.layer == seen.layer and e.expert in seen.demand) for e in seen.in_flight)
    return max(0, geometry.slots - geometry.num_experts - away)


class Fate(PolicyBase):
    """LRU that also prefetches the experts that the next layer is expected to use (arXiv 2502.12224).

    An expert of the next layer is prefetched if half a token or more is expected for it, most tokens first,
    as long as nothing of this layer or of the forecast is evicted for it. Fate forecasts with the next
    layer's router (`predictor="gate"`); any predictor will do. Simplified: one LRU cache for all layers,
    experts are copied at full precision, and the host computes what finds no room.
    """

    name = "fate"

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> RecentState:
        return RecentState(geometry)

    def plan(self, state: RecentState, seen: Observation) -> tuple[RecentState, LayerPlan]:
        return ahead_of_lru(state, seen, expected_next(seen, state.geometry), state.geometry.slots)


class ProMoE(PolicyBase):
    """LRU that prefetches for several layers ahead and computes on the device only (arXiv 2410.22134).

    The nearest layer comes first, in it the expert with the most tokens. On-demand loads overtake prefetches,
    and resident experts are computed first, as in every plan. ProMoE forecasts with a small trained network
    for each layer, some layers ahead (its stride); give it a trained predictor, or `predictor="gate"`.
    Simplified: every forecast layer counts, not only the one a stride away; one LRU cache for all layers
    instead of one for each; experts are copied matrix by matrix, as the engine does.
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
    """Model shape, the number of first layers that stay whole, and the resident experts of the others."""

    geometry: Geometry
    kept_layers: int
    passed: tuple[ExpertId, ...] = ()


class Klotski(PolicyBase):
    """Prefetches the next layer's hot experts; computing them hides the loads of the cold (arXiv 2502.06888).

    All prompts of a batch go through an expert together. The K experts of the next layer with the most
    expected tokens are prefetched; they are computed first, while the others are loaded, the busiest first.
    An expert is evicted as soon as it was used. Nothing is computed on the host. Memory beyond two layers
    keeps the first layers whole. Klotski forecasts with a table of which experts followed which in a test
    run; `predictor="gate"` stands in. Simplified: the caller chooses the batch (Klotski plans how many to run
    together), and there is no disk tier.
    """

    name = "klotski"

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> KlotskiState:
        need_a_layer(geometry, self.name)
        return KlotskiState(geometry, max(0, geometry.slots // geometry.num_experts - 2))

    def plan(self, state: KlotskiState, seen: Observation) -> tuple[KlotskiState, LayerPlan]:
        geometry = state.geometry
        active = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
        hot = [e for e in expected_next(seen, geometry)[: geometry.experts_per_token] if e not in active]
        kept = {*active, *hot}
        evict = [expert for expert in state.passed if expert in seen.resident and expert not in kept]
        missing = [expert for expert in active if not present(expert, seen)]
        free = geometry.slots - len(seen.resident) - len(seen.in_flight) + len(evict)
        if len(missing) > free:
            # Something was loaded by others, or is still in flight: everything not needed now may be evicted.
            others = (expert for expert in seen.resident if expert not in evict and expert not in active)
            more = sorted(others, key=lambda e: (e in hot, e.layer < state.kept_layers, e))
            evict += more[: len(missing) - free]
            free += len(more[: len(missing) - free])
        load = missing[:free]
        room = min(free - len(load), room_ahead(seen, geometry))
        prefetch = [expert for expert in hot if not present(expert, seen)][:room]
        host = set(missing).difference(load)
        device = [expert for expert in active if expert not in host]
        left = {e for e in state.passed if present(e, seen)}.difference(evict)
        passed = sorted(left.union(device, prefetch))
        return replace(state, passed=tuple(e for e in passed if e.layer >= state.kept_layers)), answer(
            seen, [expert.expert for expert in device], evict=evict, load=load, prefetch=prefetch
        )
