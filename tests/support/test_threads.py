"""Helpers: every share is run once, failures reach the caller when all have ended."""

import threading

import pytest
from helpers import in_time

from layerscope_jax.kernels.crew import BUSY, ENDED, Crew, add_at
from layerscope_jax.support import threads
from layerscope_jax.support.njit import njit
from layerscope_jax.support.threads import Helpers


@pytest.fixture
def helpers():
    made = Helpers(3)
    yield made
    made.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_number_runs_once_and_at_the_same_time(helpers, threads):
    together, found = threading.Barrier(threads, timeout=20), []

    def call(number):
        together.wait()  # passes only if all of them run
        found.append((number, threading.get_ident()))

    for _ in range(3):
        found.clear()
        helpers.run(call, threads)
        assert sorted(number for number, _ in found) == list(range(threads))
        assert dict(found)[0] == threading.get_ident()
        assert len({thread for _, thread in found}) == threads


@pytest.mark.parametrize("bad", [0, 2])
def test_a_failure_is_raised_when_all_have_ended(helpers, bad):
    ended = []

    def call(number):
        if number == bad:
            raise ZeroDivisionError(number)
        ended.append(number)

    with pytest.raises(ZeroDivisionError, match=str(bad)):
        helpers.run(call, 4)
    assert len(ended) == 3
    helpers.run(ended.append, 4)
    assert len(ended) == 7


def test_closing_ends_the_threads():
    before = threading.active_count()
    helpers = Helpers(2)
    assert threading.active_count() == before + 2
    helpers.close()
    assert threading.active_count() == before


class Interrupted(threads.SimpleQueue):
    """A queue at which whoever waits, other than a helper, is interrupted so many times."""

    left = 0
    reached, last = threading.Event(), threading.Event()

    def get(self, *arguments):
        if Interrupted.left and not threading.current_thread().name.startswith("layerscope"):
            Interrupted.left -= 1
            Interrupted.reached.set()
            if not Interrupted.left:
                Interrupted.last.set()
            raise KeyboardInterrupt
        return super().get(*arguments)


@pytest.mark.parametrize("interrupts", [1, 2, 3])
@pytest.mark.parametrize("late", [1, 2, 3])
def test_an_interrupt_while_waiting_leaves_nothing_behind(monkeypatch, interrupts, late):
    """A helper's completion is never taken for that of a later call, however often the wait is broken off."""
    monkeypatch.setattr(threads, "SimpleQueue", Interrupted)
    helpers, open_, ended = Helpers(3), threading.Event(), []
    Interrupted.reached.clear()
    Interrupted.last = open_ if interrupts == 3 else threading.Event()

    together = threading.Barrier(4, timeout=20)

    def gated(number):
        together.wait()  # all have begun
        if number == late:
            assert Interrupted.reached.wait(20)
            if interrupts > 1:  # then it is still at it when control returns
                assert open_.wait(20)
        ended.append(number)

    def call(number):
        together.wait()
        ended.append(number)

    try:
        Interrupted.left = interrupts
        with pytest.raises(KeyboardInterrupt):
            in_time(lambda: helpers.run(gated, 4))
        assert interrupts > 1 or sorted(ended) == [0, 1, 2, 3]
        if interrupts == 3:  # the third comes when the next call cleans up
            with pytest.raises(KeyboardInterrupt):
                in_time(lambda: helpers.run(call, 4))
        threading.Timer(0.05, open_.set).start()
        for _ in range(3):
            in_time(lambda: helpers.run(call, 4))
            assert sorted(ended[-4:]) == [0, 1, 2, 3]
    finally:
        Interrupted.left = 0
        open_.set()
        helpers.close()


@pytest.mark.parametrize("given", [0, 1, 2])
@pytest.mark.parametrize("before", [False, True])
def test_an_interrupt_while_handing_out_leaves_nothing_behind(monkeypatch, given, before):
    """Some helpers have their part then, some do not, and one may or may not."""
    helpers, ended, puts = Helpers(3), [], []
    real = helpers._calls

    class Calls:
        get, get_nowait, empty = real.get, real.get_nowait, real.empty

        def put(self, call):
            puts.append(call)
            if not before or len(puts) != given + 1:
                real.put(call)
            if len(puts) == given + 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(helpers, "_calls", Calls())
    try:
        with pytest.raises(KeyboardInterrupt):
            in_time(lambda: helpers.run(ended.append, 4))
        assert real.empty()
        assert len(ended) == len(set(ended)) <= given + 1  # what began has ended, and nothing else begins
        for _ in range(3):
            ended.clear()
            in_time(lambda: helpers.run(ended.append, 4))
            assert sorted(ended) == [0, 1, 2, 3]
    finally:
        helpers.close()


def test_a_job_beside_its_caller_can_be_waited_for_again_and_given_up(helpers):
    gate, begun, done = threading.Event(), threading.Semaphore(0), []

    def call(number):
        begun.release()
        assert gate.wait(20)
        done.append(number)
        raise ZeroDivisionError(number)

    job = helpers.start(call, (5,))
    assert begun.acquire(timeout=20)
    resting = threading.Thread(target=helpers.rest, daemon=True)
    resting.start()
    resting.join(0.05)
    assert resting.is_alive()
    gate.set()
    resting.join(20)
    assert done == [5]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="5"):
            in_time(job.result)


def test_closed_helpers_say_so():
    helpers = Helpers(1)
    helpers.close()
    helpers.close()
    with pytest.raises(ValueError, match="ended with their engine; make a new Engine"):
        in_time(lambda: helpers.run(lambda number: None, 2))
    assert helpers.rest() is None


@njit(nogil=True)
def let_go(pool):
    """As a program that had the helpers does: others may look at the same number meanwhile."""
    add_at(pool.ctypes.data + 8 * BUSY, -1)


def test_the_crew_does_the_job_that_it_is_at_before_it_is_closed():
    """And a program that is still to come computes alone: no thread waits for one that has gone."""
    crew = Crew(1)
    crew.pool[BUSY] = 1  # as while a program has the helpers
    closer = threading.Thread(target=crew.close, daemon=True)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    assert not crew.pool[ENDED]
    let_go(crew.pool)
    closer.join(20)
    assert not closer.is_alive()
    in_time(crew.close)  # once more, as after an interrupt
    assert crew.pool[ENDED]
    assert crew.pool[BUSY]  # nobody gets helpers any more
