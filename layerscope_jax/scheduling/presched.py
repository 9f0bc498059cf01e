"""PreSched: the experts of this layer and the transfers for the coming ones, decided together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import answer, busiest_first, need_costs
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.split import Split, balance

MEMORY = 512
"""Tokens after which half of what is known of an expert's popularity is forgotten."""

REACH = 2
"""Layers ahead that are looked at without a predictor."""

CERTAIN = {"prefill": 0.0, "decode": 0.5}
"""A load for this layer must gain so much of what a prefetch would, since what it gains is no forecast. In a
prefill nearly all experts of all layers are needed, and the link has work for this layer until it ends."""

WORTHWHILE = 0.02
"""Part of its time on the link that a prefetch must save; less is not worth the bytes."""

AGAIN = 0.4
"""Part of its worth that an expert has lost when its turn is a whole step away: it can be copied again."""


SPARE = 48
"""Candidates beyond those that the link can carry before the next plan: some are not there in time."""

Weighed = tuple[float, int, int]
"""Milliseconds, layer and expert."""


@dataclass(frozen=True)
class PreSchedState:
    """What is remembered; arrays are copied before they change.

    Attributes:
        costs, geometry: of machine and model.
        popularity: [L, E] mean tokens that an expert gets of one token in the step.
        worth: [L, E] ms that having an expert on the device saves in its layer's next turn, if as popular as
            ever.
        present: [L, E] bool, on the device or on its way.
        span_ms: [L] from a layer's plan to the next, as it was expected last.
        price: [L] what a millisecond of device work costs of a layer's time; the host's costs the rest. 0
            where the host ends last whatever is done.
        queue: what was put on the link, in order.
    """

    costs: HardwareProfile
    geometry: Geometry
    popularity: np.ndarray
    worth: np.ndarray
    present: np.ndarray
    span_ms: np.ndarray
    price: np.ndarray
    queue: tuple[ExpertId, ...] = ()

    def saved_ms(self, expected: np.ndarray, price: np.ndarray) -> np.ndarray:
        """What it saves of a layer's time to have an expert on the device, by its expected tokens."""
        host_ms, device_ms = self.costs.host_ms, self.costs.device_ms
        return (1 - price) * host_ms.expected(expected) - price * device_ms.expected(expected)


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
        layers, experts = geometry.num_layers, geometry.num_experts
        return PreSchedState(
            need_costs(profile, self.name),
            geometry,
            popularity=np.zeros((layers, experts)),
            worth=np.zeros((layers, experts)),
            present=np.zeros((layers, experts), bool),
            span_ms=np.zeros(layers),
            price=np.zeros(layers),
        )

    def plan(self, state: PreSchedState, seen: Observation) -> tuple[PreSchedState, LayerPlan]:
        return self.decide(state, seen)

    def decide(
        self, state: PreSchedState, seen: Observation, *, move: bool = True
    ) -> tuple[PreSchedState, LayerPlan]:
        """As `plan`; without `move` nothing is copied in this layer."""
        costs, layer, demand = state.costs, seen.layer, seen.demand
        tokens = sum(demand.values()) / state.geometry.experts_per_token
        other_ms = costs.layer_ms(round(tokens))
        queue = [expert for expert in state.queue if expert in seen.in_flight]
        if len(queue) < len(seen.in_flight):  # others put something on the link
            queue += sorted(set(seen.in_flight).difference(queue))
        present = presence(state.present, seen)
        popularity = remembered(state.popularity, layer, demand, tokens)
        free = state.geometry.slots - len(seen.resident) - len(seen.in_flight)
        fitting = (
            max(0, int(state.span_ms[layer] / max(costs.transfer_ms, 1e-6)) + 1 - len(queue)) if move else 0
        )

        wishes, spare = self._weigh(state, seen, present, popularity, tokens, fitting) if move else ([], [])
        here = [expert for expert in demand if (layer, expert) in seen.resident]
        coming, ahead_ms = arrivals(queue, layer, demand, costs.transfer_ms)
        split = balance(
            costs,
            demand,
            here,
            coming,
            link_ms=ahead_ms,
            loads=free + len(spare) if move else 0,
            worth_ms=CERTAIN[seen.phase] * link_price(wishes, spare, free, fitting),
        )
        shared = split
        if costs.alone is not None:
            split = undivided(costs.alone, seen, split)
        span_ms = max(split.device_ms, split.host_ms) + other_ms
        load = [ExpertId(layer, expert) for expert in split.load]
        leaving = max(0, len(load) - free)
        free = max(0, free - len(load))
        link_ms = (len(queue) - 0.5 * bool(queue) + len(load)) * costs.transfer_ms
        prefetch: list[ExpertId] = []
        due_ms = self._due(state, layer, other_ms) if wishes else []
        for saves_ms, turn, expert in wishes:
            if link_ms >= span_ms:
                break
            wish = ExpertId._make((turn, expert))
            late = link_ms + costs.transfer_ms > span_ms + due_ms[turn]
            if late or wish in seen.resident or wish in seen.in_flight:
                continue
            if free:
                free -= 1
            elif leaving < len(spare) and spare[leaving][0] < saves_ms:
                leaving += 1
            else:
                break
            prefetch.append(wish)
            link_ms += costs.transfer_ms
        evict = [ExpertId._make(item[1:]) for item in spare[:leaving]]

        for copy in evict:
            present[copy] = False
        for copy in (*load, *prefetch):
            present[copy] = True
        span, price, worth = state.span_ms.copy(), state.price.copy(), state.worth.copy()
        span[layer] = span_ms
        # Where the host is faster alone, nothing is saved by having an expert on the device.
        now = device_price(costs, split.moved) if split is shared else 1.0
        price[layer] = 0.5 * (price[layer] + now)
        worth[layer] = state.saved_ms(popularity[layer] * tokens, price[layer])
        state = replace(
            state,
            popularity=popularity,
            worth=worth,
            present=present,
            span_ms=span,
            price=price,
            queue=(*queue, *load, *prefetch),
        )
        return state, answer(seen, split.device, evict=evict, load=load, prefetch=prefetch)

    def _weigh(
        self,
        state: PreSchedState,
        seen: Observation,
        present: np.ndarray,
        popularity: np.ndarray,
        tokens: float,
        fitting: int,
    ) -> tuple[list[Weighed], list[Weighed]]:
        """What to wish for, and what may leave.

        Args:
            state, seen: as of `plan`.
            present: [L, E] bool.
            popularity: [L, E].
            tokens: of this step.
            fitting: transfers that the link can begin before the next plan.

        Returns:
            Absent experts of the coming layers by the ms that they save, most first; and residents by their
            worth, least first.
        """
        layers = state.geometry.num_layers
        reach = min(len(seen.forecast) or REACH, layers - 1)  # not to this layer's own next turn
        ahead = np.arange(seen.layer + 1, seen.layer + 1 + reach) % layers
        expected = np.array(seen.forecast)[:reach] if seen.forecast else popularity[ahead] * tokens
        saves = state.saved_ms(expected, state.price[ahead][:, None])
        least = WORTHWHILE * state.costs.transfer_ms
        losses = lowest(np.where(present[ahead], 0.0, -saves), fitting + SPARE, below=-least)
        numbers = ahead.tolist()
        wishes = [(-loss, numbers[row], expert) for loss, row, expert in losses]
        distance = (np.arange(layers) - seen.layer - 1) % layers / layers
        worth = np.where(present, state.worth * (1 - AGAIN * distance)[:, None], np.inf)
        worth[ahead] = np.where(present[ahead], np.maximum(state.worth[ahead], saves), np.inf)
        worth[seen.layer, list(seen.demand)] = np.inf
        for copy in seen.in_flight:
            worth[copy] = np.inf
        loads = len(seen.demand) if seen.phase == "prefill" else 0  # then many, on the first turns of all
        spare = lowest(worth, fitting + SPARE + loads, below=np.inf)
        # This policy's books are wrong where others bring and take experts too.
        spare = [item for item in spare if item[1:] in seen.resident]
        return wishes, spare

    def _due(self, state: PreSchedState, layer: int, other_ms: float) -> list[float]:
        """[L] ms from the next plan until each layer's turn."""
        spans = np.roll(np.maximum(state.span_ms, other_ms), -layer - 1)
        return np.roll(np.cumsum(spans) - spans, layer + 1).tolist()


