"""Computes the experts of one layer on device and host at the same time, as they become available."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from layerscope_jax.kernels.grouping import GROUP_SIZES, Assignments
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.runtime.device_tier import DeviceTier
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.runtime.timeline import Timeline
from layerscope_jax.scheduling.plan import LayerPlan
from layerscope_jax.support.threads import Job

ARRIVALS = GROUP_SIZES[1]
"""Loaded experts that are computed together, so that dispatching does not delay the link."""


class HostPart(NamedTuple):
    """Work of the host while the device computes.

    Attributes:
        job: job of the host's threads.
        rows: [T * K + 1, D] array that it writes to.
        done: array that is ready when the device has computed its experts.
    """

    job: Job
    rows: np.ndarray
    done: jax.Array | None


class BothSides:
    """Computes experts on the sides that a plan assigns them to.

    Args:
        device, host: the executors.
        tier: experts in device memory.

    Attributes:
        timeline: where work and waits are recorded; None to record none.
    """

    timeline: Timeline | None = None

    def __init__(self, device: DeviceExperts | SharedExperts, host: HostExperts, tier: DeviceTier):
        self._device, self._host, self._tier = device, host, tier

    def begin(
        self, outputs: Any, inputs: jax.Array, held: Any, rows: Assignments, plan: LayerPlan, meter: Meter
    ) -> tuple[Any, float, HostPart | None]:
        """Starts the host's experts and computes the device's, those in flight as they arrive.

        If the device has nothing to do, or is the same CPU, this thread computes the host's experts itself
        instead of waiting.

        Args:
            outputs: [T * K + 1, D] array to write rows to.
            inputs: [T, D] inputs of the experts.
            held: the same where the host has read them already; None if it has not.
            rows: rows of each expert.
            plan: the layer's plan.
            meter: counts the busy time of the device.

        Returns:
            The outputs, the time at which the device got its current work, and the unfinished work of the
            host (None if there is none), for `end`.

        Raises:
            TransferError: if an expert could not be copied.
        """
        layer, device = plan.layer, self._device
        job: Job | None = None
        given = inputs if held is None else held
        if plan.host:
            host_rows = device.host_rows(outputs)
            if plan.device and not device.waits:
                job = self._host.start(host_rows, layer, given, rows, plan.host)
        outputs, done, since, missing = self.ready(outputs, inputs, rows, plan, meter)
        if plan.host and job is None:
            self._await_device(done, since, layer, meter)
            self._host.compute(host_rows, layer, given, rows, plan.host)
            since = time.perf_counter()
            outputs = device.place(outputs, host_rows, rows, plan.host)
        outputs, done, since = self.arriving(outputs, inputs, rows, layer, missing, done, since, meter)
        return outputs, since, None if job is None else HostPart(job, host_rows, done)

    def ready(
        self, outputs: Any, inputs: jax.Array, rows: Assignments, plan: LayerPlan, meter: Meter
    ) -> tuple[Any, jax.Array | None, float, Sequence[int]]:
        """Has the device compute those of its experts that are resident.

        Returns:
            The outputs, an array that is ready when they are, the time at which the device got its current
            work, and the experts that are not resident yet.
        """
        since, tier = time.perf_counter(), self._tier
        missing = tier.missing(plan.layer, plan.device)
        ready = [e for e in plan.device if e not in missing] if missing else plan.device
        outputs, done, since = self._run(outputs, inputs, plan.layer, rows, ready, since, meter)
        return outputs, done, since, missing

    def arriving(
        self,
        outputs: Any,
        inputs: jax.Array,
        rows: Assignments,
        layer: int,
        missing: Sequence[int],
        done: jax.Array | None,
        since: float,
        meter: Meter,
    ) -> tuple[Any, jax.Array | None, float]:
        """Has the device compute experts as they arrive; takes what `ready` returned.

        Raises:
            TransferError: if an expert could not be copied.
        """
        tier = self._tier
        while missing:
            self._await_device(done, since, layer, meter)
            # A few at a time: the last ones wait a little for each other, but there are fewer dispatches. If
            # copying uses the same cores, computing meanwhile gains nothing (`benchmarks/NOTES.md`).
            few = len(missing) if tier.transfers.within else min(len(missing), ARRIVALS)
            began = time.perf_counter() if self.timeline is not None else 0.0
            tier.fetch(layer, missing, few)
            since = time.perf_counter()
            if self.timeline is not None:
                self.timeline.add("scheduler", "wait for link", began, since, layer)
            still = tier.missing(layer, missing)
            ready = [e for e in missing if e not in still]
            outputs, done, since = self._run(outputs, inputs, layer, rows, ready, since, meter)
            missing = still
        return outputs, done, since

    def end(
        self, outputs: Any, since: float, host: HostPart, rows: Assignments, plan: LayerPlan, meter: Meter
    ) -> tuple[Any, float]:
        """Waits for the host and places its rows into the outputs; takes what `begin` returned."""
        self._await_device(host.done, since, plan.layer, meter)
        began = time.perf_counter() if self.timeline is not None else 0.0
        host.job.result()
        since = time.perf_counter()
        if self.timeline is not None:
            self.timeline.add("scheduler", "wait for host", began, since, plan.layer)
        return self._device.place(outputs, host.rows, rows, plan.host), since

    def _run(
        self,
        outputs: Any,
        inputs: jax.Array,
        layer: int,
        rows: Assignments,
        experts: Sequence[int],
        since: float,
        meter: Meter,
    ) -> tuple[Any, jax.Array | None, float]:
        """Has the device compute experts; returns when it got what it is still busy with, too."""
        if not experts:
            return outputs, None, since
        outputs, done = self._device.run(
            outputs, inputs, rows, experts, functools.partial(self._tier.residency.use, layer)
        )
        if self.timeline is not None:
            self.timeline.give(experts)
        if self._device.waits:
            since = self._busy(since, layer, meter)
        return outputs, done, since

    def _await_device(self, done: jax.Array | None, since: float, layer: int, meter: Meter) -> None:
        """Waits for the device before a wait for host or link, to measure how long the device was busy."""
        if done is not None:
            jax.block_until_ready(done)
            self._busy(since, layer, meter)

    def _busy(self, since: float, layer: int, meter: Meter) -> float:
        """Counts the device as busy until now; returns the time."""
        now = time.perf_counter()
        meter.device_busy_s += now - since
        if self.timeline is not None:
            self.timeline.device(since, now, layer)
        return now
