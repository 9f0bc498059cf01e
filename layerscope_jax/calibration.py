"""Measures what computing and moving an expert costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.experts.bank import ExpertBank, device_sharding
from layerscope_jax.experts.executors import HostExperts, grouped_rows
from layerscope_jax.experts.grouping import Assignments
from layerscope_jax.experts.transfers import Transfers
from layerscope_jax.scheduling.costs import HardwareProfile, TimeTable
from layerscope_jax.scheduling.plan import ExpertId

TOKENS = (1, 4, 16, 64, 128, 256)


def measure(bank: ExpertBank, device: jax.Device, host: HostExperts, transfers: Transfers) -> HardwareProfile:
    """Times one expert of `bank` on the device, on the host and on the link; a second or two in all.

    Args:
        bank: whose experts.
        device: the device tier.
        host: the host executor.
        transfers: the link, idle; measured as it is used, with its pace and its thread.
    """
    width = bank[ExpertId(0, 0)].gate.shape[0]
    spread = list(bank)[:32]
    on_device = {expert: jax.device_put(bank[expert], device_sharding(device)) for expert in spread}

    def on_the_device(expert: ExpertId, inputs: jax.Array, rows: Assignments) -> None:
        weights = on_device[expert]
        groups = rows.groups([0])
        jax.block_until_ready([grouped_rows(inputs, g.slots, (weights,) * len(g.experts), 1) for g in groups])

    def on_the_host(expert: ExpertId, inputs: jax.Array, rows: Assignments) -> None:
        named = [replace(g, experts=(expert.expert,) * len(g.experts)) for g in rows.groups([0])]
        host.start(expert.layer, inputs, named, 1).result()

    def table(run: Callable[[ExpertId, jax.Array, Assignments], None]) -> TimeTable:
        times = []
        for tokens in TOKENS:
            inputs = jax.device_put(jnp.ones((tokens, width), bank.dtype), device_sharding(device))
            rows = Assignments(np.zeros((tokens, 1), np.int32))
            run(spread[0], inputs, rows)  # compiles
            times.append(median_ms(lambda e, i=inputs, r=rows: run(e, i, r), spread))  # type: ignore[misc]
        return TimeTable(TOKENS, tuple(np.maximum.accumulate(times).tolist()))

    def copy(expert: ExpertId) -> None:
        transfers.submit([expert], [])
        transfers.wait([expert])
        transfers.arrivals()

    return HardwareProfile(
        host_ms=table(on_the_host),
        device_ms=table(on_the_device),
        transfer_ms=median_ms(copy, spread),
        source=f"measured on {device.device_kind}",
    )


def median_ms(run: Callable[[ExpertId], None], experts: list[ExpertId]) -> float:
    """Median time over different experts, so that their weights come from memory and not from a cache."""
    times = []
    for expert in experts:
        began = time.perf_counter()
        run(expert)
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times))
