"""Runs an offloaded model layer by layer: attend and route, plan, move experts, compute experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.dense import dense_kernels
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.models.decoder import Between
from layerscope_jax.offload.executors import device_experts
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.pool import HostPool
from layerscope_jax.offload.residency import Residency
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.computing import BothSides
from layerscope_jax.runtime.decisions import Decisions, Reads
from layerscope_jax.runtime.dense import DenseParts, StepInputs
from layerscope_jax.runtime.device_tier import DeviceTier
from layerscope_jax.runtime.lower_bound import least_decode_s
from layerscope_jax.runtime.reading_back import read
from layerscope_jax.runtime.resources import Closable, close_all
from layerscope_jax.runtime.runner import RunnerStats, Scored, Stepped
from layerscope_jax.runtime.sampling import Sampling
from layerscope_jax.runtime.scoring import Scores
from layerscope_jax.runtime.warmup import Rehearsal
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation, Phase
from layerscope_jax.scheduling.policy import PolicyBase
from layerscope_jax.support.devices import finish_all
from layerscope_jax.support.errors import TransferError


class LayerByLayer:
    """A `Runner` of a model whose experts live on the host, within a device budget.

    Args:
        model: the model.
        policy: plans each layer.
        state: its initial state.
        residency: residency of the device.
        transfers, host_experts, forecasts: owned by the runner; `close` closes them.
        costs: costs of the machine; None if they are not known.
        pool: host memory of experts that are on the disk, owned as well; None if all are in host memory.
        exact: whether no row of a step may depend on another.

    Attributes:
        account: account of the call that is counted for; at first of no call.
        dense, decisions, tier, experts: parts that attend and route, plan, move and compute.
        tap: function that receives each MoE layer's number, the inputs [T, D] of its experts, the chosen
            experts [T, K] and their weights [T, K]; None for no function.
    """

    mode = "layers"
    rehearsed_by = Rehearsal

    def __init__(
        self,
        model: Model,
        policy: PolicyBase,
        state: Any,
        residency: Residency,
        transfers: Transfers,
        host_experts: HostExperts,
        forecasts: Forecasts,
        costs: HardwareProfile | None = None,
        pool: HostPool | None = None,
        *,
        exact: bool = False,
    ):
        self.pool = pool
        self.model, self.policy, self.costs = model, policy, costs
        self.residency, self.transfers, self.forecasts = residency, transfers, forecasts
        self.host_experts = host_experts
        self.device_experts = device_experts(model.device, host_experts.cpu)
        self.dense = DenseParts(model, forecasts, host_experts.inside, exact)
        self.device_experts.reserve(model.bank, residency.slots)
        residency.let_go = self.device_experts.release
        if not self.device_experts.waits:
            self.dense.reads = "inputs" if policy.uses_host else "routing"
        self.tier = DeviceTier(residency, transfers, self.device_experts.keep)
        reads = None if pool is None else Reads(pool, model.geometry(0))
        self.decisions = Decisions(policy, state, self.tier, forecasts, model.bank, reads)
        self.experts = BothSides(self.device_experts, host_experts, self.tier)
        self.account = Account()
        self._books_of: Account | None = None  # the account that the residency last counted for
        self.tap: Callable[[int, jax.Array, np.ndarray, jax.Array], None] | None = None
        self._since = 0.0  # when the device got its current work
        self._settled = True  # whether all threads are idle and the residency agrees with the link

    @property
    def geometry(self) -> Geometry:
        """The model's geometry, with the slots that the budget leaves for experts."""
        return self.model.geometry(self.residency.slots)

    @property
    def resident_experts(self) -> int:
        """Number of experts on the device now."""
        return len(self.residency.resident)

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        """Runs one forward pass, or (for timing) only the layers that have caches; see `Runner.step`."""
        return self._run(tokens, positions, last, caches, sampling)[0]

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
        stepped, scores = self._run(tokens, positions, last, caches, sampling, (targets, top))
        assert scores is not None
        return stepped, scores

    def is_whole_decode(self, tokens: np.ndarray, caches: list[Any]) -> bool:
        """Whether a step is a decode step through all layers, of none of which anything is recorded."""
        whole = len(caches) == self.model.config.num_layers and self.tap is None
        return tokens.shape[1] == 1 and whole and not self.account.records

    def _run(self, tokens: np.ndarray, *others: Any) -> tuple[Stepped, Scores | None]:
        """Runs and counts one forward pass; the arguments are those of `DenseParts.through`."""
        timeline = self.account.timeline
        if timeline is not None:
            timeline.step = self.account.steps
        with self.settled_after():
            began = self._since = time.perf_counter()
            outcome = self.dense.through(self._layer, self.device_experts, tokens, *others)
        self.decisions.end_step()
        now = time.perf_counter()
        self.account.meter.device_busy_s += now - self._since
        if timeline is not None:
            timeline.device(self._since, now, self.model.config.num_moe_layers - 1, "logits")
            timeline.end_step(tokens.shape[1], began, now)
        self.account.steps += 1
        return outcome

    def _layer(
        self, layer: int, step: StepInputs, state: Between, caches: list[Any]
    ) -> tuple[Between, list[Any]]:
        """Runs one MoE layer and the dense layers before it."""
        meter, device, timeline = self.account.meter, self.device_experts, self.account.timeline
        began = 0.0 if timeline is None else time.perf_counter()
        looks_ahead = step.counted is not None and self.policy.wants_forecast(self.decisions.state)
        hidden, inputs, experts, weights, caches, expected, words = self.dense.attend(
            layer, step, state, caches, looks_ahead
        )
        if words is not None:
            words.copy_to_host_async()
        outputs: Any = device.take(experts.size, hidden.shape[-1], hidden.dtype)
        outputs = device.begin(outputs, inputs, experts, step.positions, layer)
        # The only read-back of the layer.
        if words is None:
            chosen, expected, held = (
                np.asarray(experts),
                None if expected is None else np.asarray(expected),
                inputs,
            )
        else:
            with_inputs = inputs if self.dense.reads == "inputs" else None
            chosen, expected, held = read(words, experts, expected, with_inputs)
        now = time.perf_counter()
        meter.device_busy_s += now - self._since
        if timeline is not None:
            timeline.device(self._since, now, layer, "attention")
        rows = Assignments(chosen, step.active)
        if self.tap is not None:
            self.tap(layer, inputs, chosen, weights)
        seen, plan = self._decide(layer, step.phase, rows, expected)
        if timeline is not None:
            timeline.add("scheduler", "plan", now, time.perf_counter(), layer)
        outputs, since, host = self.experts.begin(outputs, inputs, held, rows, plan, meter)
        self.forecasts.learn(seen, inputs, chosen, weights, step.active)
        if host is not None:
            outputs, since = self.experts.end(outputs, since, host, rows, plan, meter)
        self._since = since
        device.give_back(outputs)
        if timeline is not None:
            timeline.end_layer(layer, began, time.perf_counter())
        return Between(hidden, outputs, weights), caches

    def _decide(
        self, layer: int, phase: Phase, rows: Assignments, expected: np.ndarray | None
    ) -> tuple[Observation, LayerPlan]:
        """Asks the policy for a plan, counts it, and carries out its evictions and copies."""
        seen, plan = self.decisions.plan(self.account, layer, phase, rows.demand, expected)
        self.tier.follow(plan)
        if self.pool is not None:
            # Before anything is read ahead, which would take turns with these.
            self.pool.hold("host", [ExpertId(layer, expert) for expert in plan.host], urgent=True)
            self.pool.read_ahead(plan.read_ahead)
        return seen, plan

    @contextmanager
    def settled_after(self) -> Iterator[None]:
        """Settles threads, residency and link if the `with` block, a step, fails."""
        if not self._settled:  # an earlier copy did not end, or a second interrupt came
            self.settle()
        self._settled = False
        try:
            yield
        except BaseException as error:
            self.decisions.abandon_step()
            with suppress(TransferError):  # then the next step tries again
                if (other := self.host_experts.rest()) not in (None, error):
                    error.add_note(f"meanwhile the host's experts failed: {other!r}")
                self.settle()
            raise
        self._settled = True

    def settle(self) -> None:
        """Waits until all threads are idle and the residency agrees with the link, after a failure.

        Raises:
            TransferError: if a copy does not end; its room stays reserved.
        """
        self.host_experts.rest()
        if self.device_experts.waits:
            finish_all(self.transfers.sharding)  # programs may be running our kernels in memory that we own
        self.device_experts.clear()
        if self.device_experts.lost:
            self.tier.lose()
            self.device_experts.reserve(self.model.bank, self.residency.slots)
        self.tier.settle()
        if self.pool is not None:
            self.pool.settle()
        self._settled = True

    def settle_if_needed(self) -> None:
        """Settles if an interrupt kept the last step from doing so."""
        if not self._settled:
            self.settle()

    def preload(self) -> None:
        """Copies every expert to the device before the first step, at full speed even with an emulated link.

        If the device is this machine's CPU, nothing is copied.
        """
        for expert in self.model.bank:
            if self.device_experts.waits:
                self.tier.hold(expert, self.host_experts.weights(expert))
            else:
                copied = jax.device_put(self.model.bank[expert], self.transfers.sharding)
                self.tier.hold(expert, self.device_experts.keep(jax.block_until_ready(copied), expert))

    def reset(self, account: Account | None) -> None:
        """Starts to count and record for a call; see `Runner.reset`."""
        if account is self.account:
            return
        if account is not None and not account.opened:
            self.forecasts.check()
        if self._books_of is not None:
            self._books_of.leave_books(self.residency)
        self.account = account or self.account.after()
        timeline = self.experts.timeline = self.account.timeline
        self.transfers.spans = self.host_experts.spans = timeline
        self.transfers.stats = self.account.link
        self.host_experts.stats, self.device_experts.stats = self.account.host, self.account.device
        if self.pool is not None:
            self.pool.stats, self.pool.spans = self.account.disk, timeline
        if account not in (None, self._books_of):  # otherwise the counts still hold
            self._books_of = account
            self.account.take_books(self.residency)

    def stats(self, account: Account) -> RunnerStats:
        """Returns the statistics of a call; see `Runner.stats`."""
        if account is self._books_of:
            account.leave_books(self.residency)
        least_s = None
        if account.decoded and self.costs is not None:
            least_s = least_decode_s(account.decoded, self.geometry, self.costs)
        return RunnerStats(
            policy=self.policy.name,
            mode=self.mode,
            format=self.model.bank.format.name,
            dense_kernels=dense_kernels(
                self.model.config.hidden_size,
                self.model.bank.dtype,
                self.dense.table is not None,
                self.model.config.latent is not None,
                self.model.dense_format,
            ),
            dense_format=self.model.dense_format or self.model.bank.dtype.name,
            dense_bytes=self.model.dense_bytes,
            peak_expert_bytes=account.peak_bytes,
            predictor=self.forecasts.name,
            predictor_bytes=self.forecasts.kept_bytes,
            ways=self.policy.report(self.decisions.state),
            least_decode_s=least_s,
            expert_bytes=self.model.bank.expert_bytes,
        )

    def rehearsal(self) -> Rehearsal:
        """Returns a runner that compiles the programs of this one; see `Runner.rehearsal`."""
        return self.rehearsed_by(self, device_experts(self.model.device, self.host_experts.cpu))

    def close(self) -> None:
        """Ends the runner's threads and lets go of the device's memory; see `Runner.close`."""
        parts: list[Closable] = [self.host_experts, self.transfers, self.forecasts]
        close_all(parts if self.pool is None else [*parts, self.pool])
        self.residency.clear()
        self.device_experts.clear()
        self.device_experts.reserve(self.model.bank, 0)
