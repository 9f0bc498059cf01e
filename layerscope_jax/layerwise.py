"""One step of an offloaded model: the sentence that deciding, book-keeping, moving and computing spell."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layerscope_jax.checkpoints import Model
from layerscope_jax.config import ModelConfig
from layerscope_jax.experts.compute import combine
from layerscope_jax.experts.cpu import WorkStats
from layerscope_jax.experts.executors import DeviceExperts, HostExperts, place_rows
from layerscope_jax.experts.grouping import GROUP_SIZES, Assignments
from layerscope_jax.experts.residency import Residency
from layerscope_jax.experts.transfers import LinkStats, TransferError, Transfers
from layerscope_jax.forecasts import Forecasts, counted_rows, expected_tokens
from layerscope_jax.models.decoder import Decoder, DecoderLayer
from layerscope_jax.models.layers import PAD_POSITION, KVCache
from layerscope_jax.prediction import Predictor
from layerscope_jax.sampling import Sampling, sample
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan, Observation, Phase, Policy, check_plan
from layerscope_jax.statistics import Meter

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
        record: is given every plan, if not None.
        decoded: takes the demand of each layer of each decode step, if not None.
        tap: is given each layer's number, the inputs [T, D] of its experts, the chosen experts [T, K] and
            their weights [T, K], if not None.
    """

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
        on_cpu = model.device.platform == "cpu"
        self.device_experts = DeviceExperts(host_experts.cpu if on_cpu else None)
        self.host_experts = host_experts
        self.forecasts = forecasts
        self.meter = Meter()
        self.steps = 0
        self.record: Callable[[LayerPlan], None] | None = None
        self.decoded: list[dict[int, int]] | None = None
        self.tap: Callable[[int, jax.Array, np.ndarray, jax.Array], None] | None = None
        self._outputs: dict[int, jax.Array] = {}
        self._settled = True  # whether the books agree with the link
        self._planned_at: float | None = None  # when the layer before was planned, within a step
        self._last_ms = 0.0  # from the plan of the step's last layer to its end
        dense = model.dense
        self._layers = [dense["layers"][index] for index in range(model.config.num_layers)]
        self._ends = {key: value for key, value in dense.items() if key != "layers"}
        self._embed, self._attend_and_route, self._add_experts, self._finish = programs(
            model.config, model.bank.dtype, forecasts.in_layer
        )
        _, self._attend_alone, _, _ = programs(model.config, model.bank.dtype, None)
        self._wants_forecast = getattr(policy, "wants_forecast", lambda state: True)

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
            caches: one a layer; donated.
            sampling: how the next tokens are picked, None for greedy.

        Returns:
            tokens: [B] the next tokens.
            logits: [B, V] float32.
            caches: with the new keys and values.

        Raises:
            TransferError: if an expert that is needed on the device could not be copied there.
            ValueError: if the policy's plan is not one (see `check_plan`).
        """
        phase: Phase = "decode" if tokens.shape[1] == 1 else "prefill"
        active = (positions != PAD_POSITION).reshape(-1)
        counted = None
        if self.forecasts.in_layer is not None:
            counted = counted_rows(active, last, tokens.shape[1])
        caches = list(caches)
        tokens, positions, last, counted = jax.device_put(
            (tokens, positions, last, counted), self.transfers.sharding
        )
        if not self._settled:  # a copy did not end, or a second interrupt came
            self.settle()
        self._settled = False
        began = time.perf_counter()
        try:
            hidden = self._embed(self._ends, tokens)
            for layer in range(len(self._layers)):
                hidden, caches[layer], began = self._layer(
                    layer, phase, hidden, positions, active, counted, caches[layer], began
                )
            found, logits = self._finish(self._ends, hidden, positions, last, sampling)
        except BaseException:
            self._planned_at, self._last_ms = None, 0.0
            with suppress(TransferError):  # then the next step tries again
                self.settle()
            raise
        self._settled = True
        found.block_until_ready()  # the caller reads it next in any case
        self._last_ms, self._planned_at = self._elapsed_ms(), None
        self.meter.device_busy_s += time.perf_counter() - began
        self.steps += 1
        return found, logits, caches

    def _layer(
        self,
        layer: int,
        phase: Phase,
        hidden: jax.Array,
        positions: np.ndarray,
        active: np.ndarray,
        counted: jax.Array | None,
        cache: KVCache,
        began: float,
    ) -> tuple[jax.Array, KVCache, float]:
        """One layer. `began` is when the device was given the work it is at; returns when it got its next."""
        if self._wants_forecast(self.state):
            part, forecast = self._attend_and_route, (*self.forecasts.inputs(layer), counted)
        else:
            part, forecast = self._attend_alone, (None, None, None)
        hidden, inputs, experts, weights, cache, expected = part(
            self._layers[layer], hidden, positions, cache, *forecast
        )
        chosen, expected = jax.device_get((experts, expected))  # the only read-back of the layer
        self.meter.device_busy_s += time.perf_counter() - began
        rows = Assignments(chosen, active)
        if self.tap is not None:
            self.tap(layer, inputs, chosen, weights)

        seen, plan = self._decide(layer, phase, rows, expected)
        host = None
        if plan.host and plan.device:
            host = self.host_experts.start(layer, inputs, rows, plan.host)

        began = time.perf_counter()
        outputs = self._take_outputs(chosen.size, hidden)
        resident = self.residency.resident
        missing = [e for e in plan.device if ExpertId(layer, e) not in resident]
        here = [e for e in plan.device if e not in missing]
        outputs, done = self._on_device(outputs, inputs, layer, rows, here)
        while missing:
            self._await(done, began)
            # A few at a time: the last few wait for each other a little, the rest cost fewer dispatches.
            self.transfers.wait([ExpertId(layer, e) for e in missing], min(len(missing), ARRIVALS))
            began = time.perf_counter()
            self._absorb()
            here = [e for e in missing if ExpertId(layer, e) in resident]
            missing = [e for e in missing if e not in here]
            outputs, done = self._on_device(outputs, inputs, layer, rows, here)
        self.forecasts.learn(seen, inputs, chosen, weights, active)
        if plan.host:
            self._await(done, began)
            if host is None:
                slots, values = self.host_experts.compute(layer, inputs, rows, plan.host)
            else:
                slots, values = host.result()
            began = time.perf_counter()
            outputs = place_rows(outputs, slots, values)
        hidden = self._add_experts(hidden, outputs, weights)
        self._outputs[chosen.size] = outputs
        return hidden, cache, began

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
        state, plan = self.policy.plan(self.state, seen)
        check_plan(plan, seen, residency.slots, self.model.bank)
        self.state = state
        if self.decoded is not None and phase == "decode":
            self.decoded.append(rows.demand)
        self.meter.count(seen, residency.idle_prefetches)
        if self.record is not None:
            self.record(plan)
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
            self.residency.arrive(expert, weights)
        for expert in lost:
            self.residency.release(expert)

    def _on_device(
        self, outputs: jax.Array, inputs: jax.Array, layer: int, rows: Assignments, experts: list[int]
    ) -> tuple[jax.Array, jax.Array | np.ndarray | None]:
        return self.device_experts.run(
            outputs,
            inputs,
            rows,
            experts,
            lambda expert: self.residency.use(ExpertId(layer, expert)),
        )

    def _await(self, done: jax.Array | np.ndarray | None, began: float) -> None:
        """Before waiting for the host or the link: lets the device finish, to know how long it was busy."""
        if done is not None:
            jax.block_until_ready(done)
            self.meter.device_busy_s += time.perf_counter() - began

    def _take_outputs(self, assignments: int, hidden: jax.Array) -> jax.Array:
        """The rows of the layer before, to be overwritten; rows of inactive tokens keep old values."""
        found = self._outputs.pop(assignments, None)
        if found is None:
            found = jnp.zeros((assignments + 1, hidden.shape[-1]), hidden.dtype)
        return found

    def settle(self) -> None:
        """After a failure: stops the link and lets the books agree with it.

        Raises:
            TransferError: if a copy does not end; its room stays reserved.
        """
        self._outputs.clear()
        self.transfers.cancel()
        self._absorb()
        for expert in list(self.residency.coming):
            self.residency.release(expert)
        self._settled = True

    def preload(self) -> None:
        """Puts every expert on the device, ahead of all work and past the link's pace."""
        for expert in self.model.bank:
            self.residency.reserve(expert, prefetched=False)
            copied = jax.device_put(self.model.bank[expert], self.transfers.sharding)
            self.residency.arrive(expert, jax.block_until_ready(copied))

    def reset(self) -> None:
        """Begins the statistics anew; what is resident stays."""
        self.meter = Meter()
        self.transfers.stats = LinkStats()
        self.device_experts.stats = WorkStats()
        self.host_experts.stats = WorkStats()
        self.residency.reset()


