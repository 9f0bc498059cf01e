"""Copies that fail: tried again, and an error for who needs them, never the wrong weights, never a hang."""

import pytest
from helpers import in_time
from links import EXPERT, MATRICES, NAMES, A, B, C, Link, collect, right

from layerscope_jax import TransferError
from layerscope_jax.offload import link as transfers_module
from layerscope_jax.offload.link import ATTEMPTS


@pytest.mark.parametrize("how", ["start", "end"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_that_fails_at_first_is_tried_again(bank, start, name, times, how):
    link = Link(bank, failing=lambda e, n, attempt: how if (e, n) == (A, name) and attempt <= times else None)
    transfers = start(link)
    transfers.submit([A, B], [])
    assert right(bank, collect(transfers, [A, B]))
    assert transfers.stats.retries == times
    assert transfers.stats.demand_bytes == link.moved == 2 * EXPERT
    assert link.attempts == {(e, n): 1 + times * ((e, n) == (A, name)) for e in (A, B) for n in NAMES}


@pytest.mark.parametrize("how", ["start", "end"])
@pytest.mark.parametrize("name", NAMES)
def test_a_demand_that_fails_for_good_is_an_error_for_who_waits_for_it(bank, start, name, how):
    broken = True
    link = Link(bank, failing=lambda e, n, attempt: how if broken and (e, n) == (C, name) else None)
    transfers = start(link)
    transfers.submit([C, A], [])
    arrived = {}
    with pytest.raises(TransferError, match="expert 5 of layer 1 to the device failed 3 times: injected"):
        collect(transfers, [C], arrived)
    assert link.attempts[C, name] == ATTEMPTS
    assert right(bank, collect(transfers, [A], arrived))  # another one is not concerned
    assert arrived.keys() == {A}
    in_time(transfers.rest)
    assert transfers.arrivals() == ({}, [C])  # C is where it was

    broken = False
    transfers.submit([C], [])
    assert right(bank, collect(transfers, [C]))


def test_a_failed_demand_does_not_hide_what_has_arrived(bank, start):
    """Whoever waits gets what there is first, and hears of the failure when nothing is left to do."""
    link = Link(bank, failing=lambda e, n, attempt: "start" if e == C else None)
    transfers = start(link)
    transfers.submit([A, C], [])
    link.until_begun(MATRICES + ATTEMPTS)
    in_time(lambda: transfers.wait([A, C]))
    arrived, _ = transfers.arrivals()
    assert arrived.keys() == {A}
    with pytest.raises(TransferError, match="layer 1"):
        in_time(lambda: transfers.wait([C]))


@pytest.mark.parametrize("failing", [A, B, C])
def test_who_waits_for_several_hears_of_a_failure(bank, start, failing):
    transfers = start(Link(bank, failing=lambda e, n, attempt: "end" if e == failing else None))
    transfers.submit([A, B, C], [])
    with pytest.raises(TransferError, match=f"expert {failing.expert} of layer {failing.layer}"):
        in_time(lambda: transfers.wait([A, B, C], 3))
    in_time(transfers.rest)
    arrived, lost = transfers.arrivals()
    assert arrived.keys() == {A, B, C} - {failing}
    assert lost == [failing]


@pytest.mark.parametrize("how", ["start", "end"])
def test_a_prefetch_that_fails_for_good_harms_nobody(bank, start, how):
    link = Link(bank, failing=lambda e, n, attempt: how if (e, n) == (A, "up") else None)
    transfers = start(link)
    transfers.submit([], [A, B])
    lost = []
    assert right(bank, collect(transfers, [B], lost=lost))
    assert lost == [A]
    assert transfers.arrivals() == ({}, [])  # said once
    assert transfers.stats.failed_prefetches == 1
    assert (A, "down") not in link.begun


def test_a_prefetch_that_failed_unnoticed_is_copied_anew_when_needed(bank, start):
    link = Link(bank, failing=lambda e, n, attempt: "end" if n == "up" and attempt <= ATTEMPTS else None)
    transfers = start(link)
    transfers.submit([], [A])
    in_time(transfers.rest)
    transfers.submit([A], [])
    assert right(bank, collect(transfers, [A]))
    assert transfers.arrivals() == ({}, [])


def test_a_prefetch_that_fails_after_it_was_demanded_is_an_error(bank, start):
    link = Link(bank, gated=True, failing=lambda e, n, attempt: "end")
    transfers = start(link)
    transfers.submit([], [A])
    link.until_begun(1)
    transfers.submit([A], [])
    link.allow(100)
    with pytest.raises(TransferError, match="layer 0"):
        collect(transfers, [A])


@pytest.mark.parametrize("call", ["wait", "rest", "cancel", "close"])
def test_a_copy_that_never_ends_holds_nobody_up_for_ever(bank, start, call, monkeypatch):
    monkeypatch.setattr(transfers_module, "STANDSTILL_S", 0.2)
    monkeypatch.setattr(transfers_module, "GRACE_S", 0.2)
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([A], [B])
    link.until_begun(2)
    if call == "close":
        in_time(transfers.close, 10)
        assert transfers._thread.daemon  # nor does the interpreter wait for it
        return
    with pytest.raises(TransferError, match=r"the link to the device stands still: .* for 0\.2 s"):
        in_time(lambda: transfers.wait([A]) if call == "wait" else getattr(transfers, call)(), 10)
    monkeypatch.undo()
    link.allow(100)  # it ends after all
    if call == "cancel":
        in_time(transfers.cancel)
        assert transfers.arrivals() == ({}, [])
        transfers.submit([A], [B])
    assert right(bank, collect(transfers, [A, B]))
