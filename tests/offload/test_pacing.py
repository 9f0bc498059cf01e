"""A paced link carries its rate: exactly by its own clock, never faster by the real one."""

import threading
import time

import pytest
from helpers import in_time
from links import CHUNK, EXPERT, A, B, C, D, Link, collect

from layerscope_jax.offload import link as transfers_module


class Clock:
    """Stands for the module `time`: sleeping is what makes it later, by `late` more than was asked."""

    def __init__(self, now=1000.0):
        self.now = now
        self.late = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds + self.late


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(transfers_module, "time", clock)
    return clock


CHUNK_S = 0.5
RATE = int(CHUNK / CHUNK_S)


def test_a_paced_link_carries_its_rate_exactly(bank, start, clock):
    transfers = start(Link(bank), RATE)
    transfers.submit([A, B], [C])
    collect(transfers, [A, B, C])
    in_time(transfers.rest)
    assert clock.now == pytest.approx(1000 + 9 * CHUNK_S)
    assert transfers.stats.busy_s == pytest.approx(9 * CHUNK_S)

    clock.now = 2000.0  # time that the link lay idle is gone
    transfers.submit([D], [])
    collect(transfers, [D])
    assert clock.now == pytest.approx(2000 + 3 * CHUNK_S)
    assert transfers.stats.busy_s == pytest.approx(12 * CHUNK_S)


def test_waking_up_late_does_not_slow_the_link_down(bank, start, clock):
    """The next chunk is due by the link's own clock: the average rate is the paced one."""
    clock.late = 0.1 * CHUNK_S
    transfers = start(Link(bank), RATE)
    transfers.submit([], [A, B])
    collect(transfers, [A, B])
    assert clock.now == pytest.approx(1000 + 6 * CHUNK_S + clock.late)


def test_pacing_holds_from_the_first_chunk_on(bank, start, clock, monkeypatch):
    """Also if copies are queued before the link's thread first looks."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: None)
        transfers = start(Link(bank), RATE)
    transfers.submit([A], [])
    transfers._thread.start()
    collect(transfers, [A])
    assert clock.now == pytest.approx(1000 + 3 * CHUNK_S)


def test_a_link_slower_than_its_pace_makes_up_for_nothing(bank, start, clock):
    link = Link(bank)
    transfers = start(link, RATE)
    slow = link._end

    def end(size):
        if link.ended == 0:
            clock.now += 10  # the first chunk takes its time
        slow(size)

    link._end = end
    transfers.submit([], [A])  # prefetch chunks do not overlap
    collect(transfers, [A])
    assert clock.now == pytest.approx(1000 + 10 + 2 * CHUNK_S)


def test_a_paced_copy_takes_no_less_than_its_bytes_need(bank, start):
    """On the real clock; how much more it takes is the machine's affair."""
    began = time.perf_counter()
    link = Link(bank)
    transfers = start(link, 1_000_000)
    for round in range(2):
        transfers.submit([A, B], [C] if round else [])
        collect(transfers, [A, B, C] if round else [A, B])
        took = time.perf_counter() - began
        assert took >= link.moved / 1_000_000
    assert link.moved == 5 * EXPERT


def test_a_slow_pace_is_no_standstill(bank, start, monkeypatch):
    """A chunk is late only when it is past the time that the pace gives it."""
    monkeypatch.setattr(transfers_module, "STANDSTILL_S", 0.2)
    transfers = start(Link(bank), 2 * CHUNK)
    transfers.submit([A], [])
    began = time.perf_counter()
    collect(transfers, [A])
    assert time.perf_counter() - began >= 1.4


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_nobody_waits_for_the_pace_of_what_is_given_up(bank, start, end):
    """A chunk takes most of an hour; the copy itself is done."""
    link = Link(bank)
    transfers = start(link, 1)
    transfers.submit([A, B], [C])
    link.until_begun(2)
    in_time(getattr(transfers, end), transfers_module.GRACE_S)
    assert len(link.begun) == 2
    assert transfers.arrivals() == ({}, [])
