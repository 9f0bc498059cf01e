"""Computes experts from slots, inside a jitted step: their weights are read where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layerscope_jax.models.experts import block_rows
from layerscope_jax.offload.bank import ExpertBank

FEW = 16
"""Rows up to which each is a product of its own: more read an expert's weights again for each of its rows."""


def empty_pool(bank: ExpertBank, slots: int, device: jax.Device) -> Any:
    """Returns slots for experts of a bank: an expert's arrays with a leading axis S, all zeros."""
    buffers = bank.format.buffers(*bank.sizes).values()
    arrays = (jnp.zeros((slots, *buffer.shape), buffer.dtype, device=device) for buffer in buffers)
    return bank.format.Expert(*arrays)


def rows_of_slots(
    inputs: jax.Array, slots: jax.Array, pool: Any, product: Callable, num_experts: int
) -> jax.Array:
    """Computes the rows of experts that are in slots.

    A row has the same bits whatever slot its expert is in and whatever other rows there are: the shapes of
    all products depend on T, K and E alone.

    Args:
        inputs: [T, D].
        slots: [T, K] int32; S for a row that is not computed.
        pool: an expert's arrays with a leading axis S.
        product: `ExpertFormat.ffn`, of [M, D] and one expert's arrays.
        num_experts: E, which sets the size of blocks.

    Returns:
        [T * K, D]; zeros where nothing is computed.
    """
    count = slots.size
    return (one_by_one if count <= FEW else in_blocks)(inputs, slots, pool, product, num_experts)


def expert_at(pool: Any, slot: jax.Array) -> Any:
    """Returns the expert in a slot; XLA reads it in the product, without a copy, where it can."""
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, slot, keepdims=False), pool)


def one_by_one(
    inputs: jax.Array, slots: jax.Array, pool: Any, product: Callable, num_experts: int
) -> jax.Array:
    """`rows_of_slots` as one product a row. A row is there twice: one alone is slow on CPUs."""
    available = jax.tree.leaves(pool)[0].shape[0]
    rows = []
    for token in range(slots.shape[0]):
        pair = jnp.repeat(inputs[token : token + 1], 2, 0)
        for choice in range(slots.shape[1]):
            slot = slots[token, choice]
            row = product(pair, expert_at(pool, jnp.minimum(slot, available - 1)))[0]
            rows.append(jnp.where(slot < available, row, jnp.zeros_like(row)))
    return jnp.stack(rows)


def in_blocks(
    inputs: jax.Array, slots: jax.Array, pool: Any, product: Callable, num_experts: int
) -> jax.Array:
    """`rows_of_slots` in blocks of rows of one expert, each one product.

    There are as many as there could be, so that their number is known beforehand: on a GPU, a loop whose end
    the data decides would block the host.
    """
    available, count, choices = jax.tree.leaves(pool)[0].shape[0], slots.size, slots.shape[1]
    size = block_rows(count, num_experts)
    flat = slots.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    counts = jnp.bincount(flat, length=available).astype(jnp.int32)  # S is beyond the last slot
    blocks = (counts + (size - 1)) // size
    last_block, first_row = jnp.cumsum(blocks, dtype=jnp.int32), jnp.cumsum(counts, dtype=jnp.int32) - counts
    numbers = jnp.arange(most_blocks(count, min(available, num_experts), size), dtype=jnp.int32)
    slot = jnp.searchsorted(last_block, numbers, side="right", method="compare_all").astype(jnp.int32)
    slot = jnp.minimum(slot, available - 1)
    within = jnp.arange(size, dtype=jnp.int32)[None]
    ranks = (numbers - (last_block - blocks)[slot])[:, None] * size + within
    rows = order[jnp.minimum(first_row[slot][:, None] + ranks, count - 1)]
    rows = jnp.where(ranks < counts[slot][:, None], rows, count)

    def block(_: None, places: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        rows, slot = places
        tokens = jnp.minimum(rows // choices, len(inputs) - 1)  # padding reads any row
        return None, product(inputs[tokens], expert_at(pool, slot))

    _, computed = jax.lax.scan(block, None, (rows, slot))  # [N, M, D]
    return jnp.zeros((count, inputs.shape[1]), inputs.dtype).at[rows].set(computed, mode="drop")


def most_blocks(rows: int, experts: int, size: int) -> int:
    """Returns how many blocks of so many rows are needed at most, whichever experts the rows belong to.

    >>> most_blocks(rows=32, experts=128, size=2), most_blocks(rows=512, experts=128, size=2)
    (32, 320)
    """
    partial = min(rows, experts)  # blocks that are not full, at most one of each expert
    return partial + (rows - partial) // size
