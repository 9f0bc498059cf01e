"""Measures what it costs to read an expert from the disk, past the page cache."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.offload.disk import CHUNK, DiskBank, Files, aligned
from layerscope_jax.offload.pool import READERS
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support.threads import Helpers

EACH = 8
"""Experts that each reader reads in a measurement."""

READS_S = 0.5
"""Time (s) after which no further measurement begins."""


def with_disk(costs: HardwareProfile, bank: ExpertBank) -> HardwareProfile:
    """Returns costs with those of the disk, measured if the experts are there."""
    if not isinstance(bank, DiskBank):
        return costs
    read_ms, start_ms = read_times(bank)
    alone = costs.alone and replace(costs.alone, read_ms=read_ms, read_start_ms=start_ms)
    return replace(costs, read_ms=read_ms, read_start_ms=start_ms, alone=alone)


def read_times(bank: DiskBank) -> tuple[float, float]:
    """Returns `read_ms` and `read_start_ms` of `HardwareProfile`: medians of several reads, to four digits.

    As many readers as an engine has read different experts at the same time; then one reads alone. What a
    lone read takes longer than one of many is the time by which reads overlap.
    """
    experts = list(bank)
    random = np.random.default_rng(0)
    files, readers = Files(), Helpers(READERS, "layerscope-disk-costs")
    memories = [[(ctypes.c_char * piece.size)() for piece in bank.pieces(experts[0])] for _ in range(READERS)]
    buffers = [aligned(CHUNK) for _ in range(READERS)]

    def read(reader: int, chosen: Sequence[ExpertId]) -> None:
        for expert in chosen:
            files.read(bank.pieces(expert), memories[reader], buffers[reader])

    def read_share(shares: Sequence[Sequence[ExpertId]], reader: int) -> None:
        read(reader, shares[reader])

    many: list[float] = []
    alone: list[float] = []
    try:
        began = time.perf_counter()
        while len(many) < 3 or time.perf_counter() - began < READS_S:
            order = [experts[index] for index in random.integers(0, len(experts), (EACH * READERS))]
            shares = [order[reader::READERS] for reader in range(READERS)]
            start = time.perf_counter()
            readers.start(partial(read_share, shares), range(READERS)).result()
            many.append((time.perf_counter() - start) / len(order))
            for expert in order[:3]:
                start = time.perf_counter()
                read(0, [expert])
                alone.append(time.perf_counter() - start)
    finally:
        readers.close()
        files.close()
    each, lone = 1e3 * float(np.median(many)), 1e3 * float(np.median(alone))
    return float(f"{each:.4g}"), float(f"{max(0.0, lone - each):.4g}")
