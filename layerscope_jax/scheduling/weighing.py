"""PreSched's compiled arithmetic: computes a layer's plan from arrays in tens of microseconds.

`layerscope_jax.scheduling.presched` explains the policy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from layerscope_jax.scheduling.costs import Curves, ms_of
from layerscope_jax.scheduling.lowest import lowest
from layerscope_jax.scheduling.split import ordered, share_out
from layerscope_jax.support.njit import njit

MEMORY = 512
"""Tokens after which half of an expert's known popularity is forgotten."""

REACH = 2
"""Layers that are planned ahead without a predictor."""

WORTHWHILE = 0.02
"""Share of its time on the link that a prefetch must save to be worth its bytes."""

FARTHEST = 3.0
"""Copies' times until its layer's turn within which an expert is prefetched. One that is copied earlier takes
room for longer, and the link has time for it later."""

AGAIN = 0.4
"""Share of its worth that an expert loses when its layer runs a whole step later: it can be copied again."""

SPARE = 48
"""Candidates beyond what the link can copy before the next plan: some would arrive too late."""


class Books(NamedTuple):
    """Arrays of `PreSchedState`; they are written to, so the caller passes copies."""

    popularity: np.ndarray  # [L, E]
    worth: np.ndarray  # [L, E]
    present: np.ndarray  # [L, E] bool
    span_ms: np.ndarray  # [L]
    price: np.ndarray  # [L]


class Turn(NamedTuple):
    """The layer to plan.

    Attributes:
        layer: its number.
        rows: tokens of the step.
        other_ms: time of the layer without its experts.
        transfer_ms: time of one copy.
        alone_ms: time of the host alone with the device idle; infinite where that makes no difference.
        ahead_ms: time until the link could begin a load.
        queued: copies on the link.
        free: experts that there is room for.
        fitting: copies that the link can begin before the next plan.
        crowd: additional residents to consider for eviction.
        certain: share of a prefetch's gain that a load must gain, as its gain is certain.
        move: whether anything may be copied.
    """

    layer: int
    rows: float
    other_ms: float
    transfer_ms: float
    alone_ms: float
    ahead_ms: float
    queued: int
    free: int
    fitting: int
    crowd: int
    certain: float
    move: bool


