"""PreSched: the experts of this layer and the transfers for the coming ones, decided together."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.split import Split, balance

MEMORY = 512
"""Tokens after which an expert's popularity is half forgotten."""


class Habit(NamedTuple):
    """What is remembered of a layer.

    Attributes:
        popularity: [E] mean tokens that an expert gets of one token in the step.
        span_ms: from its plan to that of the next layer, as expected last time.
        device_price: what a millisecond of the device costs in this layer's time; the host's costs the rest.
            0 where the host ends last whatever is done.
        residents: (worth, expert) of what the device held of it, least worth first; worth is the time that
            keeping the expert is expected to save in the layer's next turn.
    """

    popularity: tuple[float, ...]
    span_ms: float = 0.0
    device_price: float = 0.0
    residents: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class PreSchedState:
    """Costs, shape, a `Habit` for each layer, and what was put on the link, in order."""

    costs: HardwareProfile
    geometry: Geometry
    habits: tuple[Habit, ...]
    queue: tuple[ExpertId, ...] = ()


class Candidate(NamedTuple):
    """An absent expert of a coming layer: the time that having it there would save, and until when."""

    saves_ms: float
    due_ms: float
    expert: ExpertId


class PreSched:
    """Weighs every possible transfer by the time that it saves, over all layers that a forecast reaches.

    After the LayerScope paper (arXiv 2509.23638), and past it. This layer's experts are shared out so that
    device and host end together (`balance`). The link is then kept busy until the next plan with those
    experts of the coming layers that save most: expected host time, less what they cost the device, if they
    can be there in time. Each takes the place of the resident expert that is expected to save least in its
    layer's next turn, and only if it saves more. A load for this layer must gain more than the prefetch that
    it would hold up. No more is queued than the link can begin before the next plan, so that little goes
    stale. Without a predictor, each layer's popular experts are the forecast.
    """

    name = "presched"
    uses_costs = True

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> PreSchedState:
        if profile is None:
            raise ValueError(f"policy {self.name!r} weighs costs: it needs a HardwareProfile, got None")
        habit = Habit((0.0,) * geometry.num_experts)
        return PreSchedState(profile, geometry, (habit,) * geometry.num_layers)

    def plan(self, state: PreSchedState, seen: Observation) -> tuple[PreSchedState, LayerPlan]:
        costs, layer, demand, resident = state.costs, seen.layer, seen.demand, seen.resident
        geometry, habit = state.geometry, state.habits[layer]
        queue = [expert for expert in state.queue if expert in seen.in_flight]
        tokens = sum(demand.values()) / geometry.experts_per_token
        habit = habit._replace(popularity=remember(habit.popularity, demand, tokens))
        other_ms = costs.layer_ms(round(tokens))

        here = [expert for expert in demand if (layer, expert) in resident]
        coming, ahead_ms = arrivals(queue, layer, demand, costs.transfer_ms)
        candidates = self._candidates(state, seen, tokens, other_ms)
        spare = Peekable(self._spare(state, seen, tokens))
        free = geometry.slots - len(resident) - len(seen.in_flight)
        fitting = int(habit.span_ms / costs.transfer_ms) + 1 - len(queue)
        split = balance(
            costs,
            demand,
            here,
            coming,
            link_ms=ahead_ms,
            loads=free + len(resident) - len(here),
            worth_ms=link_price(candidates, spare, free, max(0, fitting)),
        )
        span_ms = max(split.device_ms, split.host_ms) + other_ms
        link_ms = (len(queue) - 0.5 * bool(queue) + len(split.load)) * costs.transfer_ms
        load = [ExpertId(layer, expert) for expert in split.load]
        evict = [next(spare)[1] for _ in range(len(load) - free)]
        free = max(0, free - len(load))

        prefetch: list[ExpertId] = []
        for candidate in candidates:
            if link_ms >= span_ms:
                break
            if link_ms + costs.transfer_ms > span_ms + candidate.due_ms:
                continue
            if free:
                free -= 1
            else:
                found = spare.peek(0)
                if found is None or found[0] >= candidate.saves_ms:
                    break
                evict.append(next(spare)[1])
            prefetch.append(candidate.expert)
            link_ms += costs.transfer_ms

        price = device_price(costs, demand, here, split)
        gone = set(evict)
        held = [e for e in range(geometry.num_experts) if (layer, e) in resident and (layer, e) not in gone]
        held += [e.expert for e in (*load, *queue) if e.layer == layer and e.expert not in held]
        habit = habit._replace(span_ms=span_ms, device_price=0.5 * (habit.device_price + price))
        worths = sorted((saved_ms(costs, habit, habit.popularity[e] * tokens), e) for e in held)
        habits = list(state.habits)
        habits[layer] = habit._replace(residents=tuple(worths))
        state = replace(state, habits=tuple(habits), queue=(*queue, *load, *prefetch))
        return state, LayerPlan(
            step=seen.step,
            layer=layer,
            device=tuple(split.device),
            host=tuple(split.host),
            evict=tuple(evict),
            load=tuple(load),
            prefetch=tuple(prefetch),
        )

    def _candidates(
        self, state: PreSchedState, seen: Observation, tokens: float, other_ms: float
    ) -> list[Candidate]:
        """Absent experts of the coming layers, those that save most first."""
        found = []
        due_ms = 0.0  # from the next plan on
        layers = state.geometry.num_layers
        rows: Sequence[Sequence[float] | None] = seen.forecast or (None, None)
        for ahead, row in enumerate(rows):
            layer = (seen.layer + 1 + ahead) % layers
            habit = state.habits[layer]
            if row is None:
                row = [share * tokens for share in habit.popularity]
            for expert, expected in enumerate(row):
                if expected > 0.05:
                    copy = (layer, expert)
                    if copy not in seen.resident and copy not in seen.in_flight:
                        saves = saved_ms(state.costs, habit, expected)
                        if saves > 0:
                            found.append(Candidate(saves, due_ms, ExpertId(layer, expert)))
            due_ms += habit.span_ms or other_ms
        found.sort(key=lambda candidate: -candidate.saves_ms)
        return found

    def _spare(
        self, state: PreSchedState, seen: Observation, tokens: float
    ) -> Iterator[tuple[float, ExpertId]]:
        """Residents that this layer does not need, least worth first, each with its worth."""
        ahead = {(seen.layer + 1 + w) % state.geometry.num_layers: row for w, row in enumerate(seen.forecast)}

        def of(layer: int, habit: Habit) -> Iterator[tuple[float, ExpertId]]:
            residents = habit.residents
            if (row := ahead.get(layer)) is not None:
                residents = sorted((max(w, saved_ms(state.costs, habit, row[e])), e) for w, e in residents)
            for worth, expert in residents:
                copy = ExpertId(layer, expert)
                if copy in seen.resident and not (layer == seen.layer and expert in seen.demand):
                    yield worth, copy

        # What came in some other way, or has not had its turn yet, is worth nothing known.
        if sum(len(habit.residents) for habit in state.habits) < len(seen.resident):
            listed = {(layer, e) for layer, h in enumerate(state.habits) for _, e in h.residents}
            for copy in sorted(seen.resident):
                if copy not in listed and not (copy.layer == seen.layer and copy.expert in seen.demand):
                    yield 0.0, copy
        yield from heapq.merge(*(of(layer, habit) for layer, habit in enumerate(state.habits)))


