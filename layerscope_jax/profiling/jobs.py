"""Jobs: single parts of an engine's work, which are timed or keep a part of the machine busy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.cpu import CpuExperts
from layerscope_jax.kernels.grouping import GROUP_SIZES, Assignments
from layerscope_jax.models.cache import new_caches
from layerscope_jax.offload.executors import SharedExperts, device_experts
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import LinkStats, Transfers
from layerscope_jax.offload.residency import Residency
from layerscope_jax.offload.staged import StagedHost
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.prediction.predictors import Predictor
from layerscope_jax.runtime.computing import ARRIVALS
from layerscope_jax.runtime.device_tier import DeviceTier
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.scheduling.baselines import HostOnly
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan
from layerscope_jax.support.errors import TransferError

Job = Callable[[int], float | None]
"""`job(round)` does its work once; each round uses another layer. It may return the time (s) that counts, if
not all of its time does."""

LAYERS = 16
"""Layers that rounds take in turn, so that a round's weights are not in a near cache, as in an engine. The
host's experts change every time around for the same reason."""

IN_A_ROW = 2
"""MoE layers of a timed step: few, because their experts are computed too."""


class Jobs:
    """Makes jobs of a model on this machine.

    Experts are computed as in a layer, several in a call, and copied several in a row. Resident experts and
    those on the link fit into `slots` together. With fewer than two slots, device and link jobs cannot run at
    the same time.

    Args:
        model: the model.
        host: the host executor.
        transfers: the link, idle.
        slots: number of experts that the budget holds; if it is 0, one expert at a time is on the device.
        neighbours: devices that share the model's experts with its own, each with a link of its own.

    Attributes:
        computed: number of experts of a host job.
        resident: number of experts of a device job.
        arriving: maximum number of experts of a link job.
        roomy: whether device and link jobs may run at the same time.
    """

    def __init__(
        self,
        model: Model,
        host: HostExperts,
        transfers: Transfers,
        slots: int,
        neighbours: Sequence[jax.Device] = (),
    ):
        self.model, self._neighbours = model, neighbours
        self._host, self._transfers = host, transfers
        # If the device is this machine's CPU, it gets threads of its own, and so do experts that arrive over
        # the link, because these jobs may run beside each other and those of the host, and `CpuExperts` takes
        # one caller at a time.
        self._cpu, self._for_arrivals = (
            CpuExperts(host.cpu.threads, host.cpu.kernel, host.cpu.format) for _ in range(2)
        )
        self._device = device_experts(model.device, self._cpu)
        self.computed = min(GROUP_SIZES[0], model.bank.num_experts)
        self.resident = min(self.computed, max(1, slots // 2, slots - ARRIVALS))
        self.arriving = min(self.computed, max(1, slots - self.resident))
        self.roomy = slots >= 2
        self._turns = min(LAYERS, model.config.num_moe_layers)
        room = slots - self.arriving if self.roomy else 1
        self._held = max(1, min(self._turns, room // self.resident))  # layers with experts on the device
        self._weights: list[list[Any]] = []
        self._device.spread = self.resident  # an engine's tiles, where all experts have as many tokens

    def neighbours(self) -> list[Job]:
        """Jobs that each copy an expert to one of the other devices, whose links may share a root complex."""
        experts = self.model.bank.num_experts

        def copying(device: jax.Device) -> Job:
            sharding = jax.sharding.SingleDeviceSharding(device)

            def job(round: int) -> None:
                expert = ExpertId(round % self._turns, round // self._turns % experts)
                jax.block_until_ready(jax.device_put(self.model.bank[expert], sharding))

            return job

        return [copying(device) for device in self._neighbours]

    def host(self, tokens: int) -> Job:
        """Computes `computed` experts on the host, `tokens` tokens each."""
        firsts = range(0, self.model.bank.num_experts - self.computed + 1, self.computed)
        routed = [self._routed(self.computed, tokens, first) for first in firsts]
        host_rows = self._device.host_rows(self._outputs(*routed[0]))

        def job(round: int) -> float | None:
            inputs, rows = routed[round // self._turns % len(routed)]
            layer, experts = round % self._turns, list(rows.demand)
            return self._read(
                layer, experts, lambda: self._on_host(host_rows, layer, inputs, rows, experts), "host"
            )

        return job

    def host_start(self) -> Job:
        """Hands the host one expert with one token, and places its row into a layer's outputs."""
        inputs, rows = self._routed(1, 1)
        outputs = self._outputs(inputs, rows)

        def job(round: int) -> None:
            nonlocal outputs
            host_rows = self._device.host_rows(outputs)
            self._on_host(host_rows, round % self._turns, inputs, rows, [0])
            outputs = jax.block_until_ready(self._device.place(outputs, host_rows, rows, [0]))

        return job

    def device(self, tokens: int) -> Job:
        """Computes `resident` experts on the device, `tokens` tokens each."""
        inputs, rows = self._routed(self.resident, tokens)
        outputs = self._outputs(inputs, rows)

        def job(round: int) -> None:
            nonlocal outputs
            resident = range(self.resident)
            if not self._weights:
                self._device.reserve(self.model.bank, self._held * self.resident)
            for layer in range(len(self._weights), self._held):
                self._weights.append([self._kept(ExpertId(layer, expert)) for expert in resident])
            weights = self._weights[round % self._held]
            outputs, done = self._device.run(
                outputs, inputs, rows, resident, lambda some: [weights[expert] for expert in some]
            )
            jax.block_until_ready((outputs, done))

        return job

    def link(self, experts: int, at_once: int | None = None) -> Job:
        """Copies experts to the device through an engine's books, and evicts them.

        Args:
            experts: how many, at most `arriving`.
            at_once: arrivals that are waited for together, as of prefetches, which nobody uses yet. None for
                loads: as few as in an engine; and where the device is this CPU each is computed for a token,
                because that takes time of the thread that also wakes the link.
        """
        waited = at_once or (experts if self._transfers.within else ARRIVALS)
        held = Residency(experts * self.model.bank.expert_bytes, self.model.bank.expert_bytes)
        tier = DeviceTier(held, self._transfers, lambda weights, _: self._device.keep(weights))
        used = SharedExperts(self._for_arrivals) if at_once is None and self._device.waits else None
        inputs, rows = self._routed(experts, 1)
        outputs: Any = None if used is None else used.take(rows.total, inputs.shape[1], inputs.dtype)

        def copy(layer: int) -> None:
            numbers = tuple(range(experts))
            loads = tuple(ExpertId(layer, number) for number in numbers)
            tier.follow(LayerPlan(step=0, layer=layer, device=numbers, load=loads))
            while missing := tier.missing(layer, numbers):
                tier.fetch(layer, missing, min(waited, len(missing)))
                if used is not None:
                    ready = sorted({*missing}.difference(tier.missing(layer, missing)))
                    used.run(outputs, inputs, rows, ready, functools.partial(held.use, layer))
            tier.lose()

        def job(round: int) -> float | None:
            if not self.roomy:
                self.clear()
            layer = round % self._turns
            return self._read(layer, range(experts), lambda: copy(layer), "link")

        return job

    def layer(self, rows: int, length: int, context: int, predictor: Predictor | None = None) -> Job:
        """Runs a layer without its experts, as in an engine that computes them on the host.

        This covers dispatch, attention and router, read-back, grouping, planning, residency, and the layer's
        share of embeddings and logits. Time in which experts are computed does not count.

        Args:
            rows: B, requests.
            length: S, tokens of each: 1 in decode, more in prefill.
            context: P, cache length of each request; decode is at its last position.
            predictor: computes its forecast in the layer; None for no forecast.
        """
        model, config = self.model, self.model.config
        slots = Residency(0, model.bank.expert_bytes)
        link: Any = NoCopies(self._transfers.sharding)
        forecasts = Forecasts(predictor, model, model.geometry(0))
        runner = LayerByLayer(model, HostOnly(), None, slots, link, self._host, forecasts)
        random = np.random.default_rng(0)
        tokens = random.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
        places = np.arange(length, dtype=np.int32) if length > 1 else np.array([context - 1], np.int32)
        positions, last = np.tile(places, (rows, 1)), np.full(rows, length - 1, np.int32)
        # Includes the dense layers before the last of these MoE layers.
        layers = config.spans[min(IN_A_ROW, config.num_moe_layers) - 1].stop
        caches = new_caches(config, rows, context, model.bank.dtype, model.device, layers)

        def seconds(layers: int) -> float:
            """Returns the time (s) of a step of this many layers, without its experts."""
            nonlocal caches
            began, apart = time.perf_counter(), self._host.stats.arithmetic_s + self._waited_s("host")
            *_, caches[:layers] = runner.step(tokens, positions, last, caches[:layers], None)
            apart = self._host.stats.arithmetic_s + self._waited_s("host") - apart
            return max(0.0, time.perf_counter() - began - apart)

        def job(round: int) -> float:
            ends = seconds(0)
            each = max(0.0, seconds(len(caches)) - ends) / len(caches)
            return (config.num_layers * each + ends) / config.num_moe_layers

        return job

    def _read(
        self, layer: int, experts: Iterable[int], work: Callable[[], None], part: Literal["host", "link"]
    ) -> float | None:
        """Does a part's work on experts; reads those on the disk first, returns the time (s) after that."""
        if not isinstance(self._host, StagedHost):
            work()
            return None
        pool, left = self._host.pool, [ExpertId(layer, expert) for expert in experts]
        holder = f"timed {part}"
        pool.hold(holder, left, urgent=True)
        while left:
            ready = pool.wait(left)
            pool.let_go(holder, ready)  # kept for long enough, unless the pool is very small
            left = [expert for expert in left if expert not in ready]
        began, waited = time.perf_counter(), self._waited_s(part)
        work()
        return time.perf_counter() - began - (self._waited_s(part) - waited)

    def _waited_s(self, part: Literal["host", "link"]) -> float:
        """Time (s) in which a part has waited for the disk so far; others may do so meanwhile."""
        if not isinstance(self._host, StagedHost):
            return 0.0
        stats = self._host.pool.stats
        return stats.host_wait_s if part == "host" else stats.link_wait_s

    def _on_host(
        self, host_rows: Any, layer: int, inputs: jax.Array, rows: Assignments, experts: Sequence[int]
    ) -> None:
        """Computes as an engine does: on another thread beside an accelerator, otherwise on the caller's."""
        if self._device.waits:
            self._host.compute(host_rows, layer, inputs, rows, experts)
        else:
            self._host.start(host_rows, layer, inputs, rows, experts).result()

    def clear(self) -> None:
        """Removes the resident experts from the device."""
        if self._weights:
            self._weights = []
            self._device.reserve(self.model.bank, 0)

    def _kept(self, expert: ExpertId) -> Any:
        """Copies an expert to the device, and keeps it there as an engine does."""
        copied = jax.device_put(self.model.bank[expert], self._transfers.sharding)
        return self._device.keep(jax.block_until_ready(copied), expert)

    def close(self) -> None:
        """Ends the threads and removes the resident experts from the device."""
        self.clear()
        self._cpu.close()
        self._for_arrivals.close()

    def _outputs(self, inputs: jax.Array, rows: Assignments) -> Any:
        """Returns an output array [T * K + 1, D] for this job only, because two jobs may run at once."""
        own = device_experts(self.model.device, self._cpu)
        return own.take(rows.total, inputs.shape[1], inputs.dtype)

    def _routed(self, experts: int, tokens: int, first: int = 0) -> tuple[jax.Array, Assignments]:
        """Returns inputs [T, D] and assignments that give each expert from `first` on `tokens` tokens."""
        chosen = np.repeat(np.arange(first, first + experts, dtype=np.int32), tokens)
        inputs = jnp.ones((len(chosen), self.model.config.hidden_size), self.model.bank.dtype)
        return jax.device_put(inputs, self._transfers.sharding), Assignments(chosen[:, None])


class NoCopies:
    """Stands in for the link of an engine that copies nothing, while another job uses the real link."""

    within = True
    most_staged: int | None = None

    def __init__(self, sharding: jax.sharding.Sharding):
        self.sharding = sharding
        self.stats = LinkStats()

    def submit(self, load: Iterable[ExpertId], prefetch: Iterable[ExpertId]) -> None:
        asked = [*load, *prefetch]
        if asked:
            raise RuntimeError(f"nothing is to be copied here, but {asked} were asked for")

    def drop(self, stale: Callable[[ExpertId], bool]) -> list[ExpertId]:
        return []

    def arrivals(self) -> tuple[dict[ExpertId, Any], list[ExpertId]]:
        return {}, []

    def wait(self, experts: Collection[ExpertId], count: int = 1) -> None:
        raise TransferError(f"this engine copies nothing, but waits for {sorted(experts)}")

    def rest(self) -> None:
        pass

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass
