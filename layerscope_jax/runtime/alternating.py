"""Runs decode steps layer by layer, or with the expert cache inside the step, whichever measures faster."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from layerscope_jax.kernels.xla_ffi import Unavailable
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.offload.fills import fill_for
from layerscope_jax.offload.residency import Residency
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.in_step import InStepCache
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.resources import close_all
from layerscope_jax.runtime.runner import RunnerStats, Scored, Stepped
from layerscope_jax.runtime.sampling import Sampling
from layerscope_jax.runtime.warmup import Rehearsal
from layerscope_jax.scheduling.contest import Contest, after
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.in_step import Streaming, slots_beside
from layerscope_jax.scheduling.policy import PolicyBase

logger = logging.getLogger(__name__)

STEADY = 8
"""Decode steps of about the same size before the runner changes for it: that empties the device."""


class Alternating:
    """A `Runner` of two, of which one has the device's memory for experts.

    For each power of two of the requests a `Contest` says which one runs the decode steps. A prefill is run
    by the one that has the memory; so is a decode step of which single layers are recorded.

    Args:
        layers: has the memory at first.
        in_step: has none (`vacate`).
    """

    def __init__(self, layers: LayerByLayer, in_step: InStepCache):
        self._layers, self._in_step = layers, in_step
        self._now: LayerByLayer = layers
        self._occupied = True
        self._contests: dict[int, Contest] = {}  # by the bits of the number of requests
        self._size, self._same = 0, 0  # of the newest decode step, and how many had the same
        self._compiled: set[int] = set()  # numbers of rows for which both have
        self._steps: Counter[str] = Counter()  # decode steps by mode

    @property
    def policy(self) -> PolicyBase:
        """The policy that plans layer by layer."""
        return self._layers.policy

    @property
    def costs(self) -> HardwareProfile | None:
        """Costs of the machine; see `Runner`."""
        return self._layers.costs

    @property
    def resident_experts(self) -> int:
        """Number of experts on the device now; see `Runner`."""
        return self._now.resident_experts

    @property
    def in_step(self) -> bool:
        """Whether decode steps now keep the cache inside."""
        return self._now is self._in_step

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        """Runs one forward pass; see `Runner.step`."""
        self._occupy()
        if not self._now.is_whole_decode(tokens, caches):
            return self._now.step(tokens, positions, last, caches, sampling)
        size = int((positions != PAD_POSITION).sum()).bit_length()
        self._size, self._same = size, self._same + 1 if size == self._size else 1
        contest = self._contests.get(size, Contest())
        if contest.now_in_step != self.in_step and self._same > STEADY:
            self._change()
        began = time.perf_counter()
        stepped = self._now.step(tokens, positions, last, caches, sampling)
        stepped[0].block_until_ready()  # whoever asked reads them next
        took_s = time.perf_counter() - began
        if contest.now_in_step == self.in_step:
            self._contests[size] = after(contest, took_s, len(tokens) in self._compiled)
        self._steps[self._now.mode] += 1
        return stepped

    def score(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
        targets: np.ndarray,
        top: int,
    ) -> Scored:
        """Runs a prefill step and scores tokens; see `Runner.score`."""
        self._occupy()
        return self._now.score(tokens, positions, last, caches, sampling, targets, top)

    def _change(self) -> None:
        """Gives the device's memory to the other runner, whose experts are still to come."""
        before, account = self._now, self._now.account
        before.reset(None)
        self._occupied = False  # until the end: an interrupt may come between any two of these
        self._now = self._in_step if before is self._layers else self._layers
        self._occupy()
        self._now.reset(account)

    def _occupy(self) -> None:
        """Takes the memory for the runner that is to have it, unless it has it."""
        if not self._occupied:
            vacate(self._layers)
            vacate(self._in_step)
            self._now.sides[0].occupy()
            self._in_step.reserve(self.in_step)
            self._occupied = True

    def reset(self, account: Account | None) -> None:
        """Counts and records for one call from now on; see `Runner.reset`."""
        self._now.reset(account)

    def stats(self, account: Account) -> RunnerStats:
        """Returns the statistics of a call; its mode is the present one."""
        ways = dict(self._layers.policy.report(self._layers.decisions.state) or {})
        share = self._steps[InStepCache.mode] / max(1, self._steps.total())
        if share:
            planned = {way: part * (1 - share) for way, part in ways.get("decode", {}).items()}
            ways["decode"] = planned | {InStepCache.mode: share}
        return replace(self._now.stats(account), policy=self.policy.name, ways=ways)

    def rehearsal(self) -> BothRehearsed:
        """Returns a runner that compiles the programs of both; see `Runner.rehearsal`."""
        return BothRehearsed(self)

    def rehearsed(self, run: Callable[[Rehearsal, list[Any]], Any], caches: list[Any], rows: int) -> Any:
        """Rehearses one step by each of the two, one after the other.

        Args:
            run: rehearses it, given a rehearsal and caches.
            caches: donated.
            rows: of a decode step; 0 for a prefill.

        Returns:
            What `run` returns.
        """
        self._occupy()
        result = run(self._now.rehearsal(), caches)
        caches = (result if len(result) == 3 else result[0])[2]
        self._change()
        try:
            result = run(self._now.rehearsal(), caches)
        finally:
            self._change()
        if rows:
            self._compiled.add(rows)
        return result

    def settle_if_needed(self) -> None:
        """Waits for what an interrupted step has left behind; see `Runner.settle_if_needed`."""
        self._layers.settle_if_needed()
        self._in_step.settle_if_needed()

    def close(self) -> None:
        """Ends both runners; see `Runner.close`."""
        close_all([self._in_step, self._layers])


