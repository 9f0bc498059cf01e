"""Slots: a cache of experts on the device, each layer with slots of its own, whose books are arrays.

`Residency` is kept by Python, between the programs of a layer. These books are read and written inside a
jitted step, so that a step needs no word from Python. Everything here is a pure function over arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Books(NamedTuple):
    """What is in the slots of one layer, or of all layers with a leading axis L."""

    table: jax.Array  # [E] int32, slot of each expert; S for none
    owner: jax.Array  # [S] int32, expert in each slot; E for none
    used: jax.Array  # [S] int32, step in which the slot was last used; -1 for never

    @classmethod
    def empty(cls, layers: int, experts: int, slots: int, device: jax.Device | None = None) -> Books:
        """Returns the books of layers with nothing in their slots.

        >>> Books.empty(2, 4, 3).table.tolist()
        [[3, 3, 3, 3], [3, 3, 3, 3]]
        """
        return cls(
            jnp.full((layers, experts), slots, jnp.int32, device=device),
            jnp.full((layers, slots), experts, jnp.int32, device=device),
            jnp.full((layers, slots), -1, jnp.int32, device=device),
        )


class Moves(NamedTuple):
    """Experts to copy into slots."""

    sources: jax.Array  # [N] int32, expert; -1 for no move
    targets: jax.Array  # [N] int32, slot


def make_room(
    books: Books, need: jax.Array, step: jax.Array, likely: jax.Array, most: int
) -> tuple[Books, Moves, jax.Array]:
    """Gives the missing experts of a layer slots, in place of the experts that were used least recently.

    An expert that is needed keeps its slot. Of experts that were last used in the same step, the least likely
    one goes first: a guess decides between equals alone. If more experts are missing than there are slots to
    give, those with the lowest numbers get them, and the others stay missing.

    Args:
        books: of the layer.
        need: [E] bool, the experts to compute.
        step: [] int32, number of the step.
        likely: [E] float32, any measure of how likely each expert is to be needed soon.
        most: how many experts `need` may hold at most.

    Returns:
        The books after the moves, the moves [min(most, S)], and which needed experts have a slot then [E].

    >>> books = jax.tree.map(lambda array: array[0], Books.empty(1, experts=4, slots=2))
    >>> need = jnp.array([False, True, False, True])
    >>> books, moves, ready = make_room(books, need, jnp.int32(0), jnp.zeros(4), most=2)
    >>> moves.sources.tolist(), moves.targets.tolist(), ready.tolist()
    ([1, 3], [0, 1], [False, True, False, True])
    """
    table, owner, used = books
    experts, slots = len(table), len(owner)
    numbers, places = jnp.arange(experts, dtype=jnp.int32), jnp.arange(slots, dtype=jnp.int32)
    kept = jnp.append(need, False)[owner]  # [S]
    rank = eviction_rank(kept, used, jnp.append(likely, 0.0)[owner])
    by_rank = jnp.zeros(slots, jnp.int32).at[rank].set(places)
    missing = need & (table == slots)
    turn = jnp.cumsum(missing, dtype=jnp.int32) - 1  # [E]
    fits = missing & (turn < slots - kept.sum(dtype=jnp.int32))

    count = min(most, slots)
    targets = by_rank[:count]
    sources = jnp.full(count, -1, jnp.int32).at[jnp.where(fits, turn, count)].set(numbers, mode="drop")
    moved = sources >= 0
    table = table.at[jnp.where(moved, owner[targets], experts)].set(slots, mode="drop")
    table = table.at[jnp.where(moved, sources, experts)].set(targets, mode="drop")
    owner = owner.at[jnp.where(moved, targets, slots)].set(sources, mode="drop")
    ready = need & (table < slots)
    used = used.at[jnp.where(ready, table, slots)].set(step, mode="drop")
    return Books(table, owner, used), Moves(sources, targets), ready


def eviction_rank(kept: jax.Array, used: jax.Array, likely: jax.Array) -> jax.Array:
    """Returns the place [S] of each slot in the order of eviction.

    Every pair is compared, which is one small fused program and not a sort, of which a GPU makes several.

    Args:
        kept: [S] bool, slots that come last because they are needed.
        used: [S] int32, least recent first.
        likely: [S] float32, of equally recent ones the least likely first; then the lowest slot.

    >>> eviction_rank(jnp.array([False, True, False]), jnp.array([5, 1, 4]), jnp.zeros(3)).tolist()
    [1, 2, 0]
    """
    places = jnp.arange(len(kept), dtype=jnp.int32)
    before = places[:, None] < places[None]  # [S, S]: whether the first of a pair goes before the second
    for key in (likely, used, kept):  # the last one decides first
        mine, other = key[:, None], key[None]
        before = (mine < other) | ((mine == other) & before)
    return before.sum(0, dtype=jnp.int32)
