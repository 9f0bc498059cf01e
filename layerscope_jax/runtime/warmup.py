"""Compiles ahead of time: a rehearsal runs each program that a batch may need, without other effects."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from layerscope_jax.kernels.cpu import InMemory, WorkStats, grouped_rows
from layerscope_jax.kernels.grouping import Assignments, possible_groups
from layerscope_jax.models.decoder import Between
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts
from layerscope_jax.runtime.dense import StepInputs
from layerscope_jax.runtime.sampling import Sampling
from layerscope_jax.scheduling.plan import ExpertId, Observation, Phase

if TYPE_CHECKING:
    from layerscope_jax.runtime.accounts import Account
    from layerscope_jax.runtime.layerwise import LayerByLayer
    from layerscope_jax.runtime.runner import RunnerStats, Scored, Stepped


class Rehearsal:
    """A `Runner` that runs the dense parts of a step, and every program of experts once, with the first
    layer.

    Nothing is planned, moved, counted or learned: the parts of `runner` are read and not changed.

    Args:
        runner: runner whose programs are compiled.
        device_experts: executor with output arrays of its own.
    """

    def __init__(self, runner: LayerByLayer, device_experts: DeviceExperts | SharedExperts):
        self.runner, self.policy, self.costs = runner, runner.policy, runner.costs
        self._device_experts = device_experts

    @property
    def resident_experts(self) -> int:
        """Number of experts on the device now; see `Runner`."""
        return self.runner.resident_experts

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        """Runs every program that a step of this shape may need; see `Runner.rehearsal`."""
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
        """As `step`, of a step that scores tokens."""
        return self._run(tokens, positions, last, caches, sampling, (targets, top))

    def _run(self, *inputs: Any) -> Any:
        self.runner.settle_if_needed()
        try:
            return self.runner.dense.through(self._layer, self._device_experts.nothing, *inputs)
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Waits, after a failure, until all threads but the link's are idle; the link is not used."""
        self.runner.host_experts.rest()
        self.runner.finish_programs()
        self._device_experts.clear()

    def reset(self, account: Account | None) -> None:
        """Does nothing, because nothing is counted."""

    def stats(self, account: Account) -> RunnerStats:
        """Returns the statistics of the runner."""
        return self.runner.stats(account)

    def rehearsal(self) -> Rehearsal:
        return self

    def settle_if_needed(self) -> None:
        """Settles the runner if one of its steps was interrupted."""
        self.runner.settle_if_needed()

    def close(self) -> None:
        """Does nothing, because the threads belong to the runner."""

    def _layer(
        self, layer: int, step: StepInputs, state: Between, caches: list[Any]
    ) -> tuple[Between, list[Any]]:
        runner, device, decoding = self.runner, self._device_experts, step.phase == "decode"
        if layer == 0:
            state = state._replace(outputs=device.passed_on(state.outputs, decoding))
        looks_ahead = runner.forecasts.in_layer is not None
        if looks_ahead and runner.spares_forecasts(step.phase):
            *_, caches, _, _ = runner.dense.attend(layer, step, state, caches, False)
        hidden, inputs, experts, weights, caches, expected, _ = runner.dense.attend(
            layer, step, state, caches, looks_ahead
        )
        outputs: Any = device.take(experts.size, hidden.shape[-1], hidden.dtype)
        if layer == 0:
            outputs = runner.device_experts.begin(
                outputs, inputs, experts, step.positions, layer, always=True
            )
            chosen, expected = jax.device_get((experts, expected))
            self._ask(step.phase, Assignments(chosen, step.active), expected)
            outputs = self._experts(outputs, inputs, chosen, int(step.active.sum()))
        device.give_back(outputs)
        return Between(hidden, device.passed_on(outputs, decoding), weights), caches

    def _ask(self, phase: Phase, rows: Assignments, expected: np.ndarray | None) -> None:
        """Asks the policy for a plan, which compiles its loops, and drops the plan; policies are pure."""
        runner = self.runner
        seen = Observation(
            step=0 if phase == "prefill" else 1,
            layer=0,
            phase=phase,
            demand=rows.demand,
            resident=runner.residency.resident,
            in_flight=runner.residency.coming,
            forecast=runner.forecasts.read(0, expected, sum(rows.demand.values())),
        )
        with suppress(ValueError):  # recorded plans may cover fewer steps
            runner.policy.plan(runner.decisions.state, seen)

    def _experts(self, outputs: Any, inputs: jax.Array, chosen: np.ndarray, tokens: int) -> Any:
        """Runs every program for experts with up to `tokens` tokens, on each side that may compute them."""
        runner, policy = self.runner, self.policy
        choices = chosen.shape[1]
        first = ExpertId(0, 0)
        shared, slots = self._device_experts.waits, runner.residency.slots
        device: Any = runner.device_experts
        # If the device is this machine's CPU, experts that are always resident stay in the bank.
        copies = slots and policy.uses_device and (policy.uses_host or not shared)
        if shared or policy.uses_host:
            self._on_cpu(inputs, chosen, tokens, runner.host_experts.weights(first))
        if policy.uses_host:
            outputs = device.rehearse_placing(outputs)
        if copies:
            weights = jax.device_put(runner.model.bank.parcel(first), runner.transfers.sharding)
            if shared:
                kept: Any = self._device_experts.keep(weights)
                self._on_cpu(inputs, chosen, tokens, kept)
            else:
                groups = possible_groups(tokens, choices, runner.model.config.num_experts)
                outputs = device.rehearse(outputs, inputs, groups, weights, choices)
        return outputs

    def _on_cpu(self, inputs: jax.Array, chosen: np.ndarray, tokens: int, weights: InMemory) -> None:
        """Runs every program of the CPU's executor, with these weights in host memory."""
        choices = chosen.shape[1]
        few = Assignments(chosen[:1])
        row, first = np.zeros((choices + 1, inputs.shape[1]), inputs.dtype), np.asarray(inputs)[:1]
        self.runner.host_experts.cpu.compute(
            row, first, few, few.demand, lambda experts: [weights] * len(experts), WorkStats()
        )
        if self.runner.host_experts.cpu.kernel is not None:
            return  # this has compiled them
        local = jax.device_put(np.asarray(inputs), weights.arrays[0].sharding)
        for bucket, size in possible_groups(tokens, choices, self.runner.model.config.num_experts):
            slots = np.full((size, bucket), chosen.size, np.int32)
            same = (weights.arrays,) * size
            jax.block_until_ready(grouped_rows(local, slots, same, choices, weights.layout.format.ffn))
