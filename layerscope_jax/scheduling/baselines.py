"""All policies by name; and those that weigh nothing: all on the device, all on the host, on demand."""

from __future__ import annotations

from layerscope_jax.scheduling.balanced import DALI, HybriMoE
from layerscope_jax.scheduling.caching import ARC, LFU, LRU, LeastStale
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import busiest_first, need_a_layer, present
from layerscope_jax.scheduling.guard import Guard
from layerscope_jax.scheduling.hybrid import BandwidthSplit, Fiddler
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation, Policy
from layerscope_jax.scheduling.prefetching import Fate, Klotski, ProMoE
from layerscope_jax.scheduling.presched import PreSched
from layerscope_jax.scheduling.presched_paper import PaperPreSched


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


POLICIES = {
    policy.name: policy
    for policy in (
        OnDemand,
        LRU,
        LFU,
        ARC,
        LeastStale,
        HostOnly,
        Fiddler,
        BandwidthSplit,
        HybriMoE,
        DALI,
        Fate,
        ProMoE,
        Klotski,
        PaperPreSched,
        PreSched,
        Guard,
        Resident,
    )
}
"""Policies by name, as `OffloadConfig.policy` takes them."""

FORECASTING = frozenset(
    policy.name for policy in (HybriMoE, DALI, Fate, ProMoE, Klotski, PaperPreSched, PreSched, Guard)
)
"""Those that make use of a predictor."""


def make_policy(policy: str | Policy) -> Policy:
    """A policy from its name, or the object itself.

    Raises:
        ValueError: with the names there are, if it is neither.
    """
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]()
    parts = ("name", "uses_costs", "init", "plan")
    if isinstance(policy, str | type) or not all(hasattr(policy, part) for part in parts):
        hint = "; make an object of the class" if isinstance(policy, type) else ""
        raise ValueError(
            f"policy must be one of {', '.join(sorted(POLICIES))} or a Policy object, with "
            f"{', '.join(parts)}, got {policy!r}{hint}"
        )
    return policy
