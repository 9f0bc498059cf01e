"""Caches: what is missing is copied and kept until something must make room; they differ in who leaves."""

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
    """Room on the device, and what was used and stayed, least recently used first (the order of a dict).

    The numbers are each policy's own; `left` has those of experts that left, where they still count.
    """

    slots: int
    used: dict[ExpertId, int] = field(default_factory=dict)
    left: dict[ExpertId, int] = field(default_factory=dict)


class Cache(PolicyBase):
    """Copies what is missing and keeps it until something must make room.

    Everything is computed on the device. Only if copies that someone else asked for hold the room is an
    expert computed on the host.
    """

    uses_forecasts = False
    remembers = False
    """Whether the numbers of experts that left still count."""

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> CacheState:
        need_a_layer(geometry, self.name)
        return CacheState(geometry.slots)

    def victims(
        self, state: CacheState, seen: Observation, idle: Iterable[ExpertId], count: int
    ) -> Iterable[ExpertId]:
        """Who leaves first, of used experts that this layer does without, least recently used first."""
        return idle

    def number(self, state: CacheState, seen: Observation, expert: ExpertId) -> int:
        """What to note of an expert that is used now."""
        return 0

    def copies(self, state: CacheState, seen: Observation, missing: int) -> int:
        """How many of the missing experts are copied; the others are computed on the host."""
        return missing

    def plan(self, state: CacheState, seen: Observation) -> tuple[CacheState, LayerPlan]:
        wanted = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
        missing = [expert for expert in wanted if not present(expert, seen)]
        load = missing[: self.copies(state, seen, len(missing))]
        short = len(seen.resident) + len(seen.in_flight) + len(load) - state.slots
        evict = self._evict(state, seen, set(wanted), short) if short > 0 else []
        if short > 0:
            load = load[: len(load) - (short - len(evict))]
        host = set(missing).difference(load)
        here = [expert for expert in wanted if expert not in host]
        used, left = dict(state.used), state.left
        if self.remembers and evict:
            left = left | {expert: used[expert] for expert in evict if expert in used}
        for expert in evict:
            used.pop(expert, None)
        for expert in reversed(here):  # within a layer, the least busy count as least recent
            used.pop(expert, None)
            used[expert] = self.number(state, seen, expert)
        return replace(state, used=used, left=left), answer(
            seen, [expert.expert for expert in here], evict=evict, load=load
        )

    def _evict(
        self, state: CacheState, seen: Observation, needed: set[ExpertId], short: int
    ) -> list[ExpertId]:
        # Experts that came in some other way were never used: they go first.
        unknown = sorted(filterfalse(state.used.__contains__, seen.resident))
        evict = list(islice(filterfalse(needed.__contains__, unknown), short))
        used: Iterable[ExpertId] = state.used
        if unknown or len(state.used) > len(seen.resident):  # else they are the same experts
            used = filter(seen.resident.__contains__, used)
        more = short - len(evict)
        idle = filterfalse(needed.__contains__, used)
        return evict + list(islice(self.victims(state, seen, idle, more), more)) if more else evict


class LRU(Cache):
    """The least recently used leaves (arXiv 2312.17238, where each layer has a cache of its own)."""

    name = "lru"


class LFU(Cache):
    """The least frequently used leaves, of equals the least recently used (arXiv 2511.05814).

    A use is a layer of a step that has tokens for the expert, however many; it counts for good, also while
    the expert is away. Simplified: one cache for all layers instead of one a layer.
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
    """What this pass has not used leaves first, by layer (SpecMD, arXiv 2602.03921).

    A pass goes through the layers in order, so what a layer that it has passed did not use is the most stale:
    it goes first. Then what layers yet to come used in an earlier pass, the furthest layer first; then what
    this pass has used. Of equals the least recently used goes first. Simplified: nothing is prefetched, so
    what SpecMD counts as used when it was fetched ahead is only used when its layer comes.
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
        """The pass. The next one has begun if this layer does not come after the last one used."""
        last = next(reversed(state.used), None)
        return 0 if last is None else state.used[last] + (seen.layer <= last.layer)


@dataclass(frozen=True)
class ARCState:
    """The lists of the paper, least recently used first, and the size that T1 should have."""

    slots: int
    p: float = 0.0
    t1: dict[ExpertId, None] = field(default_factory=dict)
    t2: dict[ExpertId, None] = field(default_factory=dict)
    b1: dict[ExpertId, None] = field(default_factory=dict)
    b2: dict[ExpertId, None] = field(default_factory=dict)


class ARC(PolicyBase):
    """Adaptive Replacement Cache: recency against frequency, as the misses teach (Megiddo, Modha, FAST 2003).

    T1 holds what was used once of late, T2 what was used again; B1 and B2 remember as many that left either.
    A miss that B1 remembers lets T1 grow, one that B2 remembers lets it shrink. The experts of a layer are
    requests one after the other, the least busy first. Changed: what this layer needs can not leave.
    """

    name = "arc"
    uses_forecasts = False

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> ARCState:
        need_a_layer(geometry, self.name)
        return ARCState(geometry.slots)

    def plan(self, state: ARCState, seen: Observation) -> tuple[ARCState, LayerPlan]:
        size, p = state.slots, state.p
        t1, t2, b1, b2 = dict(state.t1), dict(state.t2), dict(state.b1), dict(state.b2)
        wanted = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
        needed = set(wanted)
        missing = {expert for expert in wanted if not present(expert, seen)}
        free = size - len(seen.resident) - len(seen.in_flight)
        if len(missing) > free:
            # Experts that came in some other way count as used once, long ago; what is lost is forgotten.
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

        for expert in reversed(wanted):
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
            seen, [e.expert for e in wanted if e not in host], evict=evict, load=load
        )
