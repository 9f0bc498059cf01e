"""The link: demand first, a matrix at a time, each expert once."""

import threading

import jax
import pytest
from helpers import TINY, in_time
from links import CHUNK, EXPERT, MATRICES, NAMES, A, B, C, D, Link, collect, right

from layerscope_jax import ExpertId
from layerscope_jax.offload.link import Transfers


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


def test_demands_are_given_to_an_unpaced_link_several_at_a_time_and_prefetches_one_by_one(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.ahead = 4 * CHUNK
    transfers.submit([A, B], [C])
    link.until_begun(4)
    link.allow(100)
    collect(transfers, [A, B, C])
    assert max(link.beside[:6]) == 3
    assert link.beside[6:] == [0] * 3


def test_an_accelerator_is_given_several_chunks_ahead_and_a_demand_waits_for_those_alone(bank, start):
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.ahead = transfers.prefetch_ahead = 4 * CHUNK
    transfers.submit([], [A, B])
    link.until_begun(4)  # though none has ended
    transfers.submit([C], [])
    link.allow(100)
    collect(transfers, [A, B, C])
    assert link.begun[:4] == [(A, "gate"), (A, "up"), (A, "down"), (B, "gate")]
    assert link.begun[4:] == [*((C, name) for name in NAMES), (B, "up"), (B, "down")]
    assert max(link.beside) == 3


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


def test_only_so_many_experts_are_beside_their_slots(bank, start):
    """On the link, or arrived and not taken: the next begins when one is taken."""
    link = Link(bank)
    transfers = start(link)
    transfers.most_staged = 2
    transfers.submit([A, B], [C, D])
    for taken in ({A, B}, {C, D}):
        in_time(lambda: transfers.wait([], 2))
        assert transfers.queue.staged == 2
        assert len(link.begun) == (2 if A in taken else 4) * MATRICES
        assert transfers.arrivals()[0].keys() == taken


def test_a_demand_is_not_kept_back_for_ever_by_what_is_beside(bank, start):
    """A prefetch that has begun goes on, arrives and is taken, although a demand waits for its place."""
    link = Link(bank, gated=True)
    transfers = start(link)
    transfers.most_staged = 2
    transfers.submit([], [A, B])
    link.until_begun(1)  # of A
    transfers.submit([C, D], [])
    link.allow(100)
    arrived = set()
    while D not in arrived:
        in_time(lambda: transfers.wait([D], 1))
        arrived |= transfers.arrivals()[0].keys()
    assert C in arrived
