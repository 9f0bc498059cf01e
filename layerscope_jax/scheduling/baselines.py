"""Policies without costs: everything on the device, everything on the host, on demand."""

from __future__ import annotations

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import busiest_first, need_a_layer, present
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase


class Resident(PolicyBase):
    """Keeps every expert in device memory and moves nothing: the reference for the other policies."""

    name = "resident"
    uses_forecasts = False
    uses_host = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> None:
        total = geometry.total_experts
        if geometry.slots < total:
            raise ValueError(
                f"policy 'resident' needs a device_budget for all {total} experts "
                f"({total * geometry.expert_bytes:,} bytes), got room for {geometry.slots}"
            )

    def plan(self, state: None, seen: Observation) -> tuple[None, LayerPlan]:
        return None, LayerPlan(step=seen.step, layer=seen.layer, device=tuple(busiest_first(seen)))


class HostOnly(PolicyBase):
    """Computes every expert on the host's CPU, the dense layers on the device (llama.cpp's `--cpu-moe`)."""

    name = "host-only"
    uses_forecasts = False
    uses_device = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> None:
        return None

    def plan(self, state: None, seen: Observation) -> tuple[None, LayerPlan]:
        return None, LayerPlan(step=seen.step, layer=seen.layer, host=tuple(busiest_first(seen)))


class OnDemand(PolicyBase):
    """Copies each active expert when it is needed and keeps none: the baseline that caching must beat."""

    name = "on-demand"
    uses_forecasts = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> None:
        need_a_layer(geometry, self.name)

    def plan(self, state: None, seen: Observation) -> tuple[None, LayerPlan]:
        device = tuple(busiest_first(seen))
        active = tuple(ExpertId(seen.layer, expert) for expert in device)
        return None, LayerPlan(
            step=seen.step,
            layer=seen.layer,
            device=device,
            evict=tuple(sorted(set(seen.resident) - set(active))),
            load=tuple(expert for expert in active if not present(expert, seen)),
        )
