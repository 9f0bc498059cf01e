"""Giving up what was asked for: cancelled, closed or interrupted, nobody waits and nothing stays behind."""

import gc
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
from helpers import in_time
from links import MATRICES, NAMES, A, B, C, D, Link, collect, right

from layerscope_jax import TransferError


def test_closing_wakes_who_waits(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([A, B], [C])
    link.until_begun(2)
    waiting = threading.Event()
    outcome = []

    def wait():
        waiting.set()
        try:
            transfers.wait([A])
        except TransferError as error:
            outcome.append(str(error))

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert waiting.wait(60)
    closer = threading.Thread(target=transfers.close, daemon=True)
    closer.start()
    waiter.join(60)  # before any chunk has ended
    assert outcome == ["the transfer engine was closed while a layer waited for an expert"]
    link.allow(100)
    closer.join(60)
    assert not closer.is_alive()
    assert len(link.begun) == 2  # what was queued is not begun any more
    with pytest.raises(TransferError, match="closed"):
        in_time(lambda: transfers.wait([B]))
    in_time(transfers.rest)


def test_cancelling_gives_up_demands_too_and_waits_for_the_chunks_on_the_link_alone(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([A, B], [C, D])
    link.until_begun(2)
    canceller = threading.Thread(target=transfers.cancel, daemon=True)
    canceller.start()
    canceller.join(0.1)
    assert canceller.is_alive()  # their memory is in use
    link.allow(1)
    canceller.join(0.1)
    assert canceller.is_alive()
    link.allow(1)
    canceller.join(60)
    assert not canceller.is_alive()
    assert len(link.begun) == link.ended == 2
    assert transfers.arrivals() == ({}, [])
    link.allow(100)
    in_time(transfers.rest)
    assert transfers.arrivals() == ({}, [])
    transfers.submit([B, A], [C])  # from the start
    assert right(bank, collect(transfers, [A, B, C]))
    assert link.begun[2:] == [(expert, name) for expert in (B, A, C) for name in NAMES]


@contextmanager
def cancelling(transfers):
    """Cancels at the beginning, and is through at the end."""
    canceller = threading.Thread(target=transfers.cancel, daemon=True)
    canceller.start()
    assert within(60, lambda: not transfers.queue.begun)
    yield
    canceller.join(60)
    assert not canceller.is_alive()


def test_cancelling_keeps_what_has_arrived(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([A, B], [])
    link.allow(MATRICES)
    link.until_begun(MATRICES + 2)
    with cancelling(transfers):
        link.allow(2)
    arrived, lost = transfers.arrivals()
    assert right(bank, arrived)
    assert arrived.keys() == {A}
    assert lost == []


def test_what_was_cancelled_leaves_nothing_on_the_device(bank, start):
    """Neither do chunks that were across already."""
    link, copied = Link(bank, gated=True), []

    def copy(array, sharding):
        chunk = link(array, sharding)
        copied.append(weakref.ref(chunk.array))
        return chunk

    copy.permits, copy.allow = link.permits, link.allow
    transfers = start(copy)
    transfers.submit([A], [])
    link.allow(1)
    link.until_begun(MATRICES)
    with cancelling(transfers):
        link.allow(2)
    assert len(copied) == MATRICES
    assert within(60, lambda: gc.collect() >= 0 and not any(array() is not None for array in copied))


def within(seconds, true):
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def test_what_was_cancelled_is_not_tried_again(bank, start):
    link = Link(bank, gated=True, failing=lambda e, n, attempt: "end" if link.ended < 2 else None)
    transfers = start(link)
    transfers.submit([A, B], [])
    link.until_begun(2)
    with cancelling(transfers):
        link.allow(2)
    assert len(link.begun) == 2
    assert transfers.arrivals() == ({}, [])
    link.allow(100)
    transfers.submit([A], [])
    assert right(bank, collect(transfers, [A]))


def test_failures_are_forgotten_when_all_is_cancelled(bank, start):
    broken = True
    link = Link(bank, failing=lambda e, n, attempt: "start" if broken else None)
    transfers = start(link)
    transfers.submit([A], [])
    with pytest.raises(TransferError):
        in_time(lambda: transfers.wait([A]))
    in_time(transfers.cancel)
    assert transfers.arrivals() == ({}, [])
    broken = False
    transfers.submit([A], [])
    assert right(bank, collect(transfers, [A]))


@pytest.mark.parametrize("end", ["cancel", "rest"])
def test_an_interrupt_inside_submit_hangs_nobody(bank, start, end, monkeypatch):
    """Between queueing and telling the link: the queue is full and the link asleep."""
    transfers = start(Link(bank))

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfers._changed, "notify_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transfers.submit([A], [B])
    in_time(getattr(transfers, end))
    arrived, lost = transfers.arrivals()
    assert lost == []
    assert arrived.keys() == (set() if end == "cancel" else {A, B})
    transfers.submit([C], [])
    assert right(bank, collect(transfers, [C]))
