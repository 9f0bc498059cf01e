"""Runs decode steps layer by layer, or with the expert cache inside the step, whichever measures faster."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
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


class Alternating:
    """A `Runner` that has two others, of which one at a time has the device's memory for experts.

    A `Contest` says which one runs the decode steps. A prefill is run by the one that has the memory. Calls
    of which single layers are recorded, and all once the runner with the cache inside has failed, are run
    layer by layer.

    Args:
        layers: has the memory at first.
        in_step: has none (`vacate`).

    Attributes:
        failed: whether a step of the runner with the cache inside has failed.
    """

    def __init__(self, layers: LayerByLayer, in_step: InStepCache):
        self._layers, self._in_step = layers, in_step
        self._now: LayerByLayer = layers
        self._last, self._holds = self._now, True  # the last that had the memory, and whether it has it
        self._contest, self.failed = Contest(), False
        self._compiled: set[Any] = set()  # kinds of decode steps that are compiled in both ways
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
        if not self._now.is_whole_decode(tokens, caches):
            with self._failure_noted():
                self._take_turns(self._now.account.records)
                return self._now.step(tokens, positions, last, caches, sampling)
        with self._failure_noted():
            self._take_turns(False)
        contest, kind = self._contest, None
        if contest.left <= 1 and not contest.trial:
            kind = kind_of(tokens, caches, sampling)  # before they are donated
        began = time.perf_counter()
        with self._failure_noted():
            stepped = self._now.step(tokens, positions, last, caches, sampling)
            stepped[0].block_until_ready()  # whoever asked reads them next
        took_s = time.perf_counter() - began
        requests = int((positions != PAD_POSITION).sum())
        if not self.failed:
            self._contest = after(contest, requests, took_s, kind in self._compiled)
        self._steps[self._now.mode] += 1
        return stepped

    def _take_turns(self, recorded: bool) -> None:
        """Gives the memory to the runner of the next step, if it has not got it."""
        inside = self._contest.now_in_step and not (recorded or self.failed)
        if inside != self.in_step:
            self._change()
        self._occupy()

    @contextmanager
    def _failure_noted(self) -> Iterator[None]:
        """Gives the runner with the cache inside up if it fails in the `with` block."""
        try:
            yield
        except Exception:
            self.failed = self.failed or self.in_step
            raise

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
        with self._failure_noted():
            self._take_turns(self._now.account.records)
            return self._now.score(tokens, positions, last, caches, sampling, targets, top)

    def _change(self) -> None:
        """Gives the device's memory to the other runner, whose experts are still to come."""
        before, account = self._now, self._now.account
        before.reset(None)
        before._books_of = None  # it counts anew when it comes back, and does not overwrite what is counted
        self._now = self._beside(before)
        self._occupy()
        self._now.reset(account)

    def _beside(self, runner: LayerByLayer) -> LayerByLayer:
        """Returns the other of the two."""
        return self._layers if runner is self._in_step else self._in_step

    def _occupy(self) -> None:
        """Takes the memory for the runner that is to have it, unless it has it.

        Copies on the link belong to the runner that had the memory last: it takes them in first. An interrupt
        may come anywhere; then all is done again.
        """
        if self._holds and self._last is self._now:
            return
        self._holds = False
        vacate(self._last)
        vacate(self._beside(self._last))
        self._now.sides[0].occupy()
        self._in_step.reserve(self.in_step)
        self._last = self._now
        self._holds = True

    def reset(self, account: Account | None) -> None:
        """Counts and records for one call from now on; see `Runner.reset`."""
        if account is not None and not account.opened:
            self._layers.forecasts.check()
        self._now.reset(account)

    def stats(self, account: Account) -> RunnerStats:
        """Returns the statistics of a call; its mode is the present one.

        `ways` are of all calls so far.
        """
        ways = dict(self._layers.policy.report(self._layers.decisions.state) or {})
        share = self._steps[InStepCache.mode] / max(1, self._steps.total())
        if share:
            planned = {way: part * (1 - share) for way, part in ways.get("decode", {}).items()}
            ways["decode"] = planned | {InStepCache.mode: share}
        forecasts = self._layers.forecasts  # which keep their memory
        return replace(
            self._now.stats(account),
            policy=self.policy.name,
            ways=ways,
            predictor=forecasts.name,
            predictor_bytes=forecasts.kept_bytes,
        )

    def rehearsal(self) -> BothRehearsed:
        """Returns a runner that compiles the programs of both; see `Runner.rehearsal`."""
        return BothRehearsed(self)

    def rehearsed(self, run: Callable[[Rehearsal, list[Any]], Any], caches: list[Any], kind: Any) -> Any:
        """Rehearses a step, and once in the other way too, for which the memory changes hands.

        Args:
            run: rehearses it, given a rehearsal and caches.
            caches: donated.
            kind: of the step (`kind_of`).

        Returns:
            What `run` returns.
        """
        if kind in self._compiled or self.failed:
            self._occupy()
            return run(self._now.rehearsal(), caches)
        self._take_turns(True)
        others = jax.tree.map(jnp.zeros_like, caches)
        result = run(self._now.rehearsal(), caches)
        try:
            self._change()
            run(self._now.rehearsal(), others)
            self._compiled.add(kind)
        except Exception as error:
            logger.info("policy 'auto' plans every step layer by layer, as the other way failed: %s", error)
            self.failed = True
        return result

    def settle_if_needed(self) -> None:
        """Waits for what an interrupted step has left behind; see `Runner.settle_if_needed`."""
        try:
            self._last.settle_if_needed()
        finally:
            self._beside(self._last).settle_if_needed()

    def close(self) -> None:
        """Ends both runners; see `Runner.close`."""
        close_all([self._in_step, self._layers])


def kind_of(tokens: np.ndarray, caches: list[Any], sampling: Sampling | None) -> Any:
    """Returns what decides which program runs a step: shapes, and the kinds of settings."""
    arrays, structure = jax.tree.flatten((tokens, caches, sampling))
    return structure, tuple((np.shape(array), str(getattr(array, "dtype", ""))) for array in arrays)


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

    def _run(self, *inputs: Any) -> Any:
        tokens, positions, last, caches, sampling, *scored = inputs

        def run(rehearsal: Rehearsal, caches: list[Any]) -> Any:
            if scored:
                return rehearsal.score(tokens, positions, last, caches, sampling, *scored[0])
            return rehearsal.step(tokens, positions, last, caches, sampling), None

        kind = kind_of(tokens, caches, sampling)
        # Of tokens that are scored, how many are reported is a program's own.
        return self.runner.rehearsed(run, caches, (kind, scored[0][1]) if scored else kind)
