"""Measures what computing and moving an expert costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.experts.bank import ExpertBank, device_sharding
from layerscope_jax.experts.executors import HostExperts, grouped_rows
from layerscope_jax.experts.grouping import GROUP_SIZES, Assignments
from layerscope_jax.experts.transfers import Transfers
from layerscope_jax.scheduling.costs import HardwareProfile, TimeTable
from layerscope_jax.scheduling.plan import ExpertId

TOKENS = (1, 4, 16, 64, 128, 256)
ROUNDS = 5


def measure(
    bank: ExpertBank, device: jax.Device, host: HostExperts, transfers: Transfers, slots: int
) -> HardwareProfile:
    """Times an expert of `bank` on the device, on the host and on the link; a few seconds in all.

    Experts are computed as a layer computes them, several in a call, and the time is shared out: a call's own
    cost is not an expert's. At no time are there more experts on the device than it has room for, and there
    are none when this is over.

    Args:
        bank: whose experts.
        device: the device tier, still empty.
        host: the host executor.
        transfers: the link, idle; measured as it is used, with its pace and its thread.
        slots: experts that the budget has room for. If none, one expert at a time is on the device all the
            same; a policy that never puts one there needs no profile.
    """
    width = bank[ExpertId(0, 0)].gate.shape[0]
    together = min(GROUP_SIZES[0], bank.num_experts)
    fitting = min(together, max(1, slots))
    layers = len(bank.layers)

    def table(count: int, run: Callable[[int, jax.Array, Assignments], None]) -> TimeTable:
        times = []
        for tokens in TOKENS:
            chosen = np.repeat(np.arange(count, dtype=np.int32), tokens)
            inputs = jax.device_put(jnp.ones((len(chosen), width), bank.dtype), device_sharding(device))
            rows = Assignments(chosen[:, None])
            for round in range(ROUNDS):  # compiles, and meets each expert for the first time
                run(round, inputs, rows)
            times.append(median_ms(lambda r, i=inputs, a=rows: run(r, i, a)) / count)  # type: ignore[misc]
        return TimeTable(TOKENS, tuple(np.maximum.accumulate(times).tolist()))

    def on_the_host(round: int, inputs: jax.Array, rows: Assignments) -> None:
        host.start(round % layers, inputs, rows.groups(range(together)), 1).result()

    def device_table() -> TimeTable:
        experts = [jax.device_put(bank[ExpertId(0, e)], device_sharding(device)) for e in range(fitting)]

        def on_the_device(round: int, inputs: jax.Array, rows: Assignments) -> None:
            jax.block_until_ready(
                [
                    grouped_rows(inputs, group.slots, tuple(experts[e] for e in group.experts), 1)
                    for group in rows.groups(range(fitting))
                ]
            )

        return table(fitting, on_the_device)  # and the experts leave the device

    def copy(round: int) -> None:
        wanted = {ExpertId(round % layers, e) for e in range(fitting)}
        transfers.submit(wanted, [])
        while wanted:
            transfers.wait(wanted)
            wanted -= transfers.arrivals()[0].keys()

    return HardwareProfile(
        host_ms=table(together, on_the_host),
        device_ms=device_table(),
        transfer_ms=median_ms(copy) / fitting,
        source=f"measured on {device.device_kind}",
    )


def median_ms(run: Callable[[int], None]) -> float:
    """Median time of `run(round)`."""
    times = []
    for round in range(ROUNDS):
        began = time.perf_counter()
        run(round)
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times))
