"""Policies that copy a missing expert or leave it to the host, by a fixed rule on their costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerscope_jax.scheduling.caching import Cache, CacheState
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import answer, busiest_first, need_costs, present
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase


@dataclass(frozen=True)
class HotTable:
    """Costs, model shape, and the hot experts, which are fixed when their layer is first planned.

    Hot experts take three quarters of the budget, split evenly between layers.
    """

    costs: HardwareProfile
    geometry: Geometry
    hot: frozenset[ExpertId] = frozenset()
    layers: frozenset[int] = frozenset()

    def with_layer(self, layer: int, order: Sequence[int]) -> HotTable:
        """Returns the table with a layer's hot experts, chosen from `order` when it is first planned."""
        if layer in self.layers:
            return self
        each = self.geometry.slots * 3 // 4 // self.geometry.num_layers
        hot = self.hot.union(ExpertId(layer, expert) for expert in order[:each])
        return replace(self, hot=hot, layers=self.layers | {layer})


class Fiddler(PolicyBase):
    """Keeps a fixed hot set on the device; the faster side computes each missing expert (arXiv 2402.07033).

    Missing experts are computed on the host, or copied and computed on the device, whichever the measured
    costs say takes less time; a copy made for one layer is evicted after it. Simplified: the hot set is
    chosen by the first prefill instead of an offline calibration text; it takes three quarters of the budget,
    split evenly between layers, and the rest is room for experts that are evicted soon.
    """

    name = "fiddler"
    uses_costs = True
    uses_forecasts = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> HotTable:
        return HotTable(need_costs(profile, self.name), geometry)

    def plan(self, state: HotTable, seen: Observation) -> tuple[HotTable, LayerPlan]:
        layer, demand = seen.layer, seen.demand
        order = busiest_first(seen)
        state = state.with_layer(layer, order)
        passed = sorted(
            e for e in seen.resident if e not in state.hot and not (e.layer == layer and e.expert in demand)
        )
        room = state.geometry.slots - (len(seen.resident) - len(passed)) - len(seen.in_flight)
        device, load = [], []
        for expert in order:
            copy = ExpertId(layer, expert)
            if present(copy, seen):
                device.append(expert)
            elif room > 0 and (copy in state.hot or device_is_faster(state.costs, demand[expert])):
                device.append(expert)
                load.append(copy)
                room -= 1
        return state, answer(seen, device, evict=passed, load=load)


def device_is_faster(profile: HardwareProfile, tokens: int) -> bool:
    """Whether copying an expert and computing it on the device takes less time than the host needs."""
    return profile.transfer_ms + profile.device_ms(tokens) < profile.host_ms(tokens)


@dataclass(frozen=True)
class SplitState(CacheState):
    """The state of a cache, and the share of misses that is copied."""

    share: float = 0.0


class BandwidthSplit(Cache):
    """LRU that copies a fixed share of a decode step's misses; the host computes the rest (FreeToken).

    The share q* (arXiv 2608.16157) is the one at which link and host end together: h / (h + t), for h ms that
    the host takes for an expert with one token and t ms that a copy takes, or the device if that is slower.
    The busiest experts are copied. In a prefill every missing expert is copied, as far as there is room.
    Simplified: both times come from the profile, where FreeToken measures them against each other.
    """

    name = "bandwidth-split"
    uses_costs = True

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> SplitState:
        costs = need_costs(profile, self.name)
        host, link = costs.host_ms(1), max(costs.transfer_ms, costs.device_ms(1))
        return SplitState(geometry.slots, share=host / (host + link) if host + link > 0 else 1.0)

    def copies(self, state: CacheState, seen: Observation, missing: int) -> int:
        assert isinstance(state, SplitState)
        return missing if seen.phase == "prefill" else round(state.share * missing)
