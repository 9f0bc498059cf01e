"""What judges a link: loops over what an engine copied, and loads that overtake prefetches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks import harness
from layerscope_jax import ExpertBank, ExpertId
from layerscope_jax.offload.bank import device_sharding
from layerscope_jax.offload.link import Transfers


@dataclass
class Loads:
    """What the layers of a run loaded, and how long they waited for it.

    Attributes:
        layers: experts, layer after layer.
        seconds: from asking for a layer's loads until the last was there, all added up.
    """

    layers: list[list[ExpertId]] = field(default_factory=list)
    seconds: float = 0.0


@contextlib.contextmanager
def loads_of(transfers: Transfers) -> Iterator[Loads]:
    """Notes them while an engine that prefetches nothing is at work."""
    found, asked = Loads(), 0.0
    submit, wait = transfers.submit, transfers.wait

    def submitting(load: Sequence[ExpertId], prefetch: Sequence[ExpertId]) -> None:
        nonlocal asked
        asked = time.perf_counter()
        if load:
            found.layers.append(list(load))
        submit(load, prefetch)

    def waiting(*arguments: Any) -> None:
        nonlocal asked
        wait(*arguments)
        now = time.perf_counter()
        found.seconds += now - asked
        asked = now  # until the next part of them is there

    with (
        mock.patch.object(transfers, "submit", submitting),
        mock.patch.object(transfers, "wait", waiting),
    ):
        yield found


def plain_loop(bank: ExpertBank, device: jax.Device, layers: Sequence[Sequence[ExpertId]]) -> float:
    """Seconds to copy all these, a layer's arrays at a time."""
    sharding = device_sharding(device)
    began = time.perf_counter()
    for layer in layers:
        copies = [jax.device_put(matrix, sharding) for expert in layer for matrix in bank.chunks(expert)]
        jax.block_until_ready(copies)
    return time.perf_counter() - began


def never_empty(transfers: Transfers, layers: Sequence[Sequence[ExpertId]]) -> float:
    """The same over `transfers`: while one layer's are copied, the next layer's are queued already."""
    left: set[ExpertId] = set()

    def take(some: set[ExpertId]) -> None:
        while left & some:
            transfers.wait((), 1)
            left.difference_update(transfers.arrivals()[0])

    began = time.perf_counter()
    for layer in layers:
        take(set(layer))  # an expert is not queued twice
        before = set(left)
        transfers.submit(layer, [])
        left.update(layer)
        take(before)
    take(set(left))
    return time.perf_counter() - began


def overtaking(bank: ExpertBank, bandwidth: int | None, trials: int) -> dict[str, Any]:
    """Loads of one expert of `bank`: alone, and while prefetches of all others are queued and under way.

    Times are in those of one chunk: as paced, or, if not, as a plain loop takes for one.
    """
    device, (wanted, *others), chunks_each = jax.devices()[0], bank, bank.arrays_per_expert
    first, random, began = bank.chunks(wanted)[0], np.random.default_rng(0), 0.0

    def copy(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        nonlocal began
        if array is first:
            began = time.perf_counter()
        return jax.device_put(array, sharding)

    if bandwidth is None:
        rounds = [plain_loop(bank, device, [list(bank)]) for _ in range(3)]
        chunk_s = float(np.median(rounds)) / chunks_each / (1 + len(others))
    else:
        chunk_s = bank.expert_bytes / chunks_each / bandwidth
    transfers = Transfers(bank, device, bandwidth, copy)

    def load(prefetches: Sequence[ExpertId], after: float) -> harness.Parts:
        transfers.submit([], prefetches)
        time.sleep(after)  # a load may be asked for at any moment of a chunk
        asked = time.perf_counter()
        transfers.submit([wanted], [])
        while wanted not in transfers.arrivals()[0]:
            transfers.wait([wanted])
        ended = time.perf_counter()
        transfers.cancel()
        transfers.arrivals()
        return {"begins": (began - asked) / chunk_s, "there": (ended - asked) / chunk_s}

    ways = {
        "alone": lambda: load([], 0.0),
        "overtaking": lambda: load(others, random.uniform(0.0, 2.0) * chunk_s),
    }
    try:
        samples = harness.measure(ways, trials)
    finally:
        transfers.close()

    def chunks(part: str) -> dict[str, Any]:
        found = {way: samples[way].parts[part] for way in ways}
        return {way: harness.spread(values) | {"most": max(values)} for way, values in found.items()}

    return {
        "chunk_bytes": bank.expert_bytes // chunks_each,
        "chunk_ms": 1e3 * chunk_s,
        "prefetches": len(others),
        "chunks_until_it_begins": chunks("begins"),
        "chunks_until_it_is_there": chunks("there"),
    }