def presence(present: np.ndarray, seen: Observation) -> np.ndarray:
    """[L, E] bool, a new array: what is on the device or on its way."""
    if np.count_nonzero(present) == len(seen.resident) + len(seen.in_flight):
        return present.copy()
    # Copies were lost or dropped, or came in some other way.
    found = np.zeros_like(present)
    for expert in (*seen.resident, *seen.in_flight):
        found[expert] = True
    return found


def remembered(popularity: np.ndarray, layer: int, demand: Mapping[int, int], tokens: float) -> np.ndarray:
    """Popularity after a layer's turn with so many tokens."""
    new = popularity.copy()
    row = new[layer]
    weight = tokens / (tokens + MEMORY) if row.any() else 1.0
    row *= 1 - weight
    row[list(demand)] += np.array(list(demand.values())) * (weight / tokens)
    return new


def lowest(values: np.ndarray, count: int, below: float) -> list[Weighed]:
    """The `count` lowest values under `below` with their places, lowest first; ties in order."""
    flat = values.reshape(-1)
    if count < len(flat):
        below = min(below, np.nextafter(np.partition(flat, count)[count], np.inf))
    found = np.flatnonzero(flat < below)
    found = found[np.argsort(flat[found], kind="stable")]
    rows, columns = np.divmod(found, values.shape[1])
    return list(zip(flat[found].tolist(), rows.tolist(), columns.tolist(), strict=True))


def link_price(
    wishes: Sequence[Weighed],
    spare: Sequence[Weighed],
    free: int,
    fitting: int,
) -> float:
    """What a load must gain: what leaves for it, and the prefetch that it holds up."""
    price = 0.0 if free > 0 or not spare else spare[0][0]
    if fitting < len(wishes):
        leaving = fitting - free
        gone = spare[leaving][0] if 0 <= leaving < len(spare) else 0.0
        price += max(0.0, wishes[fitting][0] - gone)
    return price


def undivided(alone: HardwareProfile, seen: Observation, split: Split) -> Split:
    """The host alone, where it is done sooner than two that hinder each other."""
    host_ms = alone.host_ms.total(seen.demand.values())
    if host_ms >= max(split.device_ms, split.host_ms):
        return split
    return Split([], busiest_first(seen), [], 0.0, host_ms)


def device_price(costs: HardwareProfile, moved: int) -> float:
    """The price at which the host does as well with the busiest expert that the device gave away."""
    if not moved:
        return 0.0
    host, device = costs.host_ms(moved), costs.device_ms(moved)
    return host / (host + device)


def arrivals(
    queue: Sequence[ExpertId], layer: int, demand: Mapping[int, int], transfer_ms: float
) -> tuple[list[tuple[int, float]], float]:
    """This layer's active experts on the link with the ms until each is there, and when a load can begin."""
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
