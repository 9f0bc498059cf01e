"""Books of slots that a jitted step keeps, against a cache written in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.offload.slots import Books, make_room

room = jax.jit(make_room, static_argnames="most")


class PlainCache:
    """What `make_room` is to do, slot by slot."""

    def __init__(self, slots: int):
        self.owner: list[int | None] = [None] * slots
        self.used = [-1] * slots

    def make_room(self, need: set[int], step: int, likely: list[float]):
        missing = sorted(need.difference(self.owner))
        order = sorted(
            (slot for slot, expert in enumerate(self.owner) if expert not in need),
            key=lambda slot: (
                self.used[slot],
                0.0 if self.owner[slot] is None else likely[self.owner[slot]],
                slot,
            ),
        )
        moves = list(zip(missing, order, strict=False))
        for expert, slot in moves:
            self.owner[slot] = expert
        for slot, expert in enumerate(self.owner):
            if expert in need:
                self.used[slot] = step
        return moves, need.intersection(self.owner)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_layers_books_are_those_of_a_plain_cache(data):
    """Experts that a step needs keep their slots; of the others the least recent, then least likely, go."""
    experts, slots, most = 6, data.draw(st.sampled_from([1, 3, 6])), data.draw(st.sampled_from([2, 6]))
    plain = PlainCache(slots)
    books = jax.tree.map(lambda array: array[0], Books.empty(1, experts, slots))
    for step in range(data.draw(st.integers(1, 8))):
        need = data.draw(st.sets(st.integers(0, experts - 1), max_size=most))
        likely = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=experts, max_size=experts))
        flags = np.isin(np.arange(experts), list(need))
        books, moves, ready = room(books, flags, np.int32(step), np.float32(likely), most=most)
        expected, computed = plain.make_room(need, step, likely)
        table, owner, used = (array.tolist() for array in books)
        pairs = zip(moves.sources.tolist(), moves.targets.tolist(), strict=True)
        assert [pair for pair in pairs if pair[0] >= 0] == expected
        assert set(np.flatnonzero(ready)) == computed
        assert owner == [experts if expert is None else expert for expert in plain.owner]
        assert used == plain.used
        assert table == [owner.index(e) if e in owner else slots for e in range(experts)]


def test_what_does_not_fit_is_left_for_the_next_wave():
    """Need of more experts than there are slots is met in turns, until nothing is pending."""
    books, pending = Books.empty(1, 5, 2), np.ones(5, bool)
    books, waves = jax.tree.map(lambda array: array[0], books), []
    while pending.any():
        books, _, ready = room(books, pending, np.int32(0), jnp.zeros(5), most=5)
        waves.append(np.flatnonzero(ready).tolist())
        pending = pending & ~np.asarray(ready)
    assert waves == [[0, 1], [2, 3], [4]]
