"""PreSched as published in the LayerScope paper (arXiv 2509.23638), for comparison with the default."""

from __future__ import annotations

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import answer, busiest_first, need_costs, present
from layerscope_jax.scheduling.hybrid import HotTable
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase

LOOK_AHEAD = 2


class PaperPreSched(PolicyBase):
    """Queues this layer's demand and the next layers' forecast together, most tokens first.

    This layer's missing experts are copied while `copies * transfer + device time < host time of the rest`
    (on-demand loading is monotone in tokens); the forecast ones fill the gap between host and device time and
    the next attention. An expert outside the hot-expert table is evicted after its layer. Simplified: the
    table takes three quarters of the budget, split evenly between layers, and is made by the first prefill;
    the rest is one buffer for loads and prefetches, where the paper keeps two groups.
    """

    name = "presched-paper"
    uses_costs = True

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> HotTable:
        return HotTable(need_costs(profile, self.name), geometry)

    def plan(self, state: HotTable, seen: Observation) -> tuple[HotTable, LayerPlan]:
        costs, layer, demand = state.costs, seen.layer, seen.demand
        order = busiest_first(seen)
        state = state.with_layer(layer, order)
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
        loaded = {copy.expert for copy in load}
        device = [expert for expert in order if expert not in missing or expert in loaded]
        return state, answer(seen, device, evict=leave, load=load, prefetch=prefetch)

    def _forecast(self, geometry: Geometry, seen: Observation) -> list[ExpertId]:
        """Returns experts of the next layers with half an expected token or more, most tokens first."""
        expected = [
            (tokens, ExpertId((seen.layer + 1 + ahead) % geometry.num_layers, expert))
            for ahead, row in enumerate(seen.forecast[: min(LOOK_AHEAD, geometry.num_layers - 1)])
            for expert, tokens in enumerate(row)
            if tokens >= 0.5
        ]
        return [expert for _, expert in sorted(expected, key=lambda item: (-item[0], item[1]))]
