"""Splits one layer's experts between device, host and link so that the layer ends soonest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from layerscope_jax.scheduling.costs import Curves, HardwareProfile, ms_of
from layerscope_jax.scheduling.lowest import lowest
from layerscope_jax.support.njit import njit


class Split(NamedTuple):
    """The side that computes each expert of a layer, and what is loaded.

    Attributes:
        device, host: experts computed there; each once.
        load: those of `device` that must be copied first, first needed first.
        device_ms, host_ms: time (ms) from the beginning of the layer's experts to the end of device and host.
        moved: tokens of the busiest resident expert that the host computes; 0 if there is none.
    """

    device: list[int]
    host: list[int]
    load: list[int]
    device_ms: float
    host_ms: float
    moved: int = 0


def balance(
    costs: HardwareProfile,
    demand: Mapping[int, int],
    resident: Iterable[int],
    coming: Iterable[tuple[int, float]] = (),
    *,
    link_ms: float = 0.0,
    loads: int = 0,
    worth_ms: float = 0.0,
) -> Split:
    """Splits a layer by greedy moves, each of which makes the layer end earlier.

    Starts with the resident experts on the device and the others on the host. While the host ends last,
    experts are moved to the device: those in flight as they arrive, then loads, most tokens first, one after
    the other on the link. While the device ends last, resident experts with the fewest tokens are moved to
    the host, which has every expert.

    Args:
        costs: costs of an expert.
        demand: expert -> tokens.
        resident: active experts on the device.
        coming: active experts in flight, each with the time (ms) until it arrives, in order of arrival.
        link_ms: time (ms) until the link could begin a load.
        loads: maximum number of loads.
        worth_ms: minimum gain (ms) of a load, because the link may have something better to do.

    >>> from layerscope_jax import TimeTable
    >>> costs = HardwareProfile(host_ms=TimeTable((1,), (2.0,)), device_ms=TimeTable((1,), (1.0,)),
    ...     transfer_ms=3.0, source="an example")
    >>> balance(costs, {0: 1, 1: 1, 2: 1, 3: 1}, [0], loads=4)
    Split(device=[0, 1], host=[2, 3], load=[1], device_ms=4.0, host_ms=4.0, moved=0)
    """
    experts, tokens = ordered(np.array([*demand], np.int64), np.array([*demand.values()], np.int64))
    place = {expert: index for index, expert in enumerate(experts.tolist())}
    held, arrival = np.zeros(len(experts), np.bool_), np.full(len(experts), np.inf)
    held[[place[expert] for expert in resident]] = True
    queue = []
    for expert, due in coming:
        queue.append(place[expert])
        arrival[queue[-1]] = due
    device, loaded, on_host, device_ms, host_ms, moved = share_out(
        costs.curves,
        costs.transfer_ms,
        tokens,
        held,
        np.array(queue, np.int64),
        arrival,
        float(link_ms),
        loads,
        float(worth_ms),
    )
    names = experts.tolist()
    return Split(
        [names[index] for index in device.tolist()],
        [names[index] for index in on_host.tolist()],
        [names[index] for index in loaded.tolist()],
        device_ms,
        host_ms,
        moved,
    )


@njit(cache=True, nogil=True)
def ordered(experts: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns experts and their tokens, most tokens first; ties by number."""
    number = 1
    for expert in experts:
        number = max(number, expert + 1)
    keys = np.empty(len(experts))  # whole numbers, small enough that `lowest` distinguishes them
    for place in range(len(experts)):
        keys[place] = experts[place] - tokens[place] * number
    order = lowest(keys, len(keys))
    return experts[order], tokens[order]


@njit(cache=True, nogil=True)
def share_out(
    curves: Curves,
    transfer_ms: float,
    tokens: np.ndarray,
    resident: np.ndarray,
    coming: np.ndarray,
    arrival: np.ndarray,
    link_ms: float,
    loads: int,
    worth_ms: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float, int]:
    """Computes `balance` on arrays; experts are indices of `tokens`, which is sorted, largest first.

    Args:
        curves, transfer_ms: costs of computing and of copying an expert.
        tokens: [A] tokens of each active expert.
        resident: [A] bool, on the device.
        coming: indices of the experts in flight, in order of arrival.
        arrival: [A] time (ms) until each of these arrives, infinite for all others.
        link_ms, loads, worth_ms: as in `balance`.

    Returns:
        device, load and host as indices; device_ms, host_ms, moved.
    """
    active = len(tokens)
    host_ms, device_ms = np.empty(active), np.empty(active)
    on_device = resident.copy()
    device, load = np.empty(active, np.int64), np.empty(active, np.int64)
    kept = loaded = moved = 0
    device_end = host_end = 0.0
    for place in range(active):
        host_ms[place] = ms_of(tokens[place], curves.host)
        device_ms[place] = ms_of(tokens[place], curves.device)
        if resident[place]:
            device[kept] = place
            kept += 1
            device_end += device_ms[place]
        else:
            host_end += host_ms[place]
    number = kept

    for place in coming:
        later = max(device_end, arrival[place]) + device_ms[place]
        earlier = host_end - host_ms[place]
        if host_end > device_end and max(later, earlier) < max(device_end, host_end):
            device_end, host_end = later, earlier
            device[number], on_device[place] = place, True
            number += 1
    for place in range(active):
        if host_end <= device_end or loaded >= loads:
            break
        if resident[place] or arrival[place] < np.inf:
            continue
        later = max(device_end, link_ms + (loaded + 1) * transfer_ms) + device_ms[place]
        earlier = host_end - host_ms[place]
        if max(later, earlier) + worth_ms >= max(device_end, host_end):
            break
        device_end, host_end = later, earlier
        device[number], on_device[place], load[loaded] = place, True, place
        number, loaded = number + 1, loaded + 1
    while number == kept > 0:
        place = device[kept - 1]
        earlier, later = device_end - device_ms[place], host_end + host_ms[place]
        if max(earlier, later) >= device_end:
            break
        device_end, host_end, on_device[place] = earlier, later, False
        kept, moved = kept - 1, tokens[place]
        number = kept
    return device[:number], load[:loaded], np.flatnonzero(~on_device), device_end, host_end, moved
