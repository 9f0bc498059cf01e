"""Helpers: every share is run once, failures reach the caller when all have ended."""

import threading

import pytest

from layerscope_jax.experts.threads import Helpers


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
