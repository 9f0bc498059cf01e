"""The cache inside the step: what a jitted step does by itself, as a policy that plans layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from layerscope_jax.scheduling.caching import LRU, CacheState
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId, Geometry, Observation


@dataclass(frozen=True)
class SharedState(CacheState):
    """A `CacheState` whose slots are divided evenly among the layers."""

    share: int = 1


class InStep(LRU):
    """Each layer has a cache of its own, which evicts its least recently used expert.

    Where a step can keep such a cache by itself (`layerscope_jax.runtime.in_step`), a decode step is one
    program, and what is missing is copied within it: Python plans nothing between its layers. Prefills, and
    decode steps where that is not possible, are planned here, one layer after the other.
    """

    name = "in-step"

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> SharedState:
        state = super().init(geometry, profile)
        return SharedState(state.slots, share=max(1, state.slots // geometry.num_layers))

    def victims(
        self, state: CacheState, seen: Observation, idle: Iterable[ExpertId], count: int
    ) -> Iterable[ExpertId]:
        """Returns the layer's own experts first, then those of layers that hold more than their share."""
        assert isinstance(state, SharedState)
        held = Counter(expert.layer for expert in seen.resident)
        kept = list(idle)
        own = [expert for expert in kept if expert.layer == seen.layer]
        others = [expert for expert in kept if expert.layer != seen.layer]
        return own + sorted(others, key=lambda expert: held[expert.layer] <= state.share)


def slots_beside(geometry: Geometry) -> int:
    """Returns the slots of each layer that a step keeps beside the room in which a prefill streams a layer.

    Args:
        geometry: of the model; `slots` are those of the whole budget.

    Raises:
        ValueError: if there is not one for each layer.

    >>> slots_beside(Geometry(num_layers=4, num_experts=8, experts_per_token=2, expert_bytes=1, slots=21))
    3
    """
    streamed = geometry.num_experts
    result = (geometry.slots - streamed) // geometry.num_layers
    if result < 1:
        least = streamed + geometry.num_layers
        raise ValueError(
            f"device_budget is too small for policy 'in-step': it keeps {streamed} slots for the layer that "
            f"a prefill streams and at least one for each of {geometry.num_layers} layers, {least} together "
            f"({least * geometry.expert_bytes:,} bytes), but the budget holds {geometry.slots} experts; "
            "raise it, or use policy 'fiddler' or 'host-only'"
        )
    return min(result, geometry.num_experts)
