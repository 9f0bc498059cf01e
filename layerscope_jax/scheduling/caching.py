"""Cache policies: a missing expert is copied and kept; they differ in which expert they evict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import filterfalse, islice

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import answer, busiest_first, need_a_layer, present
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase


@dataclass(frozen=True)
class CacheState:
    """Slots on the device, and the resident experts in order of use, least recent first.

    Each policy defines what its numbers count; `left` holds those of evicted experts, if they still count.
    """

    slots: int
    used: dict[ExpertId, int] = field(default_factory=dict)
    left: dict[ExpertId, int] = field(default_factory=dict)


class Cache(PolicyBase):
    """Copies missing experts and keeps them until room is needed.

    Everything is computed on the device. An expert is computed on the host only if copies in flight, which
    the policy did not ask for, take the room.
    """

    uses_forecasts = False
    remembers = False
    """Whether the numbers of evicted experts still count."""

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> CacheState:
        need_a_layer(geometry, self.name)
        return CacheState(geometry.slots)

    def victims(
        self, state: CacheState, seen: Observation, idle: Iterable[ExpertId], count: int
    ) -> Iterable[ExpertId]:
        """Returns the experts to evict first.

        Args:
            idle: resident experts that this layer does not need, least recently used first.
            count: how many must be evicted.
        """
        return idle

    def number(self, state: CacheState, seen: Observation, expert: ExpertId) -> int:
        """Returns the number to remember for an expert that is used now."""
        return 0

    def copies(self, state: CacheState, seen: Observation, missing: int) -> int:
        """Returns how many of the missing experts are copied; the host computes the others."""
        return missing

    def plan(self, state: CacheState, seen: Observation) -> tuple[CacheState, LayerPlan]:
        active = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
        missing = [expert for expert in active if not present(expert, seen)]
        load = missing[: self.copies(state, seen, len(missing))]
        short = len(seen.resident) + len(seen.in_flight) + len(load) - state.slots
        evict = self._evict(state, seen, set(active), short) if short > 0 else []
        if short > 0:
            load = load[: len(load) - (short - len(evict))]
        host = set(missing).difference(load)
        computed = [expert for expert in active if expert not in host]
        used, left = dict(state.used), state.left
        if self.remembers and evict:
            left = left | {expert: used[expert] for expert in evict if expert in used}
        for expert in evict:
            used.pop(expert, None)
        for expert in reversed(computed):  # within a layer, the least busy expert counts as the least recent
            used.pop(expert, None)
            used[expert] = self.number(state, seen, expert)
        return replace(state, used=used, left=left), answer(
            seen, [expert.expert for expert in computed], evict=evict, load=load
        )

    def _evict(
        self, state: CacheState, seen: Observation, needed: set[ExpertId], short: int
    ) -> list[ExpertId]:
        # Experts that this policy did not load were never used: they are evicted first.
        unknown = sorted(filterfalse(state.used.__contains__, seen.resident))
        evict = list(islice(filterfalse(needed.__contains__, unknown), short))
        used: Iterable[ExpertId] = state.used
        if unknown or len(state.used) > len(seen.resident):  # otherwise the two sets are equal
            used = filter(seen.resident.__contains__, used)
        more = short - len(evict)
        idle = filterfalse(needed.__contains__, used)
        return evict + list(islice(self.victims(state, seen, idle, more), more)) if more else evict


class LRU(Cache):
    """Evicts the least recently used expert (arXiv 2312.17238, where each layer has its own cache)."""

    name = "lru"


class LFU(Cache):
    """Evicts the least frequently used expert; of equals, the least recently used (arXiv 2511.05814).

    A use is a layer of a step that has tokens for the expert, however many. Uses are never forgotten, also
    while the expert is evicted. Simplified: one cache for all layers instead of one for each.
    """

    name = "lfu"
    remembers = True

    def victims(
        self, state: CacheState, seen: Observation, idle: Iterable[ExpertId], count: int
    ) -> Iterable[ExpertId]:
        return sorted(idle, key=state.used.__getitem__)

    def number(self, state: CacheState, seen: Observation, expert: ExpertId) -> int:
        before = state.used.get(expert)
        return 1 + (state.left.get(expert, 0) if before is None else before)


class LeastStale(Cache):
    """Evicts first the experts of layers that this pass has run without using them (SpecMD, arXiv
    2602.03921).

    A pass runs the layers in order, so experts of passed layers that were not used are the most stale and are
    evicted first. Then come experts of later layers, the farthest layer first, then those that this pass has
    used. Of equals the least recently used is evicted first. Simplified: nothing is prefetched; SpecMD counts
    a prefetched expert as used.
    """

    name = "least-stale"

    def victims(
        self, state: CacheState, seen: Observation, idle: Iterable[ExpertId], count: int
    ) -> Iterable[ExpertId]:
        now = self.number(state, seen, ExpertId(seen.layer, 0))
        behind: list[ExpertId] = []
        ahead: list[ExpertId] = []
        fresh: list[ExpertId] = []
        for expert in idle:
            if state.used[expert] == now:
                fresh.append(expert)
            else:
                (behind if expert.layer <= seen.layer else ahead).append(expert)
            if len(behind) == count:
                return behind
        return behind + sorted(ahead, key=lambda expert: -expert.layer) + fresh

    def number(self, state: CacheState, seen: Observation, expert: ExpertId) -> int:
        """Returns the number of the pass; a new pass begins when the layer is not after the last one used."""
        last = next(reversed(state.used), None)
        return 0 if last is None else state.used[last] + (seen.layer <= last.layer)


@dataclass(frozen=True)
class ARCState:
    """The paper's lists T1, T2, B1 and B2, least recently used first, and p, the target size of T1."""

    slots: int
    p: float = 0.0
    t1: dict[ExpertId, None] = field(default_factory=dict)
    t2: dict[ExpertId, None] = field(default_factory=dict)
    b1: dict[ExpertId, None] = field(default_factory=dict)
    b2: dict[ExpertId, None] = field(default_factory=dict)


