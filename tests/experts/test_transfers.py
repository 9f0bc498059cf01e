"""The link: demand first, a matrix at a time, never the wrong weights, never lost, never a hang."""

import gc
import threading
import time
import weakref
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from helpers import TINY, in_time
from hypothesis import given, settings
from hypothesis import strategies as st
from links import CHUNK, EXPERT, NAMES, A, B, C, D, Link, collect, random_bank, right

from layerscope_jax import ExpertId, TransferError
from layerscope_jax.experts import transfers as transfers_module
from layerscope_jax.experts.transfers import ATTEMPTS, MATRICES, Transfers


def test_copies_are_real(bank):
    transfers = Transfers(bank, jax.devices()[0])
    transfers.submit([A, D], [B])
    arrived = collect(transfers, [A, B, D])
    assert arrived.keys() == {A, B, D}
    assert right(bank, arrived)
    for expert, weights in arrived.items():
        for found, source in zip(weights, bank[expert], strict=True):
            assert found.sharding.memory_kind == "device"
            assert found.device == jax.devices()[0]
            assert found.unsafe_buffer_pointer() != source.unsafe_buffer_pointer()
    assert transfers.stats.demand_bytes == 2 * EXPERT
    assert transfers.stats.prefetch_bytes == EXPERT
    assert transfers.stats.busy_s > 0
    assert transfers.arrivals() == ({}, [])
    in_time(transfers.close)
    in_time(transfers.close)  # once more does no harm


def test_a_matrix_is_a_chunk_and_experts_come_in_the_order_asked_for(bank, start):
    link = Link(bank)
    transfers = start(link)
    transfers.submit([C, A], [D, B])
    collect(transfers, [A, B, C, D])
    assert link.begun == [(expert, name) for expert in (C, A, D, B) for name in NAMES]
    assert link.moved == transfers.stats.demand_bytes + transfers.stats.prefetch_bytes == 4 * EXPERT


def test_a_demand_waits_for_at_most_one_chunk_of_a_prefetch(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([], [A, B])
    link.until_begun(1)
    transfers.submit([C, D], [])  # while the first chunk of A is on the link
    link.allow(100)
    collect(transfers, [A, B, C, D])
    assert link.order == [A, C, D, A, B]
    assert link.begun[:2] == [(A, "gate"), (C, "gate")]
    assert link.begun[7] == (A, "up")  # A goes on where it stopped


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5, 6])
def test_wherever_it_comes_in_between(bank, start, chunks):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([], [A, B])
    link.allow(chunks - 1)
    link.until_begun(chunks)
    transfers.submit([C], [])
    link.allow(100)
    collect(transfers, [A, B, C])
    assert link.begun[chunks : chunks + 3] == [(C, name) for name in NAMES]
    rest = [chunk for chunk in link.begun if chunk[0] != C]
    assert rest == [(expert, name) for expert in (A, B) for name in NAMES]


