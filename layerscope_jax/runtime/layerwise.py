"""One step of an offloaded model: the sentence that deciding, book-keeping, moving and computing spell."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.grouping import GROUP_SIZES, Assignments
from layerscope_jax.models.layers import PAD_POSITION, KVCache
from layerscope_jax.offload.executors import HostExperts, SharedExperts, device_experts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.residency import Residency
from layerscope_jax.prediction.forecasts import Forecasts, counted_rows
from layerscope_jax.runtime.deciding import decide
from layerscope_jax.runtime.programs import Between, programs
from layerscope_jax.runtime.sampling import Sampling
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.scheduling.plan import (
    ExpertId,
    Geometry,
    LayerPlan,
    Observation,
    Phase,
    Policy,
)
from layerscope_jax.support.devices import finish_all
from layerscope_jax.support.errors import TransferError
from layerscope_jax.support.interrupts import check
from layerscope_jax.support.threads import Job

ARRIVALS = GROUP_SIZES[1]
"""Loaded experts that are computed together, so that dispatching does not hold up the link."""


class LayerByLayer:
    """Runs steps of a model whose experts live on the host, within a device budget.

    Args:
        model: the model.
        policy: decides; its state begins at `state`.
        residency, transfers, host_experts: the other rooms.
        forecasts: what is expected of the coming layers.

    Attributes:
        account: of the call that it counts for (`layerscope_jax.runtime.accounts`).
        record: is given every plan, if not None.
        decoded: takes the demand of each layer of each decode step, if not None.
        tap: is given each layer's number, the inputs [T, D] of its experts, the chosen experts [T, K] and
            their weights [T, K], if not None.
        table: with which dense products and attention go by our own loops (`Inside`); None where they are
            XLA's.
    """

    mode = "layers"

    def __init__(
        self,
        model: Model,
        policy: Policy,
        state: Any,
        residency: Residency,
        transfers: Transfers,
        host_experts: HostExperts,
        forecasts: Forecasts,
    ):
        self.model = model
        self.policy = policy
        self.state = state
        self.residency = residency
        self.transfers = transfers
        self.device_experts = device_experts(model.device, host_experts.cpu)
        self.host_experts = host_experts
        self.forecasts = forecasts
        self.meter = Meter()
        self.account: Any = None
        self.steps = 0
        self.record: Callable[[LayerPlan], None] | None = None
        self.decoded: list[dict[int, int]] | None = None
        self.tap: Callable[[int, jax.Array, np.ndarray, jax.Array], None] | None = None
        inside = host_experts.inside
        self.table = None if inside is None else jax.device_put(inside.table, model.device)
        self._no_weights: dict[int, jax.Array] = {}
        self._settled = True  # whether all threads are idle, and the books agree with the link
        self._planned_at: float | None = None  # when the layer before was planned, within a step
        self._last_ms = 0.0  # from the plan of the step's last layer to its end
        dense = model.dense
        self._layers = [dense["layers"][index] for index in range(model.config.num_layers)]
        self._ends = {key: value for key, value in dense.items() if key != "layers"}
        self._programs = programs(model.config, model.bank.dtype, forecasts.in_layer)
        self._attend_alone = programs(model.config, model.bank.dtype, None).attend_and_route
        self._wants_forecast = getattr(policy, "wants_forecast", lambda state: True)
        self._awaits_link = getattr(policy, "awaits_link", None)

    @property
    def geometry(self) -> Geometry:
        """What a policy knows of the model, with the slots that the budget leaves."""
        return self.model.geometry(self.residency.slots)

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[KVCache],
        sampling: Sampling | None,
    ) -> tuple[jax.Array, jax.Array, list[KVCache]]:
        """One forward pass: prefill (S > 1) or decode (S = 1).

        Args:
            tokens: [B, S] int32.
            positions: [B, S] int32; `PAD_POSITION` marks padding and finished requests, which route nowhere.
            last: [B] index in S of the token whose successor is wanted.
            caches: one a layer; donated. With fewer, a step goes through so many layers only, to be timed.
            sampling: how the next tokens are picked, None for greedy.

        Returns:
            tokens: [B] the next tokens.
            logits: [B, V] float32.
            caches: with the new keys and values.

        Raises:
            TransferError: if an expert that is needed on the device could not be copied there.
            ValueError: if the policy's plan is not one (see `check_plan`). What it raises passes through.
        """
        phase: Phase = "decode" if tokens.shape[1] == 1 else "prefill"
        active = (positions != PAD_POSITION).reshape(-1)
        counted = None
        if self.forecasts.in_layer is not None:
            counted = counted_rows(active, last, tokens.shape[1])
        caches = list(caches)
        if not self._settled:  # a copy did not end, or a second interrupt came
            self.settle()
        self._settled = False
        began = time.perf_counter()
        try:
            state, positions, counted = self._begin(tokens, positions, counted)
            for layer in range(len(caches)):
                check()
                state, caches[layer], began = self._layer(
                    layer, phase, state, positions, active, counted, caches[layer], began
                )
            found, logits = self._programs.finish(self._ends, state, positions, last, sampling, self.table)
            found.block_until_ready()  # the caller reads it next in any case
        except BaseException as error:
            self._planned_at, self._last_ms = None, 0.0
            with suppress(TransferError):  # then the next step tries again
                if (other := self.host_experts.rest()) not in (None, error):
                    error.add_note(f"meanwhile the host's experts failed: {other!r}")
                self.settle()
            raise
        self._settled = True
        self._last_ms, self._planned_at = self._elapsed_ms(), None
        self.meter.device_busy_s += time.perf_counter() - began
        self.steps += 1
        return found, logits, caches

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
        """One layer. `began` is when the device was given the work it is at; returns when it got its next."""
        if self._wants_forecast(self.state):
            part, forecast = self._programs.attend_and_route, (*self.forecasts.inputs(layer), counted)
        else:
            part, forecast = self._attend_alone, (None, None, None)
        hidden, inputs, experts, weights, cache, expected = part(
            self._layers[layer], state, positions, cache, *forecast, self.table
        )
        for array in (experts, expected, None if self.device_experts.waits else inputs):
            if array is not None:  # all on their way at once; the host's experts read the inputs
                array.copy_to_host_async()
        # The only read-back of the layer; `jax.device_get` does the same, but through trees.
        chosen, expected = np.asarray(experts), None if expected is None else np.asarray(expected)
        self.meter.device_busy_s += time.perf_counter() - began
        rows = Assignments(chosen, active)
        if self.tap is not None:
            self.tap(layer, inputs, chosen, weights)

        seen, plan = self._decide(layer, phase, rows, expected)
        outputs: Any = self.device_experts.take(rows.total, hidden.shape[-1], hidden.dtype)
        host: Job | None = None
        found: Any = None
        if plan.host:
            found = self.device_experts.host_rows(outputs)
            if plan.device and not self.device_experts.waits:
                host = self.host_experts.start(found, layer, inputs, rows, plan.host)

        began = time.perf_counter()
        resident = self.residency.resident
        missing = [e for e in plan.device if (layer, e) not in resident]
        here = [e for e in plan.device if e not in missing] if missing else list(plan.device)
        outputs, done = self._on_device(outputs, inputs, layer, rows, here)
        if found is not None and host is None:
            # The device has nothing to do, or is the same CPU: the thread that would only wait computes.
            self._await(done, began)
            self.host_experts.compute(found, layer, inputs, rows, plan.host)
            began = time.perf_counter()
            outputs = self.device_experts.place(outputs, found, rows, plan.host)
        while missing:
            self._await(done, began)
            # A few at a time: the last few wait for each other a little, the rest cost fewer dispatches.
            # Where copying takes the same cores, nothing was gained by computing beside it (`NOTES.md`).
            few = len(missing) if self.transfers.within else min(len(missing), ARRIVALS)
            self.transfers.wait([ExpertId(layer, e) for e in missing], few)
            began = time.perf_counter()
            self._absorb()
            here = [e for e in missing if (layer, e) in resident]
            missing = [e for e in missing if e not in here]
            outputs, done = self._on_device(outputs, inputs, layer, rows, here)
        self.forecasts.learn(seen, inputs, chosen, weights, active)
        if host is not None:
            self._await(done, began)
            host.result()
            began = time.perf_counter()
            outputs = self.device_experts.place(outputs, found, rows, plan.host)
        self.device_experts.give_back(outputs)
        return Between(hidden, outputs, weights), cache, began

    def _begin(self, tokens: Any, *others: Any) -> tuple[Any, ...]:
        """What comes into the first layer: embeddings, no experts' rows yet; and `others`, on the device."""
        hidden, *others = self._programs.embed(self._ends, tokens, *others)
        choices = self.model.config.experts_per_token
        total = tokens.size * choices
        outputs = self.device_experts.nothing(total, hidden.shape[-1], hidden.dtype)
        if total not in self._no_weights:
            zeros = jnp.zeros((tokens.size, choices), jnp.float32, device=self.transfers.sharding)
            self._no_weights = {total: zeros}
        return Between(hidden, outputs, self._no_weights[total]), *others

    def _decide(
        self, layer: int, phase: Phase, rows: Assignments, expected: np.ndarray | None
    ) -> tuple[Observation, LayerPlan]:
        """Asks the policy, checks its plan and carries out what it says of memory and the link."""
        residency = self.residency
        self._absorb()
        seen = Observation(
            step=self.steps,
            layer=layer,
            phase=phase,
            demand=rows.demand,
            resident=residency.resident,
            in_flight=residency.coming,
            forecast=self.forecasts.read(layer, expected, sum(rows.demand.values())),
            elapsed_ms=self._elapsed_ms(),
        )
        if self._awaits_link is not None and self._awaits_link(self.state, seen):
            self.transfers.rest()
            self._absorb()
        self.state, plan = decide(
            self.policy, self.state, seen, residency, self.model.bank, self.meter, self.record
        )
        if self.decoded is not None and phase == "decode":
            self.decoded.append(rows.demand)
        self.transfers.submit(residency.follow(plan, self.transfers.drop), plan.prefetch)
        return seen, plan

    def _elapsed_ms(self) -> float:
        """Since the last plan; between steps, from the last one to the end of its step."""
        now = time.perf_counter()
        elapsed = self._last_ms if self._planned_at is None else 1e3 * (now - self._planned_at)
        self._planned_at = now
        return elapsed

    def _absorb(self) -> None:
        """Enters what the link has brought, or lost, since the last time into the books."""
        arrived, lost = self.transfers.arrivals()
        for expert, weights in arrived.items():
            self.residency.arrive(expert, self.device_experts.keep(weights))
        for expert in lost:
            self.residency.release(expert)

    def _on_device(
        self, outputs: Any, inputs: jax.Array, layer: int, rows: Assignments, experts: list[int]
    ) -> tuple[Any, jax.Array | None]:
        if not experts:
            return outputs, None
        return self.device_experts.run(
            outputs, inputs, rows, experts, functools.partial(self.residency.use, layer)
        )

    def _await(self, done: jax.Array | None, began: float) -> None:
        """Before waiting for the host or the link: lets the device finish, to know how long it was busy."""
        if done is not None:
            jax.block_until_ready(done)
            self.meter.device_busy_s += time.perf_counter() - began

    def settle(self) -> None:
        """After a failure: all threads come to rest, and the books agree with the link.

        Raises:
            TransferError: if a copy does not end; its room stays reserved.
        """
        self.host_experts.rest()
        if self.device_experts.waits:
            finish_all(self.transfers.sharding)  # they may be at our own loops, in memory that we hold
        self.device_experts.clear()
        self.transfers.cancel()
        self._absorb()
        for expert in list(self.residency.coming):
            self.residency.release(expert)
        self._settled = True

    def preload(self) -> None:
        """Puts every expert on the device, ahead of all work and past the link's pace.

        Where device and host are one, they stay where they are.
        """
        for expert in self.model.bank:
            self.residency.reserve(expert, prefetched=False)
            if isinstance(self.device_experts, SharedExperts):
                self.residency.arrive(expert, self.host_experts.weights(expert))
            else:
                copied = jax.device_put(self.model.bank[expert], self.transfers.sharding)
                self.residency.arrive(expert, jax.block_until_ready(copied))