class ARC(PolicyBase):
    """Adaptive Replacement Cache: balances recency and frequency by its misses (Megiddo, Modha, FAST 2003).

    T1 holds experts used once recently, T2 those used again; B1 and B2 remember experts evicted from each. A
    miss that B1 remembers lets T1 grow, one that B2 remembers lets it shrink. The experts of a layer count as
    requests one after the other, the least busy first. Changed from the paper: an expert that this layer
    needs is never evicted.
    """

    name = "arc"
    uses_forecasts = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> ARCState:
        need_a_layer(geometry, self.name)
        return ARCState(geometry.slots)

    def plan(self, state: ARCState, seen: Observation) -> tuple[ARCState, LayerPlan]:
        size, p = state.slots, state.p
        t1, t2, b1, b2 = dict(state.t1), dict(state.t2), dict(state.b1), dict(state.b2)
        active = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
        needed = set(active)
        missing = {expert for expert in active if not present(expert, seen)}
        free = size - len(seen.resident) - len(seen.in_flight)
        if len(missing) > free:
            # Experts that this policy did not load count as used once, long ago; lost ones are forgotten.
            unknown = sorted(filterfalse(t2.__contains__, filterfalse(t1.__contains__, seen.resident)))
            if unknown or len(t1) + len(t2) > len(seen.resident) + len(seen.in_flight):
                t1 = dict.fromkeys(unknown) | {e: None for e in t1 if present(e, seen)}
                t2 = {e: None for e in t2 if present(e, seen)}
        evict: list[ExpertId] = []
        load: list[ExpertId] = []

        def make_room(from_t1: bool, remember: bool = True) -> bool:
            nonlocal free
            if free > 0:
                free -= 1
                return True
            lists = ((t1, b1), (t2, b2)) if from_t1 else ((t2, b2), (t1, b1))
            for pages, ghosts in lists:
                victim = next((e for e in pages if e in seen.resident and e not in needed), None)
                if victim is not None:
                    del pages[victim]
                    if remember:
                        ghosts[victim] = None
                    evict.append(victim)
                    return True
            return False

        for expert in reversed(active):
            again, remember = True, True
            from_t1 = len(t1) > p
            if expert in t1 or expert in t2:
                t1.pop(expert, None)
                t2.pop(expert, None)
            elif expert in b1:
                p = min(float(size), p + max(1.0, len(b2) / len(b1)))
                from_t1 = len(t1) > p
            elif expert in b2:
                p = max(0.0, p - max(1.0, len(b1) / len(b2)))
                from_t1 = len(t1) >= p and bool(t1)
            else:
                again = False
                if len(t1) + len(b1) >= size:
                    if b1:
                        del b1[next(iter(b1))]
                    else:
                        from_t1, remember = True, False
                elif b2 and len(t1) + len(t2) + len(b1) + len(b2) >= 2 * size:
                    del b2[next(iter(b2))]
            if expert in missing:
                if not make_room(from_t1, remember):
                    continue
                load.append(expert)
            b1.pop(expert, None)
            b2.pop(expert, None)
            (t2 if again else t1)[expert] = None
        load.reverse()
        host = missing.difference(load)
        return ARCState(size, p, t1, t2, b1, b2), answer(
            seen, [e.expert for e in active if e not in host], evict=evict, load=load
        )
