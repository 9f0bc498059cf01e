"""Compiling ahead: a rehearsal runs each program that a batch may need, and leaves nothing else behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import numpy as np

from layerscope_jax.kernels.cpu import InMemory, WorkStats, grouped_rows
from layerscope_jax.kernels.grouping import Assignments, next_power, possible_groups
from layerscope_jax.models.layers import KVCache
from layerscope_jax.offload.executors import SharedExperts, grouped_ffn, place_rows, product_of
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.programs import Between
from layerscope_jax.runtime.resident import ResidentOnCpu
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.scheduling.baselines import HostOnly, Resident
from layerscope_jax.scheduling.plan import ExpertId, Observation, Phase
from layerscope_jax.support.devices import finish_all


def rehearsal(runner: WholeModel | LayerByLayer) -> WholeModel | LayerByLayer:
    """A runner whose steps compile what the steps of `runner` will need."""
    if isinstance(runner, LayerByLayer):
        return Rehearsal(runner)
    other = copy.copy(runner)
    other.meter = Meter()
    return other


class Rehearsal(LayerByLayer):
    """Steps without experts: dense parts alone, and beside the first layer one run of every expert program.

    Nothing is decided, moved or learned: the rooms of `runner` are read and not written.
    """

    def __init__(self, runner: LayerByLayer):
        super().__init__(
            runner.model,
            runner.policy,
            runner.state,
            runner.residency,
            runner.transfers,
            runner.host_experts,
            runner.forecasts,
        )
        self._runner, self.table = runner, runner.table

    def step(self, tokens: np.ndarray, *others: Any) -> tuple[jax.Array, jax.Array, list[KVCache]]:
        if not self._runner._settled:
            self._runner.settle()
        if tokens.shape[1] > 1 or not isinstance(self._runner, ResidentOnCpu):
            return super().step(tokens, *others)
        try:
            found = self._runner.decode(tokens, *others)
            found[0].block_until_ready()
        except BaseException:
            self.settle()
            raise
        finally:
            self._runner.inside.take_counts()
        return found

    def settle(self) -> None:
        """As of any runner, but for the link, which is at work for somebody else."""
        self.host_experts.rest()
        if self.device_experts.waits:
            finish_all(self.transfers.sharding)
        self.device_experts.clear()
        self._settled = True

    def _layer(
        self,
        layer: int,
        phase: Phase,
        state: Between,
        positions: np.ndarray,
        active: np.ndarray,
        counted: jax.Array | None,
        cache: KVCache,
        began: float,
    ) -> tuple[Between, KVCache, float]:
        ways: list[tuple[Callable, tuple]] = []
        if self.forecasts.in_layer is None or hasattr(self.policy, "wants_forecast"):
            ways.append((self._attend_alone, (None, None, None)))
        if self.forecasts.in_layer is not None:
            ways.append((self._programs.attend_and_route, (*self.forecasts.inputs(layer), counted)))
        for part, forecast in ways:
            hidden, inputs, experts, weights, cache, expected = part(
                self._layers[layer], state, positions, cache, *forecast, self.table
            )
        outputs: Any = self.device_experts.take(experts.size, hidden.shape[-1], hidden.dtype)
        if layer == 0:
            chosen, expected = jax.device_get((experts, expected))
            self._ask(phase, Assignments(chosen, active), expected)
            outputs = self._experts(outputs, inputs, chosen, int(active.sum()))
        self.device_experts.give_back(outputs)
        return Between(hidden, outputs, weights), cache, began

    def _ask(self, phase: Phase, rows: Assignments, expected: np.ndarray | None) -> None:
        """Asks the policy, whose loops are then compiled: a pure function. Its answer is dropped."""
        seen = Observation(
            step=0 if phase == "prefill" else 1,
            layer=0,
            phase=phase,
            demand=rows.demand,
            resident=self.residency.resident,
            in_flight=self.residency.coming,
            forecast=self.forecasts.read(0, expected, sum(rows.demand.values())),
        )
        with suppress(ValueError):  # recorded plans may be those of fewer steps
            self.policy.plan(self.state, seen)

    def _experts(self, outputs: Any, inputs: jax.Array, chosen: np.ndarray, tokens: int) -> Any:
        """Runs every program that up to so many tokens may need, wherever experts may be computed."""
        total, choices = chosen.size, chosen.shape[1]
        first = ExpertId(0, 0)
        shared = isinstance(self.device_experts, SharedExperts)
        resident = isinstance(self.policy, Resident)
        if shared or not resident:  # where device and host are one, residents stay in the bank
            self._on_cpu(inputs, chosen, tokens, self.host_experts.weights(first))
        if not (shared or resident):
            for power in range(next_power(tokens * choices).bit_length()):
                slots = np.full(1 << power, total, np.int32)
                outputs = place_rows(outputs, slots, np.zeros((1 << power, outputs.shape[1]), outputs.dtype))
        if self.residency.slots and not isinstance(self.policy, HostOnly) and not (shared and resident):
            weights = jax.device_put(self.model.bank[first], self.transfers.sharding)
            if isinstance(self.device_experts, SharedExperts):
                self._on_cpu(inputs, chosen, tokens, self.device_experts.keep(weights))
            else:
                _, product = product_of(self.model.bank.format, weights, inputs.dtype, self.model.device)
                for bucket, size in possible_groups(tokens, choices, self.model.config.num_experts):
                    slots = np.full((size, bucket), total, np.int32)
                    outputs, _ = grouped_ffn(outputs, inputs, slots, (weights,) * size, choices, product)
        return outputs

    def _on_cpu(self, inputs: jax.Array, chosen: np.ndarray, tokens: int, weights: InMemory) -> None:
        """The same for what computes with these weights in this machine's memory."""
        choices = chosen.shape[1]
        few = Assignments(chosen[:1])
        row, first = np.zeros((choices + 1, inputs.shape[1]), inputs.dtype), np.asarray(inputs)[:1]
        self.host_experts.cpu.compute(
            row, first, few, few.demand, lambda experts: [weights] * len(experts), WorkStats()
        )
        if self.host_experts.cpu.kernel is not None:
            return  # compiled by that
        local = jax.device_put(np.asarray(inputs), weights.arrays[0].sharding)
        for bucket, size in possible_groups(tokens, choices, self.model.config.num_experts):
            slots = np.full((size, bucket), chosen.size, np.int32)
            same = (weights.arrays,) * size
            jax.block_until_ready(grouped_rows(local, slots, same, choices, weights.layout.format.ffn))