def test_prefetches_have_the_link_to_themselves_and_demands_overlap_by_one(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([A, B], [C, D])
    link.until_begun(2)  # the second chunk begins though the first has not ended
    link.allow(100)
    collect(transfers, [A, B, C, D])
    assert max(link.beside[:6]) == 1
    assert link.beside[6:] == [0] * 6


def test_queued_prefetches_that_are_needed_now_are_moved_ahead(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([], [A, B, C])
    link.until_begun(1)
    transfers.submit([C, D, B], [])  # in this order
    link.allow(100)
    collect(transfers, [A, B, C, D])
    assert link.order == [A, C, D, B, A]
    assert len(link.begun) == 12  # no matrix is copied twice
    assert (transfers.stats.demand_bytes, transfers.stats.prefetch_bytes) == (3 * EXPERT, EXPERT)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_prefetch_that_has_begun_and_is_needed_now_goes_on_as_a_demand(bank, start, chunks):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([], [A, B])
    link.allow(chunks - 1)
    link.until_begun(chunks)
    transfers.submit([A, C], [])
    link.allow(100)
    assert right(bank, collect(transfers, [A, B, C]))
    assert link.begun == [(expert, name) for expert in (A, C, B) for name in NAMES]
    assert transfers.stats.prefetch_bytes == EXPERT + (chunks - 1) * CHUNK
    assert link.moved == transfers.stats.demand_bytes + transfers.stats.prefetch_bytes


def test_one_that_has_arrived_is_not_copied_again(bank, start):
    link = Link(bank)
    transfers = start(link)
    transfers.submit([], [A])
    in_time(transfers.rest)
    transfers.submit([A], [])
    assert collect(transfers, [A]).keys() == {A}
    in_time(transfers.rest)
    assert len(link.begun) == MATRICES


def test_stale_prefetches_are_dropped_unless_begun(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([], [A, B, C, D])
    link.until_begun(1)
    assert transfers.drop(lambda expert: expert in {A, B, D}) == [B, D]
    assert transfers.drop(lambda expert: expert == B) == []
    transfers.submit([], [B])  # may be queued again
    link.allow(100)
    collect(transfers, [A, B, C])
    in_time(transfers.rest)
    assert link.order == [A, C, B]
    assert transfers.stats.dropped == 2


def test_demands_are_never_dropped(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([A, B], [C])
    link.until_begun(1)
    transfers.submit([C], [])
    assert transfers.drop(lambda expert: True) == []
    link.allow(100)
    collect(transfers, [A, B, C])


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


def test_one_may_wait_for_several(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.submit([A, B, C], [])
    came = []

    def wait():
        transfers.wait([A, B, C], 2)
        came.append(transfers.arrivals()[0].keys())

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    link.allow(MATRICES)
    link.until_begun(MATRICES + 2)  # then A has arrived
    link.allow(MATRICES)
    waiter.join(60)
    assert came == [{A, B}]
    link.allow(100)
    collect(transfers, [C])


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


@pytest.mark.parametrize(
    "nowhere", [ExpertId(TINY.num_layers, 0), ExpertId(0, TINY.num_experts), ExpertId(-1, 0)]
)
def test_an_expert_that_does_not_exist_is_refused_at_once(bank, start, nowhere):
    transfers = start(Link(bank))
    for load, prefetch in (([A, nowhere], [B]), ([A], [B, nowhere])):
        with pytest.raises(ValueError, match="no experts"):
            transfers.submit(load, prefetch)
    in_time(transfers.rest)
    assert transfers.arrivals() == ({}, [])
    transfers.submit([A], [])
    assert collect(transfers, [A]).keys() == {A}


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
    assert within(60, lambda: not transfers._begun)
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


EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(4)]
KINDS = ["start", "end"]


@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from(EXPERTS), max_size=4),  # needed now
            st.lists(st.sampled_from(EXPERTS), max_size=4, unique=True),  # prefetched
            st.sets(st.sampled_from(EXPERTS), max_size=8),  # leave the device
            st.sets(st.sampled_from(EXPERTS), max_size=8),  # stale
            st.booleans(),  # whether this one looks what has arrived before it waits
        ),
        max_size=8,
    ),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.2, 0.5]),
)
@settings(deadline=None, max_examples=80)
def test_whatever_is_asked_for_in_whatever_order_and_fails(layers, seed, rate):
    """An engine's way with the link, with copies that fail at random: the books always come out even."""
    rng = np.random.default_rng(seed)
    link = Link(
        random_bank(), failing=lambda *_: rng.choice(["start", "end"]) if rng.random() < rate else None
    )
    transfers = Transfers(random_bank(), jax.devices()[0], None, link)
    resident, coming = set(), set()

    def absorb():
        arrived, lost = transfers.arrivals()
        assert right(random_bank(), arrived)
        assert arrived.keys() | set(lost) <= coming
        assert not arrived.keys() & set(lost)
        coming.difference_update(arrived, lost)
        resident.update(arrived)
        return lost

    def run():
        for needed, ahead, leaving, stale, looks in layers:
            if looks:
                absorb()
            dropped = transfers.drop(lambda e, stale=stale - needed: e in stale)
            assert set(dropped) <= coming & stale - needed
            coming.difference_update(dropped)
            resident.difference_update(leaving - needed)
            load = [e for e in needed if e not in resident]
            ahead = [e for e in ahead if e not in resident and e not in coming and e not in load]
            coming.update(load, ahead)
            transfers.submit(load, ahead)
            try:
                while not needed <= resident:
                    missing = [e for e in load if e not in resident]
                    transfers.wait(missing, min(len(missing), 1 + 2 * looks))
                    assert not set(absorb()) & needed
            except TransferError:
                # Then some wanted chunk failed as often as it may.
                assert any(link.attempts[e, name] >= ATTEMPTS for e in load for name in NAMES)
                transfers.cancel()
                absorb()
                coming.clear()
        transfers.rest()
        absorb()
        assert not coming

    try:
        in_time(run)
    finally:
        in_time(transfers.close)
    stats = transfers.stats
    assert stats.demand_bytes + stats.prefetch_bytes <= link.moved
    if rate == 0:
        assert stats.demand_bytes + stats.prefetch_bytes == link.moved
        assert stats.retries == stats.failed_prefetches == 0
    assert all(beside <= 1 for beside in link.beside)
