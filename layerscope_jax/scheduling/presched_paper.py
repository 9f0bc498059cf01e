"""PreSched as the LayerScope paper has it (arXiv 2509.23638), for comparison with the default."""

from __future__ import annotations

from dataclasses import dataclass, replace

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import busiest_first, present
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation

LOOK_AHEAD = 2


@dataclass(frozen=True)
class PaperState:
    """Costs, shape, and the hot-expert table, which is fixed for a layer once that layer has been seen."""

    costs: HardwareProfile
    geometry: Geometry
    hot_per_layer: int
    hot: frozenset[ExpertId] = frozenset()
    layers: frozenset[int] = frozenset()


class PaperPreSched:
    """A joint queue of this layer's known and the next layers' forecast demand, most tokens first.

    This layer's missing experts are copied while `copies * transfer + device time < host time of the rest`
    (on-demand loading is monotone in tokens); the forecast ones fill the gap between host and device time and
    the next attention. What is not in the hot-expert table leaves after its layer. Simplified: the table
    takes three quarters of the budget, evenly over the layers, and is made of the first prefill; the rest is
    one buffer for loads and prefetches, where the paper keeps two groups.
    """

    name = "presched-paper"
    uses_costs = True

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> PaperState:
        if profile is None:
            raise ValueError(f"policy {self.name!r} weighs costs: it needs a HardwareProfile, got None")
        return PaperState(profile, geometry, geometry.slots * 3 // 4 // geometry.num_layers)

    def plan(self, state: PaperState, seen: Observation) -> tuple[PaperState, LayerPlan]:
        costs, layer, demand = state.costs, seen.layer, seen.demand
        order = busiest_first(seen)
        if layer not in state.layers:
            hot = (ExpertId(layer, expert) for expert in order[: state.hot_per_layer])
            state = replace(state, hot=state.hot | frozenset(hot), layers=state.layers | {layer})
        coming = self._forecast(state.geometry, seen)
        near = {(layer + 1 + ahead) % state.geometry.num_layers for ahead in range(LOOK_AHEAD)}
        leave = [
            expert
            for expert in sorted(seen.resident)
            if expert not in state.hot
            and not (expert.layer == layer and expert.expert in demand)
            and expert.layer not in near
        ]
        room = state.geometry.slots - (len(seen.resident) - len(leave)) - len(seen.in_flight)

        missing = [expert for expert in order if not present(ExpertId(layer, expert), seen)]
        device_ms = sum(costs.device_ms(demand[e]) for e in order if present(ExpertId(layer, e), seen))
        host_ms = sum(costs.host_ms(demand[expert]) for expert in missing)
        load: list[ExpertId] = []
        for expert in missing:
            rest_ms = host_ms - costs.host_ms(demand[expert])
            transfers_ms = (len(load) + 1) * costs.transfer_ms
            pays = transfers_ms + device_ms + costs.device_ms(demand[expert]) < rest_ms
            if len(load) >= room or not (pays or ExpertId(layer, expert) in state.hot):
                continue
            load.append(ExpertId(layer, expert))
            host_ms, device_ms = rest_ms, device_ms + costs.device_ms(demand[expert])

        tokens = sum(demand.values()) / state.geometry.experts_per_token
        gap_ms = host_ms - device_ms - len(load) * costs.transfer_ms + costs.layer_ms(round(tokens))
        fitting = max(0, int(gap_ms / max(costs.transfer_ms, 1e-6)))
        absent = [e for e in coming if not present(e, seen)]
        prefetch = absent[: min(fitting, max(0, room - len(load)))]
        host = [expert for expert in missing if ExpertId(layer, expert) not in load]
        return state, LayerPlan(
            step=seen.step,
            layer=layer,
            device=tuple(expert for expert in order if expert not in host),
            host=tuple(host),
            evict=tuple(leave),
            load=tuple(load),
            prefetch=tuple(prefetch),
        )

    def _forecast(self, geometry: Geometry, seen: Observation) -> list[ExpertId]:
        """Experts of the next layers that half a token or more is expected for, most tokens first."""
        found = [
            (tokens, ExpertId((seen.layer + 1 + ahead) % geometry.num_layers, expert))
            for ahead, row in enumerate(seen.forecast[: min(LOOK_AHEAD, geometry.num_layers - 1)])
            for expert, tokens in enumerate(row)
            if tokens >= 0.5
        ]
        return [expert for _, expert in sorted(found, key=lambda item: (-item[0], item[1]))]
