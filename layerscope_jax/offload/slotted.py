"""Experts on an accelerator in slots: arrays that are allocated once, written in place and never moved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.kernels.grouping import Assignments, tile_shape
from layerscope_jax.kernels.registry import REFERENCE
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.offload.executors import DeviceExperts, product_of
from layerscope_jax.offload.host_rows import HostRows
from layerscope_jax.offload.parcels import unpacked
from layerscope_jax.offload.slot_experts import empty_pool, expert_at, rows_of_slots
from layerscope_jax.scheduling.plan import ExpertId


@functools.partial(jax.jit, donate_argnames=("pool", "table"))
def put(
    pool: Any, table: jax.Array, expert: Any, slot: jax.Array, new: jax.Array, old: jax.Array
) -> tuple[Any, jax.Array]:
    """Writes an expert into a slot, and the slot into the table.

    Args:
        pool: an expert's arrays with a leading axis S; donated.
        table: [L * E] int32, slot of each expert, S for none; donated.
        expert: arrays of the expert, or its parcel [N] uint8.
        slot: [] int32.
        new, old: [] int32, places in the table of this expert and of the one that was in the slot; L * E for
            none.
    """
    arrays = expert if isinstance(expert, type(pool)) else unpacked(expert, pool)
    pool = type(pool)(
        *(
            jax.lax.dynamic_update_index_in_dim(array, one, slot, 0)
            for array, one in zip(pool, arrays, strict=True)
        )
    )
    slots = jax.tree.leaves(pool)[0].shape[0]
    table = table.at[old].set(slots, mode="drop").at[new].set(slot, mode="drop")
    return pool, table


@functools.partial(jax.jit, static_argnames=("product", "num_experts"), donate_argnames="outputs")
def resident_rows(
    outputs: jax.Array,
    inputs: jax.Array,
    chosen: jax.Array,
    positions: jax.Array,
    pool: Any,
    table: jax.Array,
    layer: jax.Array,
    first: jax.Array,
    wanted: Any,
    product: Callable,
    num_experts: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes the experts of a layer that have slots, whichever they are: no word from the host is needed.

    Experts that came later are computed by the same program, in the same shapes: their rows have the bits
    that they would have had.

    Args:
        outputs: [T * K + 1, D]; donated.
        inputs: [T, D].
        chosen: [T, K] int32.
        positions: [B, S] int32, T = B * S.
        pool, table: as of `put`.
        layer: [] int32.
        first: [] int32, the device's first expert in a layer, where several devices share them.
        wanted: [E] bool, which of the device's experts are computed, if they have slots.
        product, num_experts: as of `rows_of_slots`; the device's number of experts.

    Returns:
        The outputs with these rows, and an element that is ready when they are.
    """
    slots = jax.tree.leaves(pool)[0].shape[0]
    row = jax.lax.dynamic_slice_in_dim(table, layer * num_experts, num_experts)
    active = (positions != PAD_POSITION).reshape(-1, 1)
    own = chosen - first
    owned = active & (own >= 0) & (own < num_experts)
    row = jnp.where(wanted, row, slots)
    slot = jnp.where(owned, row[jnp.clip(own, 0, num_experts - 1)], slots)
    rows = rows_of_slots(inputs, slot, pool, product, num_experts)
    computed = (slot < slots).reshape(-1, 1)
    outputs = outputs.at[:-1].set(jnp.where(computed, rows, outputs[:-1]))
    return outputs, rows[-1, 0]


