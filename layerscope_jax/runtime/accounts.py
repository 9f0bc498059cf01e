"""What each call of an engine did: its own, whatever other calls come between its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from layerscope_jax.kernels.cpu import WorkStats
from layerscope_jax.offload.link import LinkStats
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.lower_bound import lower_bound_ms
from layerscope_jax.runtime.outcome import busy, counted
from layerscope_jax.runtime.statistics import Meter, RunStats, Times
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.guard import Guard
from layerscope_jax.scheduling.plan import Geometry, LayerPlan


@dataclass(eq=False)
class Account:
    """What one call counts and records.

    Attributes:
        plans: every layer's decision, if that is to be kept.
        decoded: the demand of each layer of each decode step, if that is.
        meter, link, host, device: counts.
        steps: that the call has gone through.
        peak_bytes, wasted_bytes: of the books, when somebody else was last counted for.
        opened: whether it was ever counted for.
    """

    plans: list[LayerPlan] | None = None
    decoded: list[dict[int, int]] | None = None
    meter: Meter = field(default_factory=Meter)
    link: LinkStats = field(default_factory=LinkStats)
    host: WorkStats = field(default_factory=WorkStats)
    device: WorkStats = field(default_factory=WorkStats)
    steps: int = 0
    peak_bytes: int = 0
    wasted_bytes: int = 0
    opened: bool = False


def count_for(runner: WholeModel | LayerByLayer, account: Account | None) -> None:
    """Lets a runner count and record for one call from now on, and puts aside what it did for another.

    What crosses the link between two steps is counted for whoever had the first.

    Args:
        runner: between two steps.
        account: of the call; None for nobody, where one has ended.
    """
    before = runner.account
    if account is before:
        return
    runner.account = account
    if not isinstance(runner, LayerByLayer):
        runner.meter = Meter() if account is None else account.meter
        return
    books = runner.residency
    if before is not None:
        before.steps = runner.steps
        before.peak_bytes, before.wasted_bytes = books.peak_bytes, books.unused_prefetch_bytes()
    runner.record = runner.decoded = None
    if account is None:
        return
    runner.steps, runner.decoded, runner.meter = account.steps, account.decoded, account.meter
    if account.plans is not None:
        runner.record = account.plans.append
    runner.transfers.stats = account.link
    runner.device_experts.stats, runner.host_experts.stats = account.device, account.host
    books.reset()
    if account.opened:
        books.peak_bytes = max(books.peak_bytes, account.peak_bytes)
        books.wasted_bytes = account.wasted_bytes
    account.opened = True


def stats_of(
    runner: WholeModel | LayerByLayer,
    account: Account,
    times: Times,
    total_s: float,
    *,
    costs: HardwareProfile | None,
    **known: Any,
) -> RunStats:
    """The statistics of a call.

    Args:
        runner: that it went by.
        account: what was counted.
        times: what was measured.
        total_s: wall time.
        costs: of the machine, for the share of the bound.
        **known: what is known of the call and its engine: prompts, new_tokens, budget_bytes.
    """
    known |= {"predictor": None, "predictor_bytes": 0, "ways": None, "share_of_bound": None}
    known |= {"policy": "resident", "peak_expert_bytes": runner.model.bank.total_bytes}
    if isinstance(runner, LayerByLayer):
        known |= {"policy": runner.policy.name, "peak_expert_bytes": account.peak_bytes}
        known |= {"predictor": runner.forecasts.name, "predictor_bytes": runner.forecasts.kept_bytes}
        if isinstance(runner.policy, Guard):
            known["ways"] = runner.policy.report(runner.state)
        if account.decoded and costs is not None:
            geometry = runner.geometry
            known["share_of_bound"] = share_of_bound(account.decoded, geometry, costs, sum(times.decode_s))
    new_tokens = known["new_tokens"]
    meter, link, host, device = account.meter, account.link, account.host, account.device
    rows, experts = host.rows + device.rows, host.experts + device.experts
    kernels = {name: n / experts for name, n in (host.by_kernel + device.by_kernel).items()}
    return RunStats(
        prompt_tokens=times.prompt_tokens,
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
        padding=1 - (host.tokens + device.tokens) / rows if rows else 0.0,
        dispatches=host.dispatches + device.dispatches,
        kernels=kernels | {"xla": 1 - sum(kernels.values())} if experts else None,
        mode=runner.mode,
        **known,
    )


def share_of_bound(
    demand: Sequence[dict[int, int]], geometry: Geometry, costs: HardwareProfile, decode_s: float
) -> float:
    """The least time that costs allow any policy for decode steps, by what they took.

    Args:
        demand: of each layer of each step.
        geometry: of the model and the budget.
        costs: of the machine.
        decode_s: what the steps took together.
    """
    layers, experts = geometry.num_layers, geometry.num_experts
    counts = np.zeros((len(demand) // layers, layers, experts), int)
    for turn, tokens in enumerate(demand):
        counts[turn // layers, turn % layers, list(tokens)] = list(tokens.values())
    each = counts[:, 0].sum(1) // geometry.experts_per_token
    least_ms = lower_bound_ms(counts, each.tolist(), geometry, costs.alone or costs)
    return least_ms / (1e3 * decode_s)
