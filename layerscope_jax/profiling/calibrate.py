"""Measures a machine's profile for a model: each part alone and beside the others, by size and context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.cpu import default_threads
from layerscope_jax.offload.staged import host_parts
from layerscope_jax.prediction.predictors import NextGate
from layerscope_jax.profiling.disk_costs import with_disk
from layerscope_jax.profiling.jobs import Jobs
from layerscope_jax.profiling.machine_profile import MachineProfile, ModelShape
from layerscope_jax.profiling.measure import BUSY_TOKENS, Points, costs, others, tables, timed_ms
from layerscope_jax.support import machine
from layerscope_jax.support.machine import cpu_device
from layerscope_jax.support.units import parse_bytes

THOROUGH = Points(tokens=(1, 4, 8, 16, 32, 64, 128, 256), decode=(1, 4, 16, 64), prefill=(1024,))
CONTEXTS = (64, 1024, 4096)
"""Cache lengths, besides `Points.context`, at which decode steps of 1 and of 16 requests are timed."""

WAYS = {"alone": False, "together": True}

BESIDE = {
    "host_ms": "experts on the device, and copies",
    "device_ms": "experts on the host, and copies",
    "transfer_ms": "experts on the host and on the device",
    "layer_ms": "copies",
    "forecast_ms": "copies",
}


def calibrate(
    model: Model,
    *,
    device_budget: str | int | None = None,
    host_budget: str | int | None = None,
    emulated_link_bandwidth: str | int | None = None,
    points: Points = THOROUGH,
    contexts: Sequence[int] = CONTEXTS,
) -> MachineProfile:
    """Measures the costs of a model on this machine.

    Args:
        model: the model, on the device that it will run on.
        device_budget: device memory (bytes) for experts, also during measurements; None for all experts.
        host_budget: host memory (bytes) for experts of a model that has them on the disk, also during
            measurements; None for all experts. The costs of the disk are measured for such a model only.
        emulated_link_bandwidth: bandwidth (bytes/s) that copies are limited to; None for no limit.
        points: token counts and positions to measure at.
        contexts: further cache lengths at which layers are timed, up to the model's context.

    Raises:
        ValueError: if the budget has no room for an expert.
    """
    bank, slots = model.bank, None
    if device_budget is not None:
        slots = parse_bytes(device_budget, "device_budget") // bank.expert_bytes
        if slots < 1:
            raise ValueError(
                f"device_budget must hold an expert of {bank.expert_bytes} B, got {device_budget}"
            )
    pace = (
        None
        if emulated_link_bandwidth is None
        else parse_bytes(emulated_link_bandwidth, "emulated_link_bandwidth")
    )
    if pace == 0:
        raise ValueError(
            "emulated_link_bandwidth must be more than 0 bytes a second; leave it out for no limit"
        )
    began = time.perf_counter()
    free = {"host": machine.free_bytes(), "device": machine.device_free_bytes(model.device)}
    held = None if host_budget is None else parse_bytes(host_budget, "host_budget")
    pool, host, transfers = host_parts(
        bank, model.device, cpu_device(), default_threads(model.device), pace, held
    )
    jobs: Jobs | None = None
    try:
        jobs = Jobs(model, host, transfers, len(list(bank)) if slots is None else slots)
        alone, together = costs(jobs, points, list(WAYS.values()), NextGate())
        details: dict[str, Any] = {
            "costs": {
                "tokens": "of an expert; of a step for layer_ms",
                "context_of_layer_ms": min(points.context, model.config.max_position_embeddings),
                "beside": BESIDE if jobs.roomy else "one other part: the budget has no room for two experts",
                "tokens_of_experts_beside": BUSY_TOKENS,
            },
            "transfer_by_size": by_size(jobs),
            "layer_ms_by_context": by_context(jobs, points, contexts),
            "host_threads": host.cpu.threads,
            "memory": {
                "host_read_bytes_per_s": float(f"{machine.read_bytes_per_s():.4g}"),
                "host_free_bytes": free["host"],
                "device_free_bytes": free["device"],
            },
        }
    finally:
        if jobs is not None:
            jobs.close()
        transfers.close()
        host.close()
        if pool is not None:
            pool.close()
    details["seconds"] = round(time.perf_counter() - began, 1)
    return MachineProfile(
        name=model.config.family if model.path is None else model.path.name,
        costs=with_disk(replace(together, alone=replace(alone, source=together.source)), bank),
        model=ModelShape.of(model),
        machine=machine.describe(model.device),
        versions=machine.versions(),
        slots=slots,
        emulated_link_bandwidth=pace,
        details=details,
    )


def by_size(jobs: Jobs) -> dict[str, dict[str, Any]]:
    """Times copies of one and of several experts, alone and with the other parts busy; see `line`."""
    sizes = [2**power for power in range(jobs.arriving.bit_length())]
    beside = {"alone": [], "together": others(jobs, "link")}
    times = {size: [timed_ms(jobs.link(size), some) for some in beside.values()] for size in sizes}
    expert_bytes = jobs.model.bank.expert_bytes
    return {
        way: line(sizes, expert_bytes, [times[size][index] for size in sizes])
        for index, way in enumerate(beside)
    }


def line(sizes: Sequence[int], expert_bytes: int, times: Sequence[float]) -> dict[str, Any]:
    """Fits latency and bandwidth to times of copies; both are None if noise hides the slope.

    >>> line([1, 2], 1000, [0.5, 0.7])["latency_ms"], line([1, 2], 1000, [0.5, 0.7])["bytes_per_s"]
    (0.3, 5000000.0)
    """
    sent = [size * expert_bytes for size in sizes]
    latency_ms = bytes_per_s = None
    if len(sizes) > 1 and min(times) > 0:
        slope, start = np.polyfit(sent, times, 1, w=1 / np.array(times))  # noise grows with the time
        if slope > 0:
            latency_ms, bytes_per_s = float(f"{max(0.0, start):.4g}"), float(f"{1e3 / slope:.4g}")
    return {
        "experts": sizes,
        "bytes": sent,
        "ms": times,
        "latency_ms": latency_ms,
        "bytes_per_s": bytes_per_s,
    }


def by_context(jobs: Jobs, points: Points, contexts: Sequence[int]) -> dict[str, Any]:
    """Times decode steps by cache length: context -> alone, with the other parts busy."""
    requests = [rows for rows in points.decode if rows in (1, 16)]
    known = [context for context in contexts if context <= jobs.model.config.max_position_embeddings]
    link = others(jobs, "layer")
    measured_by_context: dict[str, Any] = {}
    for context in known if requests else ():
        layers = {rows: jobs.layer(rows, 1, context) for rows in requests}
        pair = tables(layers, [[], link])
        measured_by_context[str(context)] = {
            way: measured.to_json() for way, measured in zip(WAYS, pair, strict=True)
        }
    return measured_by_context