@njit(cache=True, nogil=True)
def decide(
    curves: Curves,
    books: Books,
    turn: Turn,
    experts: np.ndarray,
    tokens: np.ndarray,
    away: np.ndarray,
    coming: np.ndarray,
    coming_ms: np.ndarray,
    forecast: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Computes one layer's plan.

    Args:
        curves: costs of an expert.
        books: arrays of the state, changed in place to the next state.
        turn: the layer.
        experts, tokens: [A] the demand, in any order.
        away: flat numbers `layer * E + expert` of the experts on the link.
        coming, coming_ms: this layer's active experts among these, in order of arrival, with their times
            (ms).
        forecast: [W, E] expected tokens; W = 0 without a predictor.

    Returns:
        device, host and load as experts of this layer; prefetch and evict as flat numbers.
    """
    layers, number = books.present.shape
    layer = turn.layer
    experts, tokens = ordered(experts, tokens)
    remember(books.popularity[layer], experts, tokens, turn.rows)
    on_link = np.zeros(layers * number, np.bool_)
    on_link[away] = True
    coming_saves = foresee(curves, books, turn, forecast)
    due_ms = until_turn(books.span_ms, layer, turn.other_ms)
    wishes, saves = wish(books, turn, coming_saves, due_ms) if turn.move else nothing()
    spare, worth = leaving(books, turn, coming_saves, experts, on_link) if turn.move else nothing()

    # One by one, because assigning one array to places of another takes numba seconds to compile.
    place = np.full(number, -1)
    for index in range(len(experts)):
        place[experts[index]] = index
    arrival = np.full(len(experts), np.inf)
    for index in range(len(coming)):
        arrival[place[coming[index]]] = coming_ms[index]
    resident = books.present[layer][experts] & ~on_link[layer * number + experts]
    device, load, host, device_ms, host_ms, moved = share_out(
        curves,
        turn.transfer_ms,
        tokens,
        resident,
        place[coming],
        arrival,
        turn.ahead_ms,
        turn.free + len(spare) if turn.move else 0,
        turn.certain * link_price(saves, worth, turn.free, turn.fitting),
    )
    price = device_price(curves, moved)
    if turn.alone_ms < max(device_ms, host_ms):
        # If the host alone is faster than both sides, which slow each other down, an expert on the device
        # saves nothing.
        device, load, host = device[:0], load[:0], np.arange(len(experts))
        device_ms, host_ms, price = 0.0, turn.alone_ms, 1.0
    span_ms = max(device_ms, host_ms) + turn.other_ms

    gone, free = max(0, len(load) - turn.free), max(0, turn.free - len(load))
    link_ms = (turn.queued - (0.5 if turn.queued else 0.0) + len(load)) * turn.transfer_ms
    prefetch = np.empty(len(wishes), np.int64)
    count = 0
    for index in range(len(wishes)):
        if link_ms >= span_ms:
            break
        if link_ms + turn.transfer_ms > span_ms + due_ms[wishes[index] // number]:
            continue  # it would arrive too late
        if free:
            free -= 1
        elif gone < len(spare) and worth[gone] < saves[index]:
            gone += 1
        else:
            break
        prefetch[count] = wishes[index]
        count += 1
        link_ms += turn.transfer_ms
    prefetch, evict = prefetch[:count], spare[:gone]

    present = books.present.reshape(-1)
    present[evict] = False
    present[layer * number + experts[load]] = True
    present[prefetch] = True
    books.span_ms[layer] = span_ms
    books.price[layer] = 0.5 * (books.price[layer] + price)
    books.worth[layer] = saved_ms(curves, books.popularity[layer] * turn.rows, books.price[layer])
    return experts[device], experts[host], experts[load], prefetch, evict


@njit(cache=True, nogil=True, inline="always")
def nothing() -> tuple[np.ndarray, np.ndarray]:
    return np.empty(0, np.int64), np.empty(0)


@njit(cache=True, nogil=True, inline="always")
def remember(popularity: np.ndarray, experts: np.ndarray, tokens: np.ndarray, rows: float) -> None:
    """Updates a layer's mean tokens [E] per token of the step, after a step with `rows` tokens."""
    weight = rows / (rows + MEMORY) if popularity.any() else 1.0
    popularity *= 1 - weight
    for place in range(len(experts)):
        popularity[experts[place]] += tokens[place] * (weight / rows)


@njit(cache=True, nogil=True)
def saved_ms(curves: Curves, expected: np.ndarray, price: float) -> np.ndarray:
    """Returns the time (ms) that each expert on the device saves its layer, by its expected tokens [E]."""
    saves = np.empty(len(expected))
    for expert, tokens in enumerate(expected):
        host_ms = ms_of(tokens, curves.host)
        saves[expert] = (1 - price) * host_ms - price * ms_of(tokens, curves.device)
    return saves


@njit(cache=True, nogil=True, inline="always")
def device_price(curves: Curves, moved: int) -> float:
    """Returns the price at which both sides are equally good for the busiest expert moved to the host."""
    if not moved:
        return 0.0
    host_ms = ms_of(moved, curves.host)
    return host_ms / (host_ms + ms_of(moved, curves.device))


@njit(cache=True, nogil=True, inline="always")
def foresee(curves: Curves, books: Books, turn: Turn, forecast: np.ndarray) -> np.ndarray:
    """Returns the ms [W, E] that each expert of the coming layers saves; by popularity without a forecast.

    Looks less far ahead than this layer's own next turn.
    """
    layers, number = books.present.shape
    near = min(len(forecast) if len(forecast) else REACH, layers - 1)
    saves = np.empty((near, number))
    for ahead in range(near):
        layer = (turn.layer + 1 + ahead) % layers
        expected = forecast[ahead] if len(forecast) else books.popularity[layer] * turn.rows
        saves[ahead] = saved_ms(curves, expected, books.price[layer])
    return saves


@njit(cache=True, nogil=True, inline="always")
def wish(books: Books, turn: Turn, saves: np.ndarray, due_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns absent experts of the coming layers (flat numbers) and the ms that each saves, most first."""
    layers, number = books.present.shape
    least, count = WORTHWHILE * turn.transfer_ms, 0
    wishes, losses = np.empty(saves.size, np.int64), np.empty(saves.size)
    for ahead in range(len(saves)):
        layer = (turn.layer + 1 + ahead) % layers
        if due_ms[layer] > FARTHEST * turn.transfer_ms + books.span_ms[turn.layer]:
            break
        present, row = books.present[layer], saves[ahead]
        for expert in range(number):
            if row[expert] > least and not present[expert]:
                wishes[count], losses[count] = layer * number + expert, -row[expert]
                count += 1
    first = lowest(losses[:count], turn.fitting + SPARE)
    return wishes[first], -losses[first]


@njit(cache=True, nogil=True, inline="always")
def leaving(
    books: Books, turn: Turn, saves: np.ndarray, experts: np.ndarray, on_link: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns residents that this layer does not need (flat numbers) and their worth in ms, least first."""
    layers, number = books.present.shape
    may = books.present & ~on_link.reshape(layers, number)
    may[turn.layer][experts] = False
    residents, worths, count = np.empty(may.size + 1, np.int64), np.empty(may.size + 1), 0
    for ahead in range(layers - 1, -1, -1):  # of equals, the one whose turn is farthest leaves
        layer = (turn.layer + 1 + ahead) % layers
        if ahead < len(saves):
            worth = np.maximum(books.worth[layer], saves[ahead])
        else:
            worth = books.worth[layer] * (1 - AGAIN * ahead / layers)
        row = may[layer]
        for expert in range(number):  # written always and kept if resident: no branch to guess wrong
            residents[count], worths[count] = layer * number + expert, worth[expert]
            count += row[expert]
    first = lowest(worths[:count], turn.fitting + SPARE + turn.crowd)
    return residents[first], worths[first]


@njit(cache=True, nogil=True, inline="always")
def link_price(saves: np.ndarray, worth: np.ndarray, free: int, fitting: int) -> float:
    """Returns what a load must gain (ms): the worth of what it evicts and of the prefetch that it delays."""
    price = 0.0 if free > 0 or not len(worth) else worth[0]
    if fitting < len(saves):
        place = fitting - free
        gone = worth[place] if 0 <= place < len(worth) else 0.0
        price += max(0.0, saves[fitting] - gone)
    return price


@njit(cache=True, nogil=True, inline="always")
def until_turn(span_ms: np.ndarray, layer: int, other_ms: float) -> np.ndarray:
    """Returns the time (ms) [L] from the next plan until each layer runs."""
    due, total = np.empty(len(span_ms)), 0.0
    for ahead in range(len(span_ms)):
        turn = (layer + 1 + ahead) % len(span_ms)
        due[turn] = total
        total += max(span_ms[turn], other_ms)
    return due
