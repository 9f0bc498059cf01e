"""Sharing one layer's experts out to device, host and link, so that the last of them ends soonest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from layerscope_jax.scheduling.costs import HardwareProfile


class Split(NamedTuple):
    """Where the experts of a layer go.

    Attributes:
        device, host: experts computed there; each once.
        load: those of `device` that must be copied first, first needed first.
        device_ms, host_ms: when the device and the host end, from when the layer's experts begin.
        moved: tokens of the busiest resident expert that the host computes; 0 where there is none.
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
    """Splits a layer by greedy moves, each of which lets the layer end earlier.

    Begins with what is resident on the device and the rest on the host. While the host ends last, experts are
    handed to the device: those on their way as they arrive, then loads, most tokens first, one after the
    other on the link. While the device ends last, resident experts with the fewest tokens go to the host,
    which can read every expert.

    Args:
        costs: of an expert.
        demand: expert -> tokens.
        resident: active experts on the device.
        coming: active experts on their way, each with the ms until it is there, in order of arrival.
        link_ms: until the link could begin a load.
        loads: most that may be loaded.
        worth_ms: what a load must gain at least; the link may have something better to do.

    >>> from layerscope_jax import TimeTable
    >>> costs = HardwareProfile(host_ms=TimeTable((1,), (2.0,)), device_ms=TimeTable((1,), (1.0,)),
    ...     transfer_ms=3.0, source="an example")
    >>> balance(costs, {0: 1, 1: 1, 2: 1, 3: 1}, [0], loads=4)
    Split(device=[0, 1], host=[2, 3], load=[1], device_ms=4.0, host_ms=4.0, moved=0)
    """
    most = max(demand.values(), default=0)
    host_time, device_time = costs.host_ms.upto(most), costs.device_ms.upto(most)
    order = sorted(sorted(demand), key=demand.__getitem__, reverse=True)  # ties by number
    arriving = list(coming)
    on_device, away = set(resident), {expert for expert, _ in arriving}
    device = [expert for expert in order if expert in on_device]
    device_end = sum([device_time(demand[expert]) for expert in device], 0.0)
    host = {expert: host_time(demand[expert]) for expert in order if expert not in on_device}
    host_end = sum(host.values(), 0.0)
    load: list[int] = []

    def hand_over(expert: int, arrival: float, gain: float) -> bool:
        """Moves an expert of the host to the device, if the layer then ends earlier."""
        nonlocal device_end, host_end
        later = max(device_end, arrival) + device_time(demand[expert])
        earlier = host_end - host[expert]
        if max(later, earlier) + gain >= max(device_end, host_end):
            return False
        device_end, host_end = later, earlier
        del host[expert]
        device.append(expert)
        return True

    kept = len(device)
    for expert, arrival in arriving:
        if host_end > device_end:
            hand_over(expert, arrival, 0.0)
    for expert in order:
        if host_end <= device_end:
            break
        if expert in on_device or expert in away:
            continue
        arrival = link_ms + (len(load) + 1) * costs.transfer_ms
        if len(load) >= loads or not hand_over(expert, arrival, worth_ms):
            break
        load.append(expert)
    moved = 0
    while len(device) == kept and device:
        tokens = demand[device[-1]]
        earlier, later = device_end - device_time(tokens), host_end + host_time(tokens)
        if max(earlier, later) >= device_end:
            break
        device_end, host_end = earlier, later
        host[device.pop()] = host_time(tokens)
        kept, moved = kept - 1, tokens
    return Split(device, [expert for expert in order if expert in host], load, device_end, host_end, moved)