class Peekable:
    """An iterator that can be looked into."""

    def __init__(self, items: Iterator[tuple[float, ExpertId]]):
        self._items = items
        self._seen: deque[tuple[float, ExpertId]] = deque()

    def peek(self, ahead: int) -> tuple[float, ExpertId] | None:
        """The item so many after the next; None where there is none."""
        while len(self._seen) <= ahead:
            item = next(self._items, None)
            if item is None:
                return None
            self._seen.append(item)
        return self._seen[ahead]

    def __next__(self) -> tuple[float, ExpertId]:
        return self._seen.popleft() if self._seen else next(self._items)


def link_price(candidates: Sequence[Candidate], spare: Peekable, free: int, fitting: int) -> float:
    """What a load must gain: the room it takes, and the prefetch that it holds up."""
    room = spare.peek(0) if free <= 0 else None
    price = room[0] if room is not None else 0.0
    if fitting < len(candidates):
        room = spare.peek(fitting - free) if fitting >= free else None
        price += max(0.0, candidates[fitting].saves_ms - (room[0] if room is not None else 0.0))
    return price


def saved_ms(costs: HardwareProfile, habit: Habit, tokens: float) -> float:
    """What an expert's being on the device saves of its layer's time, if so many tokens are expected for it."""
    host = costs.host_ms.expected(tokens)
    device = costs.device_ms.expected(tokens)
    return (1 - habit.device_price) * host - habit.device_price * device


def device_price(costs: HardwareProfile, demand, here: list[int], split: Split) -> float:
    """The price at which the resident expert that went to the host last was worth neither more nor less."""
    given = set(split.host)
    moved = max((demand[expert] for expert in here if expert in given), default=0)
    if not moved:
        return 0.0
    host, device = costs.host_ms(moved), costs.device_ms(moved)
    return host / (host + device)


def arrivals(
    queue: Sequence[ExpertId], layer: int, demand, transfer_ms: float
) -> tuple[list[tuple[int, float]], float]:
    """This layer's active experts on the link with the time until each is there, and when loads can begin."""
    found: list[tuple[int, float]] = []
    ahead = 0.0
    for position, expert in enumerate(queue):
        if expert.layer == layer and expert.expert in demand:
            # The first is half way on average; demand overtakes the others at the next matrix.
            ahead += (0.5 if position == 0 else 1.0) * transfer_ms
            found.append((expert.expert, ahead))
        elif position == 0:
            ahead = transfer_ms / 6
    return found, ahead


def remember(popularity: tuple[float, ...], demand, tokens: float) -> tuple[float, ...]:
    """Popularity after a step of so many tokens."""
    weight = 1.0 if not any(popularity) else tokens / (tokens + MEMORY)
    new = [(1 - weight) * share for share in popularity]
    for expert, count in demand.items():
        new[expert] += weight * count / tokens
    return tuple(new)
