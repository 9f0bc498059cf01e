"""Experts on an accelerator in slots: arrays that are allocated once, written in place and never moved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.kernels.cpu import expert_rows
from layerscope_jax.kernels.grouping import Assignments
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
    product: Callable,
    num_experts: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes the experts of a layer that have slots, whichever they are: no word from the host is needed.

    Args:
        outputs: [T * K + 1, D]; donated.
        inputs: [T, D].
        chosen: [T, K] int32.
        positions: [B, S] int32, T = B * S.
        pool, table: as of `put`.
        layer: [] int32.
        first: [] int32, the device's first expert in a layer, where several devices share them.
        product, num_experts: as of `rows_of_slots`; the device's number of experts.

    Returns:
        The outputs with these rows, and an element that is ready when they are.
    """
    slots = jax.tree.leaves(pool)[0].shape[0]
    row = jax.lax.dynamic_slice_in_dim(table, layer * num_experts, num_experts)
    active = (positions != PAD_POSITION).reshape(-1, 1)
    own = chosen - first
    owned = active & (own >= 0) & (own < num_experts)
    slot = jnp.where(owned, row[jnp.clip(own, 0, num_experts - 1)], slots)
    rows = rows_of_slots(inputs, slot, pool, product, num_experts)
    computed = (slot < slots).reshape(-1, 1)
    outputs = outputs.at[:-1].set(jnp.where(computed, rows, outputs[:-1]))
    return outputs, rows[-1, 0]


@functools.partial(jax.jit, static_argnames=("choices", "product"), donate_argnames="outputs")
def grouped_slots(
    outputs: jax.Array, inputs: jax.Array, places: jax.Array, pool: Any, choices: int, product: Callable
) -> tuple[jax.Array, jax.Array]:
    """Computes N experts as `grouped_ffn` does, from their slots.

    Args:
        outputs: [T * K + 1, D]; donated.
        inputs: [T, D].
        places: [N, M + 1] int32, output rows of each expert, and its slot: all in one transfer.
        pool: as of `put`.
        choices: K.
        product: as of `rows_of_slots`.
    """
    slots = places[:, :-1]
    experts = tuple(expert_at(pool, places[number, -1]) for number in range(len(places)))
    rows = expert_rows(inputs, slots, experts, choices, product)
    return outputs.at[slots.reshape(-1)].set(rows), rows[-1, 0]


class SlottedExperts(DeviceExperts):
    """`DeviceExperts` whose experts are in slots of one allocation.

    In a decode step the resident experts are computed before the host knows which they are (`begin`): a
    table on the device says where each one is. An expert that was evicted stays in the table until its slot
    is written to. So it may be computed in vain, which changes nothing: the host's rows go on top.
    """

    passes_rows_on = True

    def __init__(self, device: jax.Device, format: Any = None):
        super().__init__(device, format)
        self._pool: Any = None
        self._computed: frozenset[int] = frozenset()  # of this layer, by `begin`
        self._done: jax.Array | None = None
        self._decoding = False

    def reserve(self, bank: ExpertBank, slots: int) -> None:
        """Allocates slots for experts of a bank; all are free.

        Args:
            bank: the experts, of which copies will be kept.
            slots: S.
        """
        self._bank = bank
        self._chosen = product_of(bank.format, bank.sizes, bank.dtype, self._device)
        self._free = list(range(slots))[::-1]
        self._owner: list[ExpertId | None] = [None] * slots  # as the table says, of free slots too
        self._slot_of: dict[ExpertId, int] = {}
        self._listed: list[set[int]] = [set() for _ in bank.layers]
        self._scalars: dict[int, jax.Array] = {}
        self._pool = None  # before its successor takes as much memory
        if not slots:
            return
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
        self._computed, self._done, self._decoding = frozenset(), None, positions.shape[1] == 1
        if self._pool is None or not self._decoding or not (self._listed[layer] or always):
            return outputs
        self._computed = frozenset(self._listed[layer])
        outputs, self._done = resident_rows(
            outputs,
            inputs,
            chosen,
            positions,
            self._pool,
            self._table,
            self._scalar(layer),
            self._scalar(self.first),
            self._chosen[1],
            self._bank.num_experts,
        )
        self.stats.dispatches += not always
        return outputs

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
        experts, done = list(experts), self._done
        already = [expert for expert in experts if expert in self._computed]
        if already:
            weights(already)  # counts them as used
            tokens = sum(rows.demand[expert] for expert in already)
            self.stats.experts, self.stats.tokens = (
                self.stats.experts + len(already),
                self.stats.tokens + tokens,
            )
            self.stats.rows += tokens
            self._count_kernel(already)
            experts = [expert for expert in experts if expert not in self._computed]
        for group in rows.groups(experts):
            self.stats.count_group(group)
            self._count_kernel(group.experts)
            slots = np.array(weights(group.experts), np.int32)
            places = np.concatenate([group.slots, slots[:, None]], axis=1)
            outputs, done = grouped_slots(outputs, inputs, places, self._pool, rows.choices, self._chosen[1])
        return outputs, done

    def place(self, outputs: jax.Array, result: np.ndarray, rows: Assignments, experts: Sequence[int]) -> Any:
        """Returns the outputs with the host's rows of `experts`, in a decode step as `HostRows`."""
        if not (self._decoding and self.passes_rows_on):
            return super().place(outputs, result, rows, experts)
        return HostRows.of(outputs, result, np.concatenate([rows.slots(expert) for expert in experts]))

    def give_back(self, outputs: Any) -> None:
        super().give_back(outputs.outputs if isinstance(outputs, HostRows) else outputs)

    def _count_kernel(self, experts: Iterable[int]) -> None:
        if self._chosen[0] != REFERENCE:
            self.stats.by_kernel[self._chosen[0]] += len(set(experts))

    def rehearse(
        self,
        outputs: jax.Array,
        inputs: jax.Array,
        groups: Iterable[tuple[int, int]],
        weights: Any,
        choices: int,
    ) -> jax.Array:
        """Runs every program of `run` and `keep`; see `DeviceExperts.rehearse`."""
        if self._pool is None:
            return super().rehearse(outputs, inputs, groups, weights, choices)
        for bucket, size in groups:
            places = np.full((size, bucket + 1), len(outputs) - 1, np.int32)
            places[:, -1] = 0
            outputs, _ = grouped_slots(outputs, inputs, places, self._pool, choices, self._chosen[1])
        if self._free and self._owner[self._free[-1]] is None:  # otherwise `put` has been compiled
            self._write(weights, self._free[-1], None, None)
        return outputs
