"""Policies that copy experts of the coming layers ahead of their turn, as a predictor forecasts them."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import busiest_first, expected_next, present
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation


@dataclass(frozen=True)
class FateState:
    """The model's shape, and what was used or prefetched, least recently first (the keys of a dict)."""

    geometry: Geometry
    recent: dict[ExpertId, None] = field(default_factory=dict)


class Fate:
    """LRU that also prefetches what the next layer is expected to use (arXiv 2502.12224).

    An expert of the next layer is copied ahead if half a token or more is expected for it, most tokens first,
    as long as that pushes out nothing of this layer or of the forecast. Fate forecasts with the next layer's
    router (`predictor="gate"`); any predictor will do. Simplified: the cache is LRU for all layers alike,
    experts cross the link at full precision, and what finds no room is computed on the host.
    """

    name = "fate"
    uses_costs = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> FateState:
        return FateState(geometry)

    def plan(self, state: FateState, seen: Observation) -> tuple[FateState, LayerPlan]:
        order = busiest_first(seen)
        wanted = [ExpertId(seen.layer, expert) for expert in order]
        coming = expected_next(seen, state.geometry)
        free = state.geometry.slots - len(seen.resident) - len(seen.in_flight)
        # Experts that came in some other way were never used: they go first. Of the forecast's, which go
        # last and for demand alone, the least expected first.
        unknown = sorted(expert for expert in seen.resident if expert not in state.recent)
        kept = {*wanted, *coming}
        idle = [e for e in (*unknown, *state.recent) if e in seen.resident and e not in kept]
        last = [e for e in reversed(coming) if e in seen.resident and e not in wanted]
        load = [e for e in wanted if not present(e, seen)][: max(0, free + len(idle) + len(last))]
        short = max(0, len(load) - free)
        evict, idle = (idle + last)[:short], idle[short:]
        spare = max(0, free - len(load))
        absent = [e for e in coming if not present(e, seen)]
        prefetch = absent[: spare + len(idle)]
        evict += idle[: max(0, len(prefetch) - spare)]
        device = [e.expert for e in wanted if e in load or present(e, seen)]
        moved = {*evict, *wanted, *prefetch}
        recent = {expert: None for expert in state.recent if expert not in moved}
        recent |= dict.fromkeys([*reversed(prefetch), *reversed(wanted)])
        return FateState(state.geometry, recent), LayerPlan(
            step=seen.step,
            layer=seen.layer,
            device=tuple(device),
            host=tuple(expert for expert in order if expert not in device),
            evict=tuple(evict),
            load=tuple(load),
            prefetch=tuple(prefetch),
        )