def vacate(runner: LayerByLayer) -> None:
    """Lets go of a runner's experts on the device; it runs no step before it has memory again."""
    if isinstance(runner, InStepCache):
        runner.reserve(False)
    runner.settle()
    for side in runner.sides:
        side.close()


def alternating(layers: LayerByLayer) -> LayerByLayer | Alternating:
    """Returns a runner of policy "auto" that also tries decode steps with the cache inside.

    It is the same runner where nothing fills slots inside a step, or the budget is too small for that.
    """
    model, budget_bytes = layers.model, layers.residency.budget_bytes
    size, policy = model.bank.expert_bytes, Streaming()
    try:
        slots, fill = slots_beside(model.geometry(budget_bytes // size)), fill_for(model.device)
    except (ValueError, Unavailable) as error:
        logger.info("policy 'auto' plans every step layer by layer: %s", error)
        return layers
    residency = Residency(budget_bytes - slots * model.config.num_moe_layers * size, size)
    geometry = model.geometry(residency.slots)
    forecasts = Forecasts(None, model, geometry)
    parts = residency, layers.transfers, layers.host_experts, forecasts
    vacate(layers)
    in_step = InStepCache(slots, fill, model, policy, policy.init(geometry, None), *parts)
    vacate(in_step)
    layers.sides[0].occupy()
    return Alternating(layers, in_step)


class BothRehearsed(Rehearsal):
    """`Rehearsal` of a runner that alternates: each step is rehearsed in both ways."""

    runner: Alternating  # type: ignore[assignment]

    def __init__(self, runner: Alternating):
        self.runner, self.policy, self.costs = runner, runner.policy, runner.costs

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        def run(rehearsal: Rehearsal, caches: list[Any]) -> Stepped:
            return rehearsal.step(tokens, positions, last, caches, sampling)

        return self.runner.rehearsed(run, caches, len(tokens) if tokens.shape[1] == 1 else 0)

    def score(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
        targets: np.ndarray,
        top: int,
    ) -> Scored:
        def run(rehearsal: Rehearsal, caches: list[Any]) -> Scored:
            return rehearsal.score(tokens, positions, last, caches, sampling, targets, top)

        return self.runner.rehearsed(run, caches, 0)
