"""The expert cache inside the step: a decode step is one program, which copies what is missing by itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.dense import our_loops
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder import through
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.models.router import Routing
from layerscope_jax.offload.executors import product_of
from layerscope_jax.offload.fills import Fill, addresses_of
from layerscope_jax.offload.slot_experts import empty_pool, rows_of_slots
from layerscope_jax.offload.slots import Books, make_room
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.programs import Layers, add_rows, before_layers, dense_parts
from layerscope_jax.runtime.runner import Stepped
from layerscope_jax.runtime.sampling import Sampling, sample
from layerscope_jax.runtime.warmup import Rehearsal
from layerscope_jax.support.interrupts import check


class Cache(NamedTuple):
    """Experts on the device and the books of their slots, which each step replaces."""

    pools: tuple[Any, ...]  # of each MoE layer, an expert's arrays with a leading axis S
    books: Books

    @classmethod
    def empty(cls, model: Model, slots: int) -> Cache:
        """Returns a cache in which nothing is resident."""
        config, device = model.config, model.device
        pools = tuple(empty_pool(model.bank, slots, device) for _ in range(config.num_moe_layers))
        return cls(pools, Books.empty(config.num_moe_layers, config.num_experts, slots, device))


class Counts(NamedTuple):
    """What a step needed and found, summed over its layers; a row of int32 on the device."""

    experts: int
    expert_hits: int
    tokens: int
    token_hits: int
    resident: int


class StepRehearsal(Rehearsal):
    """`Rehearsal` for prefills; a decode step is run with padding alone, which needs no expert."""

    runner: InStepCache

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        if tokens.shape[1] > 1:
            return super().step(tokens, positions, last, caches, sampling)
        self.runner.settle_if_needed()
        padding = np.full_like(positions, PAD_POSITION)
        with self.runner.settled_after():
            stepped, _ = self.runner.decode(tokens, padding, last, caches, sampling)
            stepped[0].block_until_ready()
        return stepped


class InStepCache(LayerByLayer):
    """Runs decode steps as one jitted function with a cache of experts; prefills as `LayerByLayer` does.

    The device's memory is divided: room for one layer's experts, through which prefills stream, and slots
    for each layer, which the step fills.

    Args:
        slots: S, the slots of each MoE layer.
        fill: copies experts into them.
        *others: those of `LayerByLayer`, whose residency has the other room.
    """

    mode = "in-step"
    rehearsed_by = StepRehearsal

    @staticmethod
    def is_faster_on(device: jax.Device) -> bool:
        """Whether this is faster than layer by layer on a device; false for CPUs.

        There Python's part is small, copies into slots gain nothing, and this package's kernels compute
        experts where they lie; XLA's products in this step would round otherwise than they do.
        """
        return device.platform != "cpu"

    def __init__(self, slots: int, fill: Fill, model: Model, *others: Any, exact: bool = False):
        super().__init__(model, *others, exact=exact)
        self.slots = slots
        self._layers = Layers.of(model, range(model.config.num_layers))
        # The bank owns the memory that these addresses lead to, and outlives the runner.
        self._tables = [jax.device_put(addresses_of(layer), model.device) for layer in model.bank.layers]
        self.cache: Cache | None = None
        self.reserve(True)
        self._steps = 0
        bank = model.bank
        _, product = product_of(bank.format, bank.sizes, bank.dtype, model.device)
        self._decode = decode_program(model.config, bank.dtype, product, fill)

    def reserve(self, slots: bool) -> None:
        """Allocates the slots, all of them empty, or lets go of them."""
        self._wanted, self.cache, self._resident = slots, None, 0  # before their successors take as much
        self.residency.beside_bytes = self.slot_bytes if slots else 0
        if slots:
            self.cache = Cache.empty(self.model, self.slots)

    @property
    def resident_experts(self) -> int:
        return super().resident_experts + self._resident

    @property
    def slot_bytes(self) -> int:
        """Device memory (bytes) of all slots."""
        return self.slots * self.model.config.num_moe_layers * self.model.bank.expert_bytes

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        check()
        if not self.is_whole_decode(tokens, caches):
            return super().step(tokens, positions, last, caches, sampling)
        with self.settled_after():
            began = time.perf_counter()
            stepped, counts = self.decode(tokens, positions, last, caches, sampling)
            read = Counts(*np.asarray(counts).tolist())
        now = time.perf_counter()
        self._resident = read.resident
        self._count(read, began, now, tokens.shape[1])
        return stepped

    def _count(self, read: Counts, began: float, now: float, length: int) -> None:
        account, meter = self.account, self.account.meter
        meter.device_busy_s += now - began
        meter.layers += self.model.config.num_moe_layers
        meter.experts, meter.expert_hits = meter.experts + read.experts, meter.expert_hits + read.expert_hits
        meter.tokens, meter.token_hits = meter.tokens + read.tokens, meter.token_hits + read.token_hits
        account.link.demand_bytes += (read.experts - read.expert_hits) * self.model.bank.expert_bytes
        if account.timeline is not None:
            account.timeline.whole_step(account.steps, length, began, now)
        account.steps += 1

    def decode(
        self, tokens: np.ndarray, positions: np.ndarray, last: np.ndarray, caches: list[Any], sampling: Any
    ) -> tuple[Stepped, jax.Array]:
        """Runs a decode step without counting it; the second result is a row of `Counts`."""
        cache, self.cache = self.cache, None  # its arrays are donated
        if cache is None:
            raise ValueError("the runner was closed with its engine; make a new Engine")
        next_tokens, logits, caches, self.cache, counts = self._decode(
            self._layers,
            self.dense.ends,
            self.dense.table,
            self._tables,
            cache,
            np.int32(self._steps),
            tokens,
            positions,
            last,
            list(caches),
            sampling,
        )
        self._steps += 1
        return (next_tokens, logits, caches), counts

    def settle(self) -> None:
        """Settles as `LayerByLayer`; slots that a failed step has lost are empty afterwards."""
        super().settle()
        if self.cache is not None:
            with suppress(Exception):  # the step has said what failed
                jax.block_until_ready(self.cache)
                return
        self.reserve(self._wanted)

    def close(self) -> None:
        super().close()
        self.reserve(False)


@functools.lru_cache(maxsize=16)
def decode_program(config: ModelConfig, dtype: np.dtype, product: Callable, fill: Fill) -> Callable:
    """Returns the jitted step, shared by models of one shape; see `rows_of_slots` on `product`."""
    layers_of, ends_of = dense_parts(config, dtype)

    @functools.partial(jax.jit, donate_argnames=("cache", "caches"))
    def run(
        layers: Layers,
        ends: Any,
        table: jax.Array | None,
        tables: list[jax.Array],
        cache: Cache,
        step: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        last: jax.Array,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> tuple[jax.Array, jax.Array, list[Any], Cache, jax.Array]:
        decoder, active = ends_of(ends), (positions != PAD_POSITION).reshape(-1)
        state = before_layers(config, decoder.embed(tokens))
        pools, books, counted = [], [], []

        def experts(number: int, inputs: jax.Array, routing: Routing) -> jax.Array:
            held = jax.tree.map(lambda array: array[number], cache.books)
            part = Part(inputs, routing, active, step, tables[number], product, fill)
            outputs, pool, held, counts = part.computed(cache.pools[number], held)
            pools.append(pool)
            books.append(held)
            counted.append(counts)
            return outputs

        with our_loops(table):
            hidden, _, caches = through(
                config, layers_of(layers), state, positions, caches, experts, add_rows(table)
            )
            logits = decoder.next_logits(hidden, last)
        after = Cache(tuple(pools), jax.tree.map(lambda *some: jnp.stack(some), *books))
        resident = (after.books.owner < config.num_experts).sum(dtype=jnp.int32)
        counts = jnp.append(sum(counted), resident)
        next_tokens = sample(logits, positions[np.arange(len(tokens)), last] + 1, sampling)
        return next_tokens, logits, caches, after, counts

    return run


class Part(NamedTuple):
    """The experts of one layer of a step, while it is traced."""

    inputs: jax.Array  # [T, D]
    routing: Routing
    active: jax.Array  # [T] bool
    step: jax.Array  # []
    tables: jax.Array  # [A, E, 2]
    product: Callable
    fill: Fill

    def computed(self, pool: Any, books: Books) -> tuple[jax.Array, Any, Books, jax.Array]:
        """Fills slots and computes, in as many waves as it takes.

        Returns:
            The rows [T * K, D], the layer's slots and books, and the first four of `Counts`.
        """
        chosen, experts, slots = self.routing.experts, len(books.table), len(books.owner)
        most = min(chosen.size, experts)
        active = jnp.broadcast_to(self.active[:, None], chosen.shape)
        places = jnp.where(active, chosen, experts)
        tokens = jnp.zeros(experts, jnp.int32).at[places].add(1, mode="drop")
        need, hits = tokens > 0, books.table < slots
        probable = jax.nn.softmax(self.routing.logits, axis=-1)
        likely = jnp.where(self.active[:, None], probable, 0.0).sum(0)

        def wave(state: tuple[Any, ...]) -> tuple[Any, ...]:
            pending, pool, books, rows = state
            books, moves, ready = make_room(books, pending, self.step, likely, most)
            pool = self.fill(pool, moves, self.tables)
            slot = jnp.where(jnp.append(ready, False)[places], books.table[chosen], slots)
            some = rows_of_slots(self.inputs, slot, pool, self.product, experts)
            if rows is not None:
                some = jnp.where((slot < slots).reshape(-1, 1), some, rows)
            return pending & ~ready, pool, books, some

        if most <= slots:
            _, pool, books, rows = wave((need, pool, books, None))
        else:
            nothing = jnp.zeros((chosen.size, self.inputs.shape[1]), self.inputs.dtype)
            _, pool, books, rows = jax.lax.while_loop(
                lambda state: state[0].any(), wave, (need, pool, books, nothing)
            )
        counts = [need.sum(), (need & hits).sum(), tokens.sum(), jnp.where(hits, tokens, 0).sum()]
        return rows, pool, books, jnp.stack(counts).astype(jnp.int32)
