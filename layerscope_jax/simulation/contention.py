"""Host, device and link at work at once on one machine, where they hinder each other."""

from __future__ import annotations

from collections.abc import Mapping

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import LayerPlan


def side_by_side(
    costs: HardwareProfile, plan: LayerPlan, demand: Mapping[int, int], copying: bool
) -> tuple[float, float]:
    """How long the host takes for its part of a plan, and the device's time for its own by `costs.device_ms`.

    Beside copies, both work as `costs` say, and so they do without until one has ended; the other goes on as
    `costs.alone` say. The device may wait for copies between; that is left to the caller.

    >>> from layerscope_jax import TimeTable
    >>> def machine(host_ms, alone=None):
    ...     host, device = TimeTable((1,), (host_ms,)), TimeTable((1,), (1.0,))
    ...     return HardwareProfile(
    ...         host_ms=host, device_ms=device, transfer_ms=1.0, source="made up", alone=alone
    ...     )
    >>> plan = LayerPlan(step=0, layer=0, device=(0,), host=(1,))
    >>> side_by_side(machine(4.0, alone=machine(2.0)), plan, {0: 1, 1: 1}, copying=False)  # 1 ms, 3/4 alone
    (2.5, 1.0)
    """
    host_ms, device_ms = _times(costs, plan, demand)
    if costs.alone is None or copying or host_ms == device_ms:
        return host_ms, 1.0
    host_alone_ms, device_alone_ms = _times(costs.alone, plan, demand)
    if host_ms > device_ms:
        return device_ms + (1 - device_ms / host_ms) * host_alone_ms, 1.0
    return host_ms, (host_ms + (1 - host_ms / device_ms) * device_alone_ms) / device_ms


def _times(costs: HardwareProfile, plan: LayerPlan, demand: Mapping[int, int]) -> tuple[float, float]:
    """Of host and device."""
    host_ms = costs.host_start_ms if plan.host else 0.0
    device_ms = 0.0
    for expert in plan.host:
        host_ms += costs.host_ms(demand[expert])
    for expert in plan.device:
        device_ms += costs.device_ms(demand[expert])
    return host_ms, device_ms
