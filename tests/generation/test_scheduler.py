"""The scheduler, without JAX: nobody is lost, served twice, starved, or in another's slot."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from layerscope_jax.generation.scheduler import (
    MIN_WIDTH,
    Decode,
    Prefill,
    Scheduler,
    Waiting,
    bucket,
    joining,
    next_power,
)


def test_it_needs_no_jax():
    program = "import sys, layerscope_jax.generation.scheduler; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@dataclass
class Model:
    """What is to be true of a scheduler, said the plain way."""

    left: dict[int, int] = field(default_factory=dict)  # tokens that each live request has still to get
    sizes: dict[int, int] = field(default_factory=dict)
    prompts: dict[int, int] = field(default_factory=dict)  # the first request with the same one
    rows: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  # of those that wait


class Scheduling(RuleBasedStateMachine):
    """Requests come, are served and go at any time, in any order."""

    most, chunk = 4, 64

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(self.most, self.chunk)
        self.model, self.ids = Model(), 0

    @rule(
        requests=st.lists(
            st.tuples(st.integers(1, 150), st.integers(1, 6), st.booleans()), min_size=1, max_size=7
        )
    )
    def add(self, requests):
        new, size = [], None
        for other, room, shares in requests:
            if size is None or not shares:
                size, first = other, self.ids
            new.append(Waiting(self.ids, size, room, first))
            self.model.left[self.ids], self.model.sizes[self.ids] = room, size
            self.model.prompts[self.ids] = first
            self.model.order.append(self.ids)
            self.ids += 1
        self.scheduler.add(new)

    @rule()
    def step(self):
        model, step = self.model, self.scheduler.schedule()
        if step is None:
            assert not model.left
            return
        assert len(step.requests) == len(step.rows) == len(set(step.rows)) > 0
        if isinstance(step, Prefill):
            assert list(step.requests) == model.order[: len(step.requests)]  # first come, first served
            del model.order[: len(step.requests)]
            assert not set(step.rows) & set(model.rows.values())
            longest = max(model.sizes[request] for request in step.requests)
            prompts = len({model.prompts[request] for request in step.requests})
            assert next_power(prompts) * bucket(longest, MIN_WIDTH) <= self.chunk or prompts == 1
            model.rows |= dict(zip(step.requests, step.rows, strict=True))
        else:
            assert dict(zip(step.requests, step.rows, strict=True)) == model.rows  # all, each in its slot
            assert list(step.rows) == sorted(step.rows)
        for request in step.requests:
            model.left[request] -= 1
            if not model.left[request]:
                self.scheduler.finish(request)
                self.gone(request)

    @precondition(lambda self: self.model.left)
    @rule(data=st.data())
    def end_early(self, data):
        """A stop token, or an error, ends one that runs."""
        if self.model.rows:
            request = data.draw(st.sampled_from(sorted(self.model.rows)))
            self.scheduler.finish(request)
            self.gone(request)

    @precondition(lambda self: self.model.left)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(sorted(self.model.left)))
        assert self.scheduler.abort(request) == self.model.rows.get(request)
        self.gone(request)

    def gone(self, request):
        self.model.rows.pop(request, None)
        del self.model.left[request]
        if request in self.model.order:
            self.model.order.remove(request)

    @invariant()
    def slots_are_few_and_enough(self):
        assert len(self.scheduler) == len(self.model.left)
        assert len(self.model.rows) <= self.scheduler.slots <= self.most
        assert all(row < self.scheduler.slots for row in self.model.rows.values())
        assert not self.model.left or self.scheduler.slots

    def teardown(self):
        """Nobody who came before the end waits longer than all tokens take that anybody may get."""
        steps = sum(self.model.left.values()) + len(self.model.left)
        for _ in range(steps):
            self.step()
        assert not self.model.left
        assert self.scheduler.schedule() is None


class NarrowScheduling(Scheduling):
    most, chunk = 1, 16


class WideScheduling(Scheduling):
    most, chunk = 32, 4096


TestScheduling = Scheduling.TestCase
TestNarrowScheduling = NarrowScheduling.TestCase
TestWideScheduling = WideScheduling.TestCase
for case in (TestScheduling, TestNarrowScheduling, TestWideScheduling):
    case.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


@given(
    first=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    most=st.integers(1, 32),
    pace=st.integers(1, 3),
    newcomers=st.integers(1, 60),
)
@settings(deadline=None, max_examples=60)
def test_nobody_is_starved_by_those_who_keep_coming(first, most, pace, newcomers):
    """However many come later: whoever waits is prefilled when those before have had their turn."""
    scheduler, left, began, came = Scheduler(most, 4096), {}, [], 0

    def come(rooms):
        nonlocal came
        scheduler.add([Waiting(came + n, 5, room) for n, room in enumerate(rooms)])
        left.update({came + n: room for n, room in enumerate(rooms)})
        came += len(rooms)

    come(first)
    for _ in range(newcomers):
        come([3] * pace)
        step = scheduler.schedule()
        began += step.requests if isinstance(step, Prefill) else ()
        for request in step.requests:
            left[request] -= 1
            if not left[request]:
                del left[request]
                scheduler.finish(request)
    assert began == list(range(len(began)))
    # A request is at most 9 tokens long, so all slots are free after so many decode steps.
    assert len(began) >= min(len(first), newcomers // 20 * min(most, 2))


def decided(steps, scheduler, stop_after):
    """What is scheduled while each request ends after so many tokens."""
    left, found = dict(stop_after), []
    for _ in range(steps):
        step = scheduler.schedule()
        found.append(step)
        for request in step.requests if step else ():
            left[request] -= 1
            if not left[request]:
                scheduler.finish(request)
    return found


def test_the_same_requests_are_scheduled_the_same_way():
    requests = [Waiting(n, 3 + n, 4 + n % 5) for n in range(30)]
    ends = {request.id: request.room for request in requests}
    runs = []
    for _ in range(2):
        scheduler = Scheduler(8, 256)
        scheduler.add(requests)
        runs.append(decided(80, scheduler, ends))
    assert runs[0] == runs[1]
    assert runs[0][-1] is None


def test_samples_of_a_prompt_are_prefilled_together_however_long_it_is():
    scheduler = Scheduler(8, 64)
    scheduler.add(
        [Waiting(n, 500, 9, "first") for n in range(3)] + [Waiting(n, 9, 9, "next") for n in (3, 4)]
    )
    assert scheduler.schedule() == Prefill((0, 1, 2), (0, 1, 2))
    assert scheduler.schedule() == Prefill((3, 4), (3, 4))


def test_an_aborted_requests_slot_goes_to_the_next():
    scheduler = Scheduler(2, 4096)
    scheduler.add([Waiting(n, 5, 9) for n in range(3)])
    assert scheduler.schedule() == Prefill((0, 1), (0, 1))
    assert scheduler.schedule() == Decode((0, 1), (0, 1))
    assert scheduler.abort(1) == 1
    assert scheduler.schedule() == Prefill((2,), (1,))
    assert scheduler.schedule() == Decode((0, 2), (0, 1))
    assert scheduler.abort(0) == 0
    assert scheduler.abort(2) == 1
    assert scheduler.schedule() is None


def test_slots_are_as_many_as_there_are_requests_and_stay():
    scheduler = Scheduler(8, 4096)
    scheduler.add([Waiting(0, 5, 9)])
    assert (scheduler.slots, scheduler.schedule()) == (1, Prefill((0,), (0,)))
    scheduler.add([Waiting(1, 50, 30)])
    assert (scheduler.slots, scheduler.length) == (2, 80)
    assert scheduler.schedule() == Prefill((1,), (1,))
    scheduler.finish(0)
    scheduler.add([Waiting(2, 5, 9)])
    assert (scheduler.slots, scheduler.schedule()) == (2, Prefill((2,), (0,)))


@pytest.mark.parametrize(("mean", "enough"), [(1, 16), (64, 8), (4096, 1)])
def test_newcomers_wait_for_each_other_where_answers_are_short(mean, enough):
    assert joining(32, mean) == enough
    scheduler = Scheduler(32, 4096)
    scheduler.add([Waiting(n, 1, mean) for n in range(100)])
    scheduler.schedule()
    for request in range(enough):
        assert isinstance(scheduler.schedule(), Decode)
        scheduler.abort(request)  # which says nothing of how long answers are
    assert len(scheduler.schedule().requests) == enough