@functools.lru_cache(maxsize=16)
def programs(config: ModelConfig, dtype: np.dtype, predictor: Predictor | None) -> tuple[Callable, ...]:
    """The jitted parts of a step: embed, attend, route and forecast, add the experts, finish.

    Every layer shares them, and so do all engines of models of one shape: another policy or budget compiles
    nothing anew.
    """
    abstract = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0), dtype=dtype))
    layer_graph, _ = nnx.split(abstract)
    hollow = nnx.eval_shape(lambda: Decoder(replace(config, num_layers=0), rngs=nnx.Rngs(0), dtype=dtype))
    ends_graph, ends_state = nnx.split(hollow)
    empty: dict[str, Any] = {key: {} for key in ("layers", "experts") if key in nnx.to_pure_dict(ends_state)}

    @jax.jit
    def embed(ends, tokens):
        return nnx.merge(ends_graph, ends | empty).embed(tokens)

    @functools.partial(jax.jit, donate_argnames="cache")
    def attend_and_route(layer, hidden, positions, cache, forecast_params, number, counted):
        hidden, inputs, routing, cache = nnx.merge(layer_graph, layer).attend_and_route(
            hidden, positions, cache
        )
        expected = None
        if predictor is not None:
            with jax.named_scope("forecast"):
                # Behind a barrier nothing of it is fused with the layer, whose bits must not change by it.
                known = jax.lax.optimization_barrier((inputs, routing.experts, routing.weights))
                probabilities = predictor.predict(forecast_params, *known)
                expected = expected_tokens(probabilities, counted, number, config.num_layers)
        return hidden, inputs, routing.experts, routing.weights, cache, expected

    @jax.jit
    def add_experts(hidden, outputs, weights):
        tokens, choices = weights.shape
        parts = outputs[:-1].reshape(tokens, choices, -1)
        return combine(hidden.reshape(tokens, -1), parts, weights).reshape(hidden.shape)

    @jax.jit
    def finish(ends, hidden, positions, last, sampling):
        rows = jnp.arange(hidden.shape[0])
        logits = nnx.merge(ends_graph, ends | empty).logits(hidden[rows, last])
        return sample(logits, positions[rows, last] + 1, sampling), logits

    return embed, attend_and_route, add_experts, finish
