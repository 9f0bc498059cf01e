"""Measures the costs of layers and experts on this machine, each alone and while the other parts are busy."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.prediction.predictors import Predictor
from layerscope_jax.profiling.disk_costs import with_disk
from layerscope_jax.profiling.jobs import LAYERS, Job, Jobs
from layerscope_jax.scheduling.costs import NOTHING, HardwareProfile, TimeTable
from layerscope_jax.support import machine
from layerscope_jax.support.threads import Helpers

CONTEXT = 256
"""Default cache length of the requests in the table of layers."""

BUSY_TOKENS = 4
"""Tokens of each expert that keeps the host or the device busy during a measurement."""

ROUNDS, MOST_ROUNDS, ROUNDS_S = 5, 25, 0.1
"""A job is timed at least `ROUNDS` times, then until `ROUNDS_S` seconds or `MOST_ROUNDS` are reached."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Token counts and positions to measure at; each costs a compilation or two, most of the measuring time.

    Attributes:
        tokens: tokens of an expert.
        decode: requests of a decode step.
        prefill: tokens of a prefill, all requests together; more than in any decode step.
        context: cache length of a request in the table of layers, at most the model's context.
    """

    tokens: tuple[int, ...]
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    context: int = CONTEXT


ROUGH = Points(tokens=(1, 4, 16, 64, 256), decode=(1,), prefill=(256,))
"""Points that an engine without a profile measures at."""


def measure(
    model: Model,
    host: HostExperts,
    transfers: Transfers,
    slots: int,
    neighbours: Sequence[jax.Device] = (),
) -> HardwareProfile:
    """Measures the parts of a layer at a few points, alone and with the others busy, within some seconds.

    Never more than `slots` experts are on the device (see `Jobs`), and none afterwards.

    Args:
        model: the model, on an idle device.
        host: the host executor.
        transfers: the link, idle.
        slots: number of experts that the budget holds.
        neighbours: devices that share the model's experts, which copy some too while the link is timed.
    """
    jobs = Jobs(model, host, transfers, slots, neighbours)
    try:
        together, alone = costs(jobs, ROUGH, [True, False])
    finally:
        jobs.close()
    return with_disk(replace(together, alone=alone), model.bank)


def costs(
    jobs: Jobs, points: Points, ways: Sequence[bool], predictor: Predictor | None = None
) -> list[HardwareProfile]:
    """Measures all parts of a layer.

    Args:
        jobs: jobs of the model.
        points: token counts and positions to measure at.
        ways: whether the other parts are busy meanwhile (see `others`); a profile is returned for each. The
            ways take turns at each point, so that a machine that drifts drifts under all of them.
        predictor: predictor whose forecast is timed too; None for no predictor.
    """
    config = jobs.model.config
    context = min(points.context, config.max_position_embeddings)
    shapes = {rows: (rows, 1, context) for rows in points.decode}
    for tokens in points.prefill:
        length = min(context, tokens)
        shapes[tokens // length * length] = (tokens // length, length, length)
    parts = ("host", "device", "link", "layer")
    beside = {part: [others(jobs, part) if together else [] for together in ways] for part in parts}
    host = tables({n: jobs.host(n) for n in points.tokens}, beside["host"], jobs.computed)
    job = jobs.host_start()
    start = [timed_ms(job, some) - table(1) for some, table in zip(beside["host"], host, strict=True)]
    device = tables({n: jobs.device(n) for n in points.tokens}, beside["device"], jobs.resident)
    link = jobs.link(jobs.arriving)
    transfer = [timed_ms(link, some, jobs.arriving) for some in beside["link"]]
    layer = tables({n: jobs.layer(*shape) for n, shape in shapes.items()}, beside["layer"])
    forecast = [NOTHING for _ in ways]
    if predictor is not None:
        looking = {n: jobs.layer(*shape, predictor) for n, shape in shapes.items()}
        forecast = list(map(difference, tables(looking, beside["layer"]), layer))
    jobs.clear()
    where = f"measured on {machine.cpu_name()}, {machine.cores()} cores, and {jobs.model.device.device_kind}"
    return [
        HardwareProfile(
            host_ms=host[way],
            device_ms=device[way],
            transfer_ms=transfer[way],
            layer_ms=layer[way],
            forecast_ms=forecast[way],
            host_start_ms=max(0.0, start[way]),
            source=f"{where}, {'the other parts busy' if together else 'each part alone'}",
        )
        for way, together in enumerate(ways)
    ]


def others(jobs: Jobs, part: str) -> list[Job]:
    """Returns the jobs that keep the other parts busy while `part` is timed, as in an engine.

    Both sides compute experts while the link copies some. During attention only the link is busy, with copies
    for later layers.
    """
    # One wake-up for what is copied disturbs the others less than several.
    link = jobs.link(jobs.arriving, at_once=jobs.arriving)
    host, device = jobs.host(BUSY_TOKENS), jobs.device(BUSY_TOKENS)
    near = jobs.neighbours() if part == "link" else []
    return (
        near
        + {
            "host": [device, link] if jobs.roomy else [link],
            "device": [host, link] if jobs.roomy else [host],
            "link": [host, device] if jobs.roomy else [host],
            "layer": [link],
        }[part]
    )


def tables(jobs: dict[int, Job], besides: Sequence[list[Job]], share: int = 1) -> list[TimeTable]:
    """Times jobs by token count; returns a table for each of `besides`, the jobs that run meanwhile.

    Each time is at most that of the next larger count, because noise only makes times longer.
    """
    times = [[timed_ms(job, beside, share) for beside in besides] for job in jobs.values()]
    return [
        TimeTable(tuple(jobs), tuple(np.minimum.accumulate(column[::-1])[::-1].tolist()))
        for column in zip(*times, strict=True)
    ]


def difference(longer: TimeTable, shorter: TimeTable) -> TimeTable:
    """Returns how much longer the first takes at the same points; 0 where noise says less.

    >>> difference(TimeTable((1, 8), (2.5, 3.0)), TimeTable((1, 8), (2.0, 3.5)))
    TimeTable(tokens=(1, 8), ms=(0.5, 0.0))
    """
    more = (float(f"{max(0.0, a - b):.4g}") for a, b in zip(longer.ms, shorter.ms, strict=True))
    return TimeTable(longer.tokens, tuple(more))


def timed_ms(job: Job, beside: list[Job], share: int = 1) -> float:
    """Returns the median ms of `job` while each of `beside` repeats, divided by `share`, to four digits."""
    for each in (job, *beside):
        warm_up(each)
    times: list[float] = []
    with busy(beside):
        while len(times) < ROUNDS or (len(times) < MOST_ROUNDS and sum(times) < ROUNDS_S):
            began = time.perf_counter()
            counted = job(len(times))
            times.append(time.perf_counter() - began if counted is None else counted)
    return float(f"{1e3 * float(np.median(times)) / share:.4g}")


def warm_up(job: Job) -> None:
    """Runs a job until it is compiled and has used its experts once; a long job runs fewer times."""
    job(0)
    began = time.perf_counter()
    for round in range(1, 4 * LAYERS):
        if time.perf_counter() - began < ROUNDS_S:
            job(round)


@contextmanager
def busy(jobs: Iterable[Job]) -> Iterator[None]:
    """Repeats each job on a thread of its own; all have begun when the `with` block is entered."""
    jobs = list(jobs)
    if not jobs:
        yield
        return
    ended = threading.Event()
    begun = [threading.Event() for _ in jobs]

    def run(number: int) -> None:
        try:
            for round in itertools.count():
                jobs[number](round)
                begun[number].set()
                if ended.is_set():
                    break
        finally:
            begun[number].set()

    helpers = Helpers(len(jobs), "layerscope-busy")
    try:
        done = helpers.start(run, range(len(jobs)))
        for event in begun:
            event.wait()
        yield
    finally:
        ended.set()
        helpers.close()
    done.result()  # raises what a job raised
