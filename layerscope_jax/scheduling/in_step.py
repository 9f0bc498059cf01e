"""The cache inside the step: what a jitted step does by itself, as a policy that plans layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from layerscope_jax.scheduling.caching import LRU, CacheState
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation


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


@dataclass(frozen=True)
class StreamState(SharedState):
    """A `SharedState` that knows how many layers and experts there are."""

    layers: int = 1
    experts: int = 1


class Streaming(InStep):
    """Plans prefills beside a step that keeps the cache: while a layer is computed, the next one is copied.

    It does so where the room holds two layers, and a layer has tokens for most of its experts: then the next
    one will, too. Experts that are there already are not copied again. At the last layer nothing is copied
    ahead, as what comes next may be a decode step, which does not read this room.
    """

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> StreamState:
        state = super().init(geometry, profile)
        return StreamState(
            state.slots, share=state.share, layers=geometry.num_layers, experts=geometry.num_experts
        )

    def plan(self, state: CacheState, seen: Observation) -> tuple[CacheState, LayerPlan]:
        state, plan = super().plan(state, seen)
        assert isinstance(state, StreamState)
        most = len(seen.demand) >= MOST * state.experts
        if seen.phase == "decode" or not most or state.slots < 2 * state.experts:
            return state, plan
        if seen.layer + 1 == state.layers:
            return state, plan
        there = {*seen.resident, *seen.in_flight, *plan.load}.difference(plan.evict)
        coming = [ExpertId(seen.layer + 1, expert) for expert in range(state.experts)]
        missing = [expert for expert in coming if expert not in there]
        idle = sorted(e for e in there if e in seen.resident and not 0 <= e.layer - seen.layer <= 1)
        evict = idle[: max(0, len(there) + len(missing) - state.slots)]
        room = state.slots - len(there) + len(evict)
        gone = set(evict)
        used = {expert: number for expert, number in state.used.items() if expert not in gone}
        return replace(state, used=used), replace(
            plan, evict=(*plan.evict, *evict), prefetch=tuple(missing[:room])
        )


MOST = 0.75
"""Share of a layer's experts that have tokens, from which on the next layer is copied whole."""


def streamed_layers(geometry: Geometry) -> int:
    """Returns how many layers the room has through which prefills stream.

    Two, so that one is copied while the other is computed, where the second takes at most a tenth of the
    slots from decode steps.

    >>> sizes = {"num_layers": 48, "num_experts": 128, "experts_per_token": 8, "expert_bytes": 9}
    >>> [streamed_layers(Geometry(slots=slots, **sizes)) for slots in (1000, 2700)]
    [1, 2]
    """
    return 2 if geometry.slots >= 10 * geometry.num_experts else 1


def slots_beside(geometry: Geometry) -> int:
    """Returns the slots of each layer that a step keeps beside the room through which prefills stream.

    Args:
        geometry: of the model; `slots` are those of the whole budget.

    Raises:
        ValueError: if there is not one for each layer.

    >>> slots_beside(Geometry(num_layers=4, num_experts=8, experts_per_token=2, expert_bytes=1, slots=21))
    3
    """
    streamed = streamed_layers(geometry) * geometry.num_experts
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
