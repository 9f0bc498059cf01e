"""Contention: times of host and device on a machine where they and copies slow each other down."""

from __future__ import annotations

from collections.abc import Mapping

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import LayerPlan


def side_by_side(
    costs: HardwareProfile, plan: LayerPlan, demand: Mapping[int, int], copying: bool
) -> tuple[float, float]:
    """Returns the host's time (ms) for its part of a plan, and the factor on the device's times.

    During copies, both take the times of `costs`. Without copies they do so until one of them is done; the
    other continues at the speed of `costs.alone`. The factor is relative to `costs.device_ms`. The caller
    adds any wait of the device for copies.

    Args:
        costs: costs of the machine.
        plan: plan of the layer.
        demand: expert -> tokens.
        copying: whether copies are made at the same time.

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
    """Returns the times (ms) of host and device for their parts of a plan."""
    host_ms = costs.host_start_ms if plan.host else 0.0
    device_ms = 0.0
    for expert in plan.host:
        host_ms += costs.host_ms(demand[expert])
    for expert in plan.device:
        device_ms += costs.device_ms(demand[expert])
    return host_ms, device_ms
