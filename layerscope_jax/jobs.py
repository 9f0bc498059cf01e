"""Pieces of what an engine does, each alone: to be timed, or to keep a part of the machine busy meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints import Model
from layerscope_jax.experts.executors import HostExperts, device_experts
from layerscope_jax.experts.grouping import GROUP_SIZES, Assignments
from layerscope_jax.experts.transfers import Transfers
from layerscope_jax.layerwise import ARRIVALS, Between, programs
from layerscope_jax.models.layers import KVCache
from layerscope_jax.scheduling.plan import ExpertId

Job = Callable[[int], None]
"""`job(round)` does its work once and returns when it is done; a round turns to another layer."""

LAYERS = 5
"""Layers that rounds take in turn: the weights of a round are not those of the one before."""


class Jobs:
    """Makes jobs of a model on its machine.

    Experts are computed as a layer computes them, several in a call, and copied several in a row. Those
    resident and those on the link fit into `slots` together; if that is less than two, one or the other is on
    the device, and no job of the one may run beside a job of the other.

    Args:
        model: whose experts and layers.
        host: the host executor.
        transfers: the link, idle; used as it is, with its pace and its thread.
        slots: experts that the budget has room for. If none, one expert at a time is on the device all the
            same.

    Attributes:
        computed: experts of a host job.
        resident: experts of a device job.
        arriving: most experts of a link job.
        roomy: whether device and link jobs may run at the same time.
    """

    def __init__(self, model: Model, host: HostExperts, transfers: Transfers, slots: int):
        self.model = model
        self._host, self._transfers = host, transfers
        self._device = device_experts(model.device, host.cpu)
        self.computed = min(GROUP_SIZES[0], model.bank.num_experts)
        self.resident = min(self.computed, max(1, slots // 2, slots - ARRIVALS))
        self.arriving = min(self.computed, max(1, slots - self.resident))
        self.roomy = slots >= 2
        self._turns = min(LAYERS, model.config.num_layers)
        self._weights: list[Any] = []

    def host(self, tokens: int) -> Job:
        """Computes `computed` experts on the host, `tokens` tokens each."""
        inputs, rows = self._routed(self.computed, tokens)
        found = self._device.host_rows(self._outputs(inputs, rows))

        def job(round: int) -> None:
            turn, experts = round % self._turns, range(self.computed)
            self._host.start(found, turn, inputs, rows, experts).result()

        return job

    def host_start(self) -> Job:
        """Gives the host one expert with one token, and takes its row over into a layer's outputs."""
        inputs, rows = self._routed(1, 1)
        outputs = self._outputs(inputs, rows)

        def job(round: int) -> None:
            nonlocal outputs
            found = self._device.host_rows(outputs)
            self._host.start(found, round % self._turns, inputs, rows, [0]).result()
            outputs = jax.block_until_ready(self._device.place(outputs, found, rows, [0]))

        return job

    def device(self, tokens: int) -> Job:
        """Computes `resident` experts on the device, `tokens` tokens each."""
        inputs, rows = self._routed(self.resident, tokens)
        outputs = self._outputs(inputs, rows)

        def job(round: int) -> None:
            nonlocal outputs
            if not self._weights:
                bank = self.model.bank
                experts = [bank[ExpertId(0, expert)] for expert in range(self.resident)]
                copied = jax.block_until_ready(jax.device_put(experts, self._transfers.sharding))
                self._weights = [self._device.keep(expert) for expert in copied]
            resident = range(self.resident)
            outputs, done = self._device.run(outputs, inputs, rows, resident, self._weights.__getitem__)
            jax.block_until_ready((outputs, done))

        return job

    def link(self, experts: int) -> Job:
        """Copies experts to the device, no more than `arriving`, where they do not stay."""

        def job(round: int) -> None:
            if not self.roomy:
                self._weights = []
            wanted = {ExpertId(round % self._turns, expert) for expert in range(experts)}
            self._transfers.submit(wanted, [])
            while wanted:
                self._transfers.wait(wanted)
                wanted -= self._transfers.arrivals()[0].keys()

        return job

    def layer(self, rows: int, length: int, context: int) -> Job:
        """Everything of a layer but its experts: the sum of the last ones, attention, router, read-back.

        Args:
            rows: B, requests.
            length: S, tokens of each: 1 in decode, more in prefill.
            context: P, positions that each has room for in its cache; decode is at the last of them.
        """
        config, sharding = self.model.config, self._transfers.sharding
        dtype = self.model.bank.dtype
        attend_and_route = programs(config, dtype, None).attend_and_route
        layers = self.model.dense["layers"]

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros(shape, dtype, device=sharding)

        hidden = jax.device_put(jnp.ones((rows, length, config.hidden_size), dtype), sharding)
        places = np.arange(length) if length > 1 else np.array([context - 1])
        positions = jax.device_put(np.tile(places.astype(np.int32), (rows, 1)), sharding)
        tokens, choices = rows * length, config.experts_per_token
        outputs = self._device.nothing(tokens * choices, config.hidden_size, dtype)
        state = Between(hidden, outputs, jnp.zeros((tokens, choices), jnp.float32, device=sharding))
        shape = (rows, config.num_kv_heads, context, config.head_dim)
        cache = KVCache(zeros(*shape), zeros(*shape))

        def job(round: int) -> None:
            nonlocal cache
            attended, _, experts, _, cache, _ = attend_and_route(
                layers[round % self._turns], state, positions, cache, None, None, None
            )
            Assignments(jax.device_get(experts))
            attended.block_until_ready()

        return job

    def clear(self) -> None:
        """Takes the resident experts off the device."""
        self._weights = []

    def _outputs(self, inputs: jax.Array, rows: Assignments) -> Any:
        """[T * K + 1, D] to write rows to, no other job's: two may run at once."""
        own = device_experts(self.model.device, self._host.cpu)
        return own.take(rows.total, inputs.shape[1], inputs.dtype)

    def _routed(self, experts: int, tokens: int) -> tuple[jax.Array, Assignments]:
        """Inputs [T, D] of which each expert has `tokens`."""
        chosen = np.repeat(np.arange(experts, dtype=np.int32), tokens)
        inputs = jnp.ones((len(chosen), self.model.config.hidden_size), self.model.bank.dtype)
        return jax.device_put(inputs, self._transfers.sharding), Assignments(chosen[:, None])