@functools.partial(jax.jit, static_argnames=("choices", "product"), donate_argnames="outputs")
def tiled_slots(
    outputs: jax.Array, inputs: jax.Array, places: jax.Array, pool: Any, choices: int, product: Callable
) -> tuple[jax.Array, jax.Array]:
    """Computes N tiles of rows, each of one expert, which is read in its slot.

    Their number is known beforehand: on a GPU, a loop whose end the data decides would block the host.

    Args:
        outputs: [T * K + 1, D]; donated.
        inputs: [T, D].
        places: [N, M + 1] int32, output rows of each tile, and its slot: all in one transfer.
        pool: as of `put`.
        choices: K.
        product: as of `rows_of_slots`.

    Returns:
        The outputs with these rows, and an element that is ready when they are.
    """

    def tile(_: None, place: jax.Array) -> tuple[None, jax.Array]:
        token = jnp.minimum(place[:-1] // choices, len(inputs) - 1)  # padding reads any row
        return None, product(inputs[token], expert_at(pool, place[-1]))

    _, rows = jax.lax.scan(tile, None, places)  # [N, M, D]
    return outputs.at[places[:, :-1]].set(rows), rows[-1, -1, 0]


class SlottedExperts(DeviceExperts):
    """`DeviceExperts` whose experts are in slots of one allocation.

    In a decode step the resident experts are computed before the host knows which they are (`begin`): a
    table on the device says where each one is. An expert that was evicted stays in the table until its slot
    is written to. So it may be computed in vain, which changes nothing: the host's rows go on top.

    However tokens are routed and experts arrive, one program computes all experts of a decode step, and one
    those of a prefill; their shapes depend on the number of rows in the step alone.
    """

    passes_rows_on = True

    def __init__(self, device: jax.Device, format: Any = None):
        super().__init__(device, format)
        self._pool: Any = None
        self._computed: frozenset[int] = frozenset()  # of this layer, by `begin`
        self._done: jax.Array | None = None
        self._no_words: dict[int, jax.Array] = {}
        self._step: tuple[jax.Array, jax.Array, int] | None = None  # of a decode step, what `begin` was given

    def reserve(self, bank: ExpertBank, slots: int) -> None:
        """Allocates slots for experts of a bank; all are free.

        Args:
            bank: the experts, of which copies will be kept.
            slots: S.
        """
        self._bank = bank
        self._free = list(range(slots))[::-1]
        self._owner: list[ExpertId | None] = [None] * slots  # as the table says, of free slots too
        self._slot_of: dict[ExpertId, int] = {}
        self._listed: list[set[int]] = [set() for _ in bank.layers]
        self._scalars: dict[int, jax.Array] = {}
        self._pool = None  # before its successor takes as much memory
        if not slots:  # as at the engine's end, which calls nothing of JAX's (`Resources`)
            return
        self._chosen = product_of(bank.format, bank.sizes, bank.dtype, self._device)
        self._every = self._constant(np.ones(bank.num_experts, np.bool_))
        size = len(bank.layers) * bank.num_experts
        self._table = jnp.full(size, slots, jnp.int32, device=self._device)
        self._pool = empty_pool(bank, slots, self._device)

    @property
    def lost(self) -> bool:
        """Whether an interrupt has lost the slots: they were given to a program whose result nobody kept."""
        return self._pool is not None and any(array.is_deleted() for array in (self._table, *self._pool))

    def keep(self, weights: Any, expert: ExpertId | None = None) -> Any:
        """Writes an expert into a free slot and returns the slot; without slots, returns the arrays."""
        if self._pool is None or expert is None:
            return weights
        slot = self._free[-1]
        if (again := self._slot_of.pop(expert, None)) is not None:
            self._owner[again] = None  # evicted before, from a slot that nothing has been written to since
        # An interrupt may come between any two of these. The table may then list more than is listed here,
        # which is computed in vain, but never less.
        old, self._owner[slot] = self._owner[slot], None
        if old is not None:
            self._listed[old.layer].discard(old.expert)
            del self._slot_of[old]
        self._write(weights, slot, expert, old)
        self._free.pop()
        self._owner[slot], self._slot_of[expert] = expert, slot
        self._listed[expert.layer].add(expert.expert)
        return slot

    def _write(self, weights: Any, slot: int, new: ExpertId | None, old: ExpertId | None) -> None:
        places = (self._scalar(self._place(expert)) for expert in (new, old))
        self._pool, self._table = put(self._pool, self._table, weights, self._scalar(slot), *places)

    def _place(self, expert: ExpertId | None) -> int:
        experts = self._bank.num_experts
        if expert is None:
            return len(self._bank.layers) * experts
        return expert.layer * experts + expert.expert

    def _scalar(self, number: int) -> jax.Array:
        """Returns a number on the device; each is copied there once."""
        if number not in self._scalars:
            self._scalars[number] = jax.device_put(np.int32(number), self._device)
        return self._scalars[number]

    def _constant(self, array: np.ndarray) -> jax.Array:
        """Returns a copy on the device that takes the place of NumPy's arrays in the same program."""
        with jax.default_device(self._device):  # not committed to it, as these are not
            return jax.device_put(array)

    def release(self, slot: Any) -> None:
        """Frees the slot of an evicted expert."""
        if isinstance(slot, int):
            self._free.append(slot)

    def begin(
        self,
        outputs: jax.Array,
        inputs: jax.Array,
        chosen: jax.Array,
        positions: jax.Array,
        layer: int,
        always: bool = False,
    ) -> jax.Array:
        """Dispatches the experts of a layer that are in slots, if there are any and this is a decode step.

        A prefill has so many rows that a program for any of them would be mostly padding.

        Args:
            outputs: [T * K + 1, D]; donated.
            inputs: [T, D].
            chosen: [T, K] int32 on the device.
            positions: [B, S] int32 on the device.
            layer: number of the layer.
            always: whether to run the program whatever is in slots, so that it is compiled.
        """
        self._computed, self._done = frozenset(), None
        self._step = (chosen, positions, layer) if positions.shape[1] == 1 else None
        if self._pool is None or self._step is None or not (self._listed[layer] or always):
            return outputs
        self._computed = frozenset(self._listed[layer])
        outputs, self._done = self._resident(outputs, inputs, self._every)
        self.stats.dispatches += not always
        return outputs

    def _resident(self, outputs: jax.Array, inputs: jax.Array, wanted: Any) -> tuple[jax.Array, jax.Array]:
        """Dispatches those experts of the decode step's layer that are wanted and in slots."""
        assert self._step is not None
        chosen, positions, layer = self._step
        return resident_rows(
            outputs,
            inputs,
            chosen,
            positions,
            self._pool,
            self._table,
            self._scalar(layer),
            self._scalar(self.first),
            wanted,
            self._chosen[1],
            self._bank.num_experts,
        )

    def run(
        self,
        outputs: jax.Array,
        inputs: jax.Array,
        rows: Assignments,
        experts: Iterable[int],
        weights: Callable[[Sequence[int]], Sequence[Any]],
    ) -> tuple[jax.Array, jax.Array | None]:
        """Dispatches those of `experts` that `begin` has not; see `DeviceExperts.run`."""
        if self._pool is None:
            return super().run(outputs, inputs, rows, experts, weights)
        experts, done, stats = list(experts), self._done, self.stats
        slots = weights(experts)  # counts them as used
        tokens = sum(rows.demand[expert] for expert in experts)
        stats.experts, stats.tokens = stats.experts + len(experts), stats.tokens + tokens
        if self._chosen[0] != REFERENCE:
            stats.by_kernel[self._chosen[0]] += len(experts)
        if self._step is not None:
            stats.rows += tokens
            late = [expert for expert in experts if expert not in self._computed]
            if late:
                wanted = np.zeros(self._bank.num_experts, np.bool_)
                wanted[late] = True
                outputs, done = self._resident(outputs, inputs, wanted)
                stats.dispatches += 1
            return outputs, done
        for places in rows.tiles(experts, slots, self._tiles(rows.total)):
            outputs, done = tiled_slots(outputs, inputs, places, self._pool, rows.choices, self._chosen[1])
            stats.dispatches += 1
            stats.rows += places[:, :-1].size
        return outputs, done

    def _tiles(self, total: int) -> tuple[int, int]:
        """Tiles of a dispatch and rows of a tile in a prefill with `total` rows, T * K."""
        return tile_shape(total, self.spread or self._bank.num_experts)

    def place(self, outputs: jax.Array, result: np.ndarray, rows: Assignments, experts: Sequence[int]) -> Any:
        """Returns the outputs with the host's rows of `experts`, in a decode step as `HostRows`."""
        if self._step is None or not self.passes_rows_on:
            return super().place(outputs, result, rows, experts)
        return HostRows.of(outputs, result, np.concatenate([rows.slots(expert) for expert in experts]))

    def rehearse_placing(self, outputs: jax.Array) -> jax.Array:
        """Runs the program of `place`, if there is one."""
        passed_on = self._step is not None and self.passes_rows_on
        return outputs if passed_on else super().rehearse_placing(outputs)

    def passed_on(self, outputs: Any, decoding: bool) -> Any:
        """Returns a decode step's outputs as `HostRows`, whether or not the host had any: one program."""
        if not (decoding and self.passes_rows_on) or isinstance(outputs, HostRows):
            return outputs
        if len(outputs) not in self._no_words:
            self._no_words = {len(outputs): self._constant(HostRows.none(outputs).words)}
        return HostRows(outputs, self._no_words[len(outputs)])

    def give_back(self, outputs: Any) -> None:
        super().give_back(outputs.outputs if isinstance(outputs, HostRows) else outputs)

    def rehearse(
        self,
        outputs: jax.Array,
        inputs: jax.Array,
        groups: Iterable[tuple[int, int]],
        weights: Any,
        choices: int,
    ) -> jax.Array:
        """Runs every program of `run` and `keep` that `begin` has not; see `DeviceExperts.rehearse`."""
        if self._pool is None:
            return super().rehearse(outputs, inputs, groups, weights, choices)
        if self._step is None:
            total = len(outputs) - 1
            count, size = self._tiles(total)
            places = np.full((count, size + 1), total, np.int32)
            places[:, -1] = 0
            outputs, _ = tiled_slots(outputs, inputs, places, self._pool, choices, self._chosen[1])
        if self._free and self._owner[self._free[-1]] is None:  # otherwise `put` has been compiled
            self._write(weights, self._free[-1], None, None)
        return outputs
