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
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.pool import HostPool
from layerscope_jax.offload.residency import Residency
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.runtime import unsettled
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.computing import BothSides
from layerscope_jax.runtime.decisions import Reads
from layerscope_jax.runtime.dense import DenseParts, StepInputs
from layerscope_jax.runtime.device_side import DeviceSide
from layerscope_jax.runtime.lower_bound import least_decode_s
from layerscope_jax.runtime.processes import spans_processes
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
        sides: parts of each of this process's devices; of one device also `residency`, `transfers`, `tier`,
            `device_experts` and `decisions`.
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
        unsettled.let_go()
        self.pool = pool
        self.model, self.policy, self.costs = model, policy, costs
        self.forecasts, self.host_experts = forecasts, host_experts
        self.dense = DenseParts(model, forecasts, host_experts.inside, exact)
        reads = None if pool is None else Reads(pool, model.geometry(0))
        side = self._side(0, state, residency, transfers, reads)
        self.sides = [side]
        self.residency, self.transfers, self.tier = residency, transfers, side.tier
        self.device_experts, self.decisions = side.experts, side.decisions
        if not self.device_experts.waits:
            self.dense.reads = "inputs" if policy.uses_host else "routing"
        self.experts = BothSides(self.device_experts, host_experts, self.tier)
        self.account = Account()
        self._books_of: Account | None = None  # the account that the residency last counted for
        self.tap: Callable[[int, jax.Array, np.ndarray, jax.Array], None] | None = None
        self._since = 0.0  # when the device got its current work
        self._read_at = 0.0  # when the routing of the layer was read
        self._settled = True  # whether all threads are idle and the residency agrees with the link

    def _side(
        self,
        position: int,
        state: Any,
        residency: Residency,
        transfers: Transfers,
        reads: Reads | None = None,
    ) -> DeviceSide:
        """Returns the side of the model's device, or of one of this process's devices that share it."""
        bank, device, partition = self.model.bank, self.model.device, self.model.partition
        own, first = range(bank.num_experts), 0
        if partition is not None:
            device, first = partition.devices[partition.local[position]], partition.held.start
            own = partition.part(partition.local[position])
        return DeviceSide(
            bank, device, own, first, self.host_experts, self.policy, state, residency, transfers, reads
        )

    @property
    def geometry(self) -> Geometry:
        """The model's geometry, with the slots that the budget leaves for experts."""
        return self.model.geometry(self.residency.slots)

    @property
    def resident_experts(self) -> int:
        """Number of experts on the device now."""
        return sum(len(side.residency.resident) for side in self.sides)

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
            outcome = self.dense.through(self._layer, self._nothing, tokens, *others)
        for side in self.sides:
            side.decisions.end_step()
        now = time.perf_counter()
        self.account.meter.device_busy_s += now - self._since
        if timeline is not None:
            timeline.device(self._since, now, self.model.config.num_moe_layers - 1, "logits")
            timeline.end_step(tokens.shape[1], began, now)
        self.account.steps += 1
        return outcome

    def _nothing(self, total: int, width: int, dtype: np.dtype) -> Any:
        """Returns the rows that the first layer adds: zeros."""
        return self.device_experts.nothing(total, width, dtype)

    def _layer(
        self, layer: int, step: StepInputs, state: Between, caches: list[Any]
    ) -> tuple[Between, list[Any]]:
        """Runs one MoE layer and the dense layers before it."""
        meter, device, timeline = self.account.meter, self.device_experts, self.account.timeline
        began, decoding = 0.0 if timeline is None else time.perf_counter(), step.phase == "decode"
        if layer == 0:
            state = state._replace(outputs=device.passed_on(state.outputs, decoding))
        hidden, inputs, experts, weights, caches, expected, words = self.dense.attend(
            layer, step, state, caches, self._looks_ahead(step)
        )
        if words is not None:
            words.copy_to_host_async()
        outputs: Any = device.take(experts.size, hidden.shape[-1], hidden.dtype)
        outputs = device.begin(outputs, inputs, experts, step.positions, layer)
        chosen, expected, held = self._read_back(layer, experts, expected, inputs, weights, words)
        rows = Assignments(chosen, step.active)
        seen, plan = self._decide(layer, step.phase, rows, expected)
        outputs, since, host = self.experts.begin(outputs, inputs, held, rows, plan, meter)
        self.forecasts.learn(seen, inputs, chosen, weights, step.active)
        if host is not None:
            outputs, since = self.experts.end(outputs, since, host, rows, plan, meter)
        self._since = since
        device.give_back(outputs)
        if timeline is not None:
            timeline.end_layer(layer, began, time.perf_counter())
        return Between(hidden, device.passed_on(outputs, decoding), weights), caches

    def _looks_ahead(self, step: StepInputs) -> bool:
        """Whether the layer's program is to make a forecast."""
        if step.counted is None or not self.spares_forecasts(step.phase):
            return step.counted is not None
        return any(self.policy.wants_forecast(side.decisions.state) for side in self.sides)

    def spares_forecasts(self, phase: Phase) -> bool:
        """Whether a layer may do without the policy's forecast, which is a program of its own.

        On an accelerator a prefill has others enough, and a forecast costs it little.
        """
        return self.policy.spares_forecasts and (phase == "decode" or self.device_experts.waits)

    def _read_back(
        self,
        layer: int,
        experts: jax.Array,
        expected: jax.Array | None,
        inputs: jax.Array,
        weights: jax.Array,
        words: jax.Array | None,
    ) -> tuple[np.ndarray, np.ndarray | None, Any]:
        """Waits for a layer's routing: chosen experts, forecast, and inputs where the host has them."""
        # The only read-back of the layer.
        chosen: np.ndarray
        if words is None:
            chosen = np.asarray(experts)
            forecast, held = None if expected is None else np.asarray(expected), inputs
        else:
            with_inputs = inputs if self.dense.reads == "inputs" else None
            chosen, forecast, held = read(words, experts, expected, with_inputs)  # type: ignore[assignment]
        now = time.perf_counter()
        self.account.meter.device_busy_s += now - self._since
        self._read_at = now
        if self.account.timeline is not None:
            self.account.timeline.device(self._since, now, layer, "attention")
        if self.tap is not None:
            self.tap(layer, inputs, chosen, weights)
        return chosen, forecast, held

    def _decide(
        self, layer: int, phase: Phase, rows: Assignments, expected: np.ndarray | None
    ) -> tuple[Observation, LayerPlan]:
        """Asks the policy for a plan, counts it, and carries out its evictions and copies."""
        forecast = self.forecasts.read(layer, expected, sum(rows.demand.values()))
        account = self.account
        seen, plan = self.decisions.plan(account.steps, layer, phase, rows.demand, forecast, account.enter)
        self.tier.follow(plan)
        if self.pool is not None:
            # Before anything is read ahead, which would take turns with these.
            self.pool.hold("host", [ExpertId(layer, expert) for expert in plan.host], urgent=True)
            self.pool.read_ahead(plan.read_ahead)
        if account.timeline is not None:
            account.timeline.add("scheduler", "plan", self._read_at, time.perf_counter(), layer)
        return seen, plan

    @contextmanager
    def settled_after(self) -> Iterator[None]:
        """Settles threads, residency and link if the `with` block, a step, fails."""
        if not self._settled:  # an earlier copy did not end, or a second interrupt came
            self.settle()
        self._check_files()
        self._settled = False
        try:
            yield
            self._check_files()
        except BaseException as error:
            for side in self.sides:
                side.decisions.abandon_step()
            with suppress(TransferError):  # then the next step tries again
                if (other := self.host_experts.rest()) not in (None, error):
                    error.add_note(f"meanwhile the host's experts failed: {other!r}")
                self.settle()
            raise
        self._settled = True

    def _check_files(self) -> None:
        """Raises a ValueError if a file was written to that the model's experts are mapped from."""
        if self.model.mapped is not None:
            self.model.mapped.check()

    def settle(self) -> None:
        """Waits until all threads are idle and the residency agrees with the link, after a failure.

        Raises:
            TransferError: if a copy does not end; its room stays reserved.
        """
        self.host_experts.rest()
        self.finish_programs()
        for side in self.sides:
            side.settle()
        if self.pool is not None:
            self.pool.settle()
        self._settled = True

    def finish_programs(self) -> None:
        """Waits for programs that may be running our kernels, in memory that we own."""
        if self.host_experts.inside is None:
            return
        finish_all(self.transfers.sharding)
        partition = self.model.partition
        if partition is not None and not spans_processes(partition):
            finish_all(partition.replicated)  # those of all devices have an order of their own

    def settle_if_needed(self) -> None:
        """Settles if an interrupt kept the last step from doing so."""
        if not self._settled:
            self.settle()

    def preload(self) -> None:
        """Copies every expert to the device before the first step, at full speed even with an emulated link.

        If the device is this machine's CPU, nothing is copied.
        """
        for side in self.sides:
            side.preload()

    def reset(self, account: Account | None) -> None:
        """Starts to count and record for a call; see `Runner.reset`."""
        if account is self.account:
            return
        if account is not None and not account.opened:
            self.forecasts.check()
        if self._books_of is not None:
            self._leave_books(self._books_of)
        self.account = account or self.account.after()
        timeline = self.experts.timeline = self.account.timeline
        self.host_experts.spans, self.host_experts.stats = timeline, self.account.host
        for number, side in enumerate(self.sides):
            side.transfers.spans, side.transfers.stats = timeline, self.account.link_to(number)
            side.experts.stats = self.account.device
        if self.pool is not None:
            self.pool.stats, self.pool.spans = self.account.disk, timeline
        if account not in (None, self._books_of):  # otherwise the counts still hold
            self._books_of = account
            self.account.take_books([side.residency for side in self.sides])

    def _leave_books(self, account: Account) -> None:
        account.leave_books([side.residency for side in self.sides])

    def stats(self, account: Account) -> RunnerStats:
        """Returns the statistics of a call; see `Runner.stats`."""
        if account is self._books_of:
            self._leave_books(account)
        least_s = None
        if account.decoded and self.costs is not None:
            least_s = self._least_s(account.decoded, self.costs)
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
                self.model.config.delta,
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

    def _least_s(self, decoded: list[dict[int, int]], costs: HardwareProfile) -> float | None:
        """Returns the lower bound on the time of decode steps, from their demand."""
        return least_decode_s(decoded, self.geometry, costs)

    def rehearsal(self) -> Rehearsal:
        """Returns a runner that compiles the programs of this one; see `Runner.rehearsal`."""
        return self.rehearsed_by(self, self.sides[0].another())

    def close(self) -> None:
        """Ends the runner's threads and lets go of the device's memory; see `Runner.close`."""
        if not self._settled:
            unsettled.keep(self)
        links = [side.transfers for side in self.sides]
        parts: list[Closable] = [self.host_experts, *links, self.forecasts]
        close_all(parts if self.pool is None else [*parts, self.pool])
        for side in self.sides:
            side.close()
