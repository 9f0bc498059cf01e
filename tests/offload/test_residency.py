"""The books agree with a simple model of them under any interleaving and never promise more than there is."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerscope_jax import ExpertId
from layerscope_jax.offload.residency import Residency

BYTES = 100
ids = st.builds(ExpertId, st.integers(0, 1), st.integers(0, 2))


class Books(RuleBasedStateMachine):
    """Each rule is tried in any state: it either is legal and done, or refused and changes nothing."""

    @initialize(budget=st.integers(0, 5 * BYTES))
    def begin(self, budget):
        self.books = Residency(budget, BYTES)
        self.budget = budget
        self.coming: dict[ExpertId, bool] = {}  # -> prefetched
        self.held: dict[ExpertId, list] = {}  # -> [weights, prefetched, used]
        self.peak = self.wasted = 0
        self.serial = 0

    def some(self, sensible, expert, luck):
        """One of the sensible choices, or whatever was drawn."""
        return sorted(sensible)[luck % len(sensible)] if luck and sensible else expert

    def attempt(self, legal, call):
        if legal:
            return call()
        with pytest.raises(RuntimeError):
            call()
        return None

    @rule(expert=ids, prefetched=st.booleans())
    def reserve(self, expert, prefetched):
        room = (len(self.held) + len(self.coming) + 1) * BYTES <= self.budget
        legal = expert not in self.held and expert not in self.coming and room
        self.attempt(legal, lambda: self.books.reserve(expert, prefetched=prefetched))
        if legal:
            self.coming[expert] = prefetched
            self.peak = max(self.peak, (len(self.held) + len(self.coming)) * BYTES)

    @rule(expert=ids, luck=st.integers(0, 5))
    def arrive(self, expert, luck):
        expert = self.some(self.coming, expert, luck)
        legal = expert in self.coming
        self.serial += 1
        weights = f"weights {self.serial}"
        self.attempt(legal, lambda: self.books.arrive(expert, weights))
        if legal:
            self.held[expert] = [weights, self.coming.pop(expert), False]

    @rule(expert=ids, luck=st.integers(0, 5))
    def release(self, expert, luck):
        expert = self.some(self.coming, expert, luck)
        legal = expert in self.coming
        self.attempt(legal, lambda: self.books.release(expert))
        self.coming.pop(expert, None)

    @rule(expert=ids, luck=st.integers(0, 5))
    def evict(self, expert, luck):
        expert = self.some(self.held, expert, luck)
        legal = expert in self.held
        self.attempt(legal, lambda: self.books.evict(expert))
        if legal:
            _, prefetched, used = self.held.pop(expert)
            self.wasted += BYTES if prefetched and not used else 0

    @rule(expert=ids, luck=st.integers(0, 5))
    def use(self, expert, luck):
        expert = self.some(self.held, expert, luck)
        legal = expert in self.held
        weights = self.attempt(legal, lambda: self.books.use(expert.layer, [expert.expert]))
        if legal:
            assert weights == [self.held[expert][0]]
            self.held[expert][2] = True

    @rule(luck=st.integers(0, 5))
    def reset(self, luck):
        if luck:
            return
        self.books.reset()
        self.wasted, self.peak = 0, (len(self.held) + len(self.coming)) * BYTES
        for entry in self.held.values():
            entry[1] = False

    @invariant()
    def books_agree(self):
        books = self.books
        assert set(books.resident) == set(self.held)
        assert set(books.coming) == set(self.coming)
        assert books.used_bytes == (len(self.held) + len(self.coming)) * BYTES
        assert books.used_bytes <= self.budget
        assert books.slots == self.budget // BYTES
        assert books.peak_bytes == self.peak <= self.budget
        waiting = sum(BYTES for _, prefetched, used in self.held.values() if prefetched and not used)
        assert books.wasted_bytes == self.wasted
        idle = {expert for expert, (_, prefetched, used) in self.held.items() if prefetched and not used}
        idle |= {expert for expert, prefetched in self.coming.items() if prefetched}
        assert books.idle_prefetches == idle
        assert books.unused_prefetch_bytes() == self.wasted + waiting


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase


def test_a_refusal_names_the_expert():
    books = Residency(BYTES, BYTES)
    expert = ExpertId(3, 7)
    for act, why in (
        (lambda: books.arrive(expert, None), "arrived, but was not on its way"),
        (lambda: books.release(expert), "released, but was not on its way"),
        (lambda: books.evict(expert), "evicted, but is not resident"),
        (
            lambda: books.use(expert.layer, [expert.expert]),
            "to be computed on the device, but is not resident",
        ),
    ):
        with pytest.raises(RuntimeError, match=why) as refusal:
            act()
        assert "layer=3, expert=7" in str(refusal.value)
    books.reserve(ExpertId(0, 0), prefetched=False)
    with pytest.raises(RuntimeError, match=r"no room for .*layer=3, expert=7.*100 of 100 bytes"):
        books.reserve(expert, prefetched=True)
    with pytest.raises(RuntimeError, match="already on the device or on its way"):
        books.reserve(ExpertId(0, 0), prefetched=True)
