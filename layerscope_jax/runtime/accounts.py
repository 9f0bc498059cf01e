"""Accounts: counts and records of one call, separate from those of other calls that run between its steps."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import asdict, dataclass, field

import numpy as np

from layerscope_jax.kernels.cpu import WorkStats
from layerscope_jax.kernels.registry import REFERENCE, fallbacks
from layerscope_jax.offload.link import LinkStats
from layerscope_jax.offload.pool import DiskStats
from layerscope_jax.offload.residency import Residency
from layerscope_jax.runtime.outcome import busy, counted, read
from layerscope_jax.runtime.runner import RunnerStats
from layerscope_jax.runtime.statistics import Meter, RunStats, Times
from layerscope_jax.runtime.timeline import Timeline
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan, Observation


@dataclass(eq=False)
class Account:
    """Counts and records of one call.

    Attributes:
        plans: every layer's plan; None if plans are not recorded.
        decoded: the demand of each layer of each decode step, for the lower bound; None if it is not
            recorded.
        timeline: what ran when; None if it is not recorded.
        meter, link, host, device, disk: counts by part.
        steps: number of steps so far.
        peak_bytes, wasted_bytes: counts of the residency when it last stopped counting for this account.
        opened: whether anything was ever counted for this account.
    """

    plans: list[LayerPlan] | None = None
    decoded: list[dict[int, int]] | None = None
    timeline: Timeline | None = None
    meter: Meter = field(default_factory=Meter)
    link: LinkStats = field(default_factory=LinkStats)
    host: WorkStats = field(default_factory=WorkStats)
    device: WorkStats = field(default_factory=WorkStats)
    disk: DiskStats = field(default_factory=DiskStats)
    steps: int = 0
    peak_bytes: int = 0
    wasted_bytes: int = 0
    opened: bool = False

    def enter(self, seen: Observation, plan: LayerPlan, idle_prefetches: Set[ExpertId]) -> None:
        """Counts one planned layer, and records it if records are kept."""
        if self.decoded is not None and seen.phase == "decode":
            self.decoded.append(dict(seen.demand))
        if self.timeline is not None:
            self.timeline.decide(seen, plan, self.meter.forecast)
        self.meter.count(seen, idle_prefetches)
        if self.plans is not None:
            self.plans.append(plan)

    @property
    def records(self) -> bool:
        """Whether single layers are recorded, so that each has to be run by itself."""
        return self.plans is not None or self.decoded is not None

    def after(self) -> Account:
        """Returns an account of no call, which shares only the counts of copies still in flight."""
        return Account(link=self.link, host=self.host, device=self.device, disk=self.disk)

    def leave_books(self, books: Residency) -> None:
        """Saves the counts of the residency before it counts for another account."""
        self.peak_bytes, self.wasted_bytes = books.peak_bytes, books.unused_prefetch_bytes()

    def take_books(self, books: Residency) -> None:
        """Restores the counts of the residency, which continues to count for this account."""
        books.reset()
        if self.opened:
            books.peak_bytes = max(books.peak_bytes, self.peak_bytes)
            books.wasted_bytes = self.wasted_bytes
        self.opened = True


def run_stats(
    account: Account,
    runner: RunnerStats,
    times: Times,
    total_s: float,
    *,
    prompts: int,
    new_tokens: int,
    budget_bytes: int,
    budget_cuts: int = 0,
) -> RunStats:
    """Returns the statistics of a call.

    Args:
        account: counts of the call.
        runner: statistics of its runner.
        times: times measured while generating.
        total_s: wall time (s).
        prompts, new_tokens: number of prompts and of generated tokens.
        budget_bytes: device budget (bytes) of the engine.
        budget_cuts: how often that became smaller.
    """
    meter, link, host, device = account.meter, account.link, account.host, account.device
    rows, experts = host.rows + device.rows, host.experts + device.experts
    kernels = {name: n / experts for name, n in (host.by_kernel + device.by_kernel).items()}
    known = asdict(runner)
    least_s = known.pop("least_decode_s")
    del known["expert_bytes"]
    return RunStats(
        budget_bytes=budget_bytes,
        budget_cuts=budget_cuts,
        prompts=prompts,
        prompt_tokens=times.prompt_tokens,
        cached_tokens=times.cached_tokens,
        new_tokens=new_tokens,
        total_s=total_s,
        ttft_s=float(np.mean(times.first_token_s)) if times.first_token_s else 0.0,
        tpot_s=float(np.mean(times.decode_s)) if times.decode_s else 0.0,
        tokens_per_s=new_tokens / total_s,
        **busy(total_s, device=meter.device_busy_s, host=host.busy_s, link=link.busy_s),
        **counted(
            meter,
            demand_bytes=link.demand_bytes,
            prefetch_bytes=link.prefetch_bytes,
            wasted_bytes=account.wasted_bytes,
        ),
        **read(account.disk, runner.expert_bytes, total_s),
        share_of_bound=None if least_s is None else least_s / sum(times.decode_s),
        padding=1 - (host.tokens + device.tokens) / rows if rows else 0.0,
        dispatches=host.dispatches + device.dispatches,
        kernels=kernels | {REFERENCE: 1 - sum(kernels.values())} if experts else None,
        kernel_fallbacks=fallbacks(),
        **known,
    )
