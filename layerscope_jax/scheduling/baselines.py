"""Published ways of placing experts, each a short class behind the `Policy` contract."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import busiest_first, need_a_layer, present
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.prefetching import Fate


class Resident:
    """Everything in device memory, nothing moves: the oracle of the others."""

    name = "resident"
    uses_costs = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> None:
        total = geometry.num_layers * geometry.num_experts
        if geometry.slots < total:
            raise ValueError(
                f"policy 'resident' needs a device_budget for all {total} experts "
                f"({total * geometry.expert_bytes:,} bytes), got room for {geometry.slots}"
            )

    def plan(self, state: None, seen: Observation) -> tuple[None, LayerPlan]:
        return None, LayerPlan(step=seen.step, layer=seen.layer, device=tuple(busiest_first(seen)))


class HostOnly:
    """Every expert on the host's CPU; the device keeps the dense layers (llama.cpp's `--cpu-moe`)."""

    name = "host-only"
    uses_costs = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> None:
        return None

    def plan(self, state: None, seen: Observation) -> tuple[None, LayerPlan]:
        return None, LayerPlan(step=seen.step, layer=seen.layer, host=tuple(busiest_first(seen)))


class OnDemand:
    """Copies each active expert when it is needed and keeps none: the floor that caching must beat."""

    name = "on-demand"
    uses_costs = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> None:
        need_a_layer(geometry, self.name)

    def plan(self, state: None, seen: Observation) -> tuple[None, LayerPlan]:
        device = tuple(busiest_first(seen))
        wanted = tuple(ExpertId(seen.layer, expert) for expert in device)
        return None, LayerPlan(
            step=seen.step,
            layer=seen.layer,
            device=device,
            evict=tuple(sorted(set(seen.resident) - set(wanted))),
            load=tuple(expert for expert in wanted if not present(expert, seen)),
        )


@dataclass(frozen=True)
class LRUState:
    """Room on the device, and what was used there, least recently used first (the keys of a dict)."""

    slots: int
    order: dict[ExpertId, None] = field(default_factory=dict)


class LRU:
    """Copies what is missing and keeps it until the least recently used must make room."""

    name = "lru"
    uses_costs = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> LRUState:
        need_a_layer(geometry, self.name)
        return LRUState(geometry.slots)

    def plan(self, state: LRUState, seen: Observation) -> tuple[LRUState, LayerPlan]:
        device = tuple(busiest_first(seen))
        wanted = [ExpertId(seen.layer, expert) for expert in device]
        load = tuple(expert for expert in wanted if not present(expert, seen))
        excess = len(seen.resident) + len(seen.in_flight) + len(load) - state.slots
        evict = []
        if excess > 0:
            needed = set(wanted)
            # Experts that came in some other way were never used: they go first.
            unknown = sorted(expert for expert in seen.resident if expert not in state.order)
            for expert in (*unknown, *state.order):
                if expert in seen.resident and expert not in needed:
                    evict.append(expert)
                    if len(evict) == excess:
                        break
        touched = dict.fromkeys(reversed(wanted))  # within a layer, the least busy count as least recent
        gone = touched.keys() | set(evict)
        order = {expert: None for expert in state.order if expert not in gone} | touched
        return LRUState(state.slots, order), LayerPlan(
            step=seen.step, layer=seen.layer, device=device, evict=tuple(evict), load=load
        )


@dataclass(frozen=True)
class FiddlerState:
    """Costs, room, and the hot set, which is fixed for a layer once that layer has been seen."""

    profile: HardwareProfile
    slots: int
    hot_per_layer: int
    hot: frozenset[ExpertId] = frozenset()
    layers: frozenset[int] = frozenset()


class Fiddler:
    """A fixed hot set on the device; each missing expert goes where it is done first (arXiv 2402.07033).

    Missing experts are computed on the host, or copied and computed on the device, whichever the measured
    costs say takes less time; a copy made for one layer is given up after it. Simplified: the popularity that
    places the hot set is that of the first prefill, instead of an offline calibration text; the hot set takes
    three quarters of the budget, evenly over the layers, the rest is room for experts passing through.
    """

    name = "fiddler"
    uses_costs = True

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> FiddlerState:
        if profile is None:
            raise ValueError("policy 'fiddler' weighs costs: it needs a HardwareProfile, got None")
        return FiddlerState(profile, geometry.slots, geometry.slots * 3 // 4 // geometry.num_layers)

    def plan(self, state: FiddlerState, seen: Observation) -> tuple[FiddlerState, LayerPlan]:
        layer, demand = seen.layer, seen.demand
        order = busiest_first(seen)
        if layer not in state.layers:
            hot = (ExpertId(layer, expert) for expert in order[: state.hot_per_layer])
            state = replace(state, hot=state.hot | frozenset(hot), layers=state.layers | {layer})
        passed = tuple(
            sorted(
                e
                for e in seen.resident
                if e not in state.hot and not (e.layer == layer and e.expert in demand)
            )
        )
        room = state.slots - (len(seen.resident) - len(passed)) - len(seen.in_flight)
        device, load = [], []
        for expert in order:
            copy = ExpertId(layer, expert)
            if present(copy, seen):
                device.append(expert)
            elif room > 0 and (copy in state.hot or device_is_faster(state.profile, demand[expert])):
                device.append(expert)
                load.append(copy)
                room -= 1
        on_device = set(device)
        return state, LayerPlan(
            step=seen.step,
            layer=layer,
            device=tuple(device),
            host=tuple(expert for expert in order if expert not in on_device),
            evict=passed,
            load=tuple(load),
        )


def device_is_faster(profile: HardwareProfile, tokens: int) -> bool:
    """Whether copying an expert and computing it on the device takes less time than the host needs."""
    return profile.transfer_ms + profile.device_ms(tokens) < profile.host_ms(tokens)


POLICIES = {policy.name: policy for policy in (OnDemand, LRU, HostOnly, Fiddler, Fate, Resident)}
"""Policies by name, as `OffloadConfig.policy` takes them."""

FORECASTING = frozenset({Fate.name})
"""Those that make use of a predictor."""
