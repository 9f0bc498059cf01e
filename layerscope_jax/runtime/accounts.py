"""Accounts: counts and records of one call, separate from those of other calls that run between its steps."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, field, fields, replace

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
        meter, host, device, disk: counts by part.
        links: counts of the link to each device.
        steps: number of steps so far.
        peaks, wasted: bytes of each device's residency when it last stopped counting for this account.
        opened: whether anything was ever counted for this account.
    """

    plans: list[LayerPlan] | None = None
    decoded: list[dict[int, int]] | None = None
    timeline: Timeline | None = None
    meter: Meter = field(default_factory=Meter)
    links: list[LinkStats] = field(default_factory=lambda: [LinkStats()])
    host: WorkStats = field(default_factory=WorkStats)
    device: WorkStats = field(default_factory=WorkStats)
    disk: DiskStats = field(default_factory=DiskStats)
    steps: int = 0
    peaks: list[int] = field(default_factory=list)
    wasted: list[int] = field(default_factory=list)
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

    def link_to(self, number: int) -> LinkStats:
        """Returns the counts of the link to one of this process's devices."""
        while len(self.links) <= number:
            self.links.append(LinkStats())
        return self.links[number]

    @property
    def link(self) -> LinkStats:
        """Counts of all links together, and the mean of the times in which they were busy."""
        if len(self.links) == 1:
            return self.links[0]
        names = [field.name for field in fields(LinkStats)]
        whole = LinkStats(*(sum(getattr(link, name) for link in self.links) for name in names))
        return replace(whole, busy_s=whole.busy_s / len(self.links))

    @property
    def records(self) -> bool:
        """Whether single layers are recorded, so that each has to be run by itself."""
        return self.plans is not None or self.decoded is not None

    def after(self) -> Account:
        """Returns an account of no call, which shares only the counts of copies still in flight."""
        return Account(links=self.links, host=self.host, device=self.device, disk=self.disk)

    def leave_books(self, books: Sequence[Residency]) -> None:
        """Saves the counts of each device's residency before it counts for another account."""
        self.peaks = [each.peak_bytes for each in books]
        self.wasted = [each.unused_prefetch_bytes() for each in books]

    def take_books(self, books: Sequence[Residency]) -> None:
        """Restores the counts of the residencies, which continue to count for this account."""
        for number, each in enumerate(books):
            each.reset()
            if self.peaks:
                each.peak_bytes = max(each.peak_bytes, self.peaks[number])
                each.wasted_bytes = self.wasted[number]
        self.opened = True

    @property
    def peak_bytes(self) -> int:
        """The most bytes of experts on each device, together, when they last stopped counting for this."""
        return sum(self.peaks)

    @property
    def wasted_bytes(self) -> int:
        """Bytes of prefetches that were never used, as of then."""
        return sum(self.wasted)


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
        bytes_exchanged=meter.exchanged_bytes,
        dispatches=host.dispatches + device.dispatches,
        kernels=kernels | {REFERENCE: 1 - sum(kernels.values())} if experts else None,
        kernel_fallbacks=fallbacks(),
        **known,
    )
