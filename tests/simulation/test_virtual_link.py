"""The link on a virtual clock, by hand: an expert takes 3 ms, a chunk 1 ms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax import ExpertId
from layerscope_jax.simulation.virtual_link import Link

A, B, C, D = (ExpertId(layer, 0) for layer in range(4))
ALL = {A, B, C, D}


def arrivals(link, until=100.0):
    """When each expert on the link comes, if nothing else is asked for."""
    found, now = {}, 0.0
    while link._left or link._arrived:
        now = max(now, link.next_arrival(ALL))
        assert now <= until
        found |= dict.fromkeys(link.arrivals(now), now)
    return found


def test_copies_follow_one_another():
    link = Link(3.0, chunks=3)
    link.submit([A], [C], now=2.0)
    link.submit([B], [D], now=2.0)
    # The first chunk of A had begun, and nothing of C: B is next.
    assert arrivals(link) == {A: 5.0, B: 8.0, C: 11.0, D: 14.0}
    assert (link.demanded, link.prefetched) == (6, 6)


def test_a_demand_overtakes_a_prefetch_at_the_next_chunk():
    link = Link(3.0, chunks=3)
    link.submit([], [C], now=0.0)
    link.submit([A], [], now=1.5)  # the second chunk of C began at 1 and ends at 2
    assert arrivals(link) == {A: 5.0, C: 6.0}


def test_of_two_things_at_one_time_the_link_is_first():
    link = Link(3.0, chunks=3)
    link.submit([], [C], now=0.0)
    link.submit([A], [], now=1.0)
    assert arrivals(link) == {A: 5.0, C: 6.0}


def test_a_prefetch_that_is_needed_goes_ahead_of_the_others():
    link = Link(3.0, chunks=3)
    link.submit([], [C, D, B], now=0.0)
    link.submit([D], [], now=0.5)
    link.submit([D, C], [], now=0.5)  # asked for again: nothing is sent twice
    assert arrivals(link) == {D: 4.0, C: 6.0, B: 9.0}
    # One chunk of C was sent before anybody needed it.
    assert (link.demanded, link.prefetched) == (5, 4)


def test_a_demand_for_what_is_on_the_link_waits_for_its_last_chunk():
    link = Link(3.0, chunks=3)
    link.submit([], [C, D], now=0.0)
    link.submit([C], [], now=2.5)
    assert link.next_arrival({C}) == 3.0
    assert link.arrivals(2.9) == []
    assert link.arrivals(3.0) == [C]
    assert link.arrivals(3.0) == []
    assert link.next_arrival({D}) == 6.0
    assert (link.demanded, link.prefetched) == (0, 6)


def test_only_prefetches_that_have_not_begun_are_dropped():
    link = Link(3.0, chunks=3)
    link.submit([A], [B, C, D], now=0.0)
    assert link.drop(lambda expert: expert != D, now=3.5) == [C]  # A is there, B has begun
    assert link.drop(lambda expert: True, now=3.5) == [D]
    assert arrivals(link) == {A: 3.0, B: 6.0}


def test_an_idle_link_saves_up_nothing():
    link = Link(3.0, chunks=3)
    link.submit([A], [], now=1.0)
    assert link.arrivals(50.0) == [A]
    link.submit([], [B], now=50.0)
    assert link.next_arrival({B}) == 53.0
    link.submit([], [C], now=52.5)  # behind the last chunk of B
    assert link.next_arrival({C}) == 56.0


def test_dropping_all_that_waits_leaves_the_chunk_on_the_link():
    link = Link(3.0, chunks=3)
    link.submit([], [A, B], now=0.0)
    assert link.drop(lambda expert: True, now=2.5) == [B]
    link.submit([], [C], now=2.5)
    assert arrivals(link) == {A: 3.0, C: 6.0}


def test_busy_time_is_told_apart_to_the_chunk():
    link = Link(3.0, chunks=3)
    link.submit([A], [], now=1.0)
    assert link.busy_ms(2.5) == 1.5
    link.reset(2.5)
    assert (link.busy_ms(2.5), link.demanded) == (0.0, 0)
    assert link.busy_ms(3.25) == 0.75
    assert link.busy_ms(9.0) == 1.5
    assert link.demanded == 1  # the second had begun before


def test_waiting_for_what_nobody_sends_is_refused():
    link = Link(3.0, chunks=3)
    link.submit([], [A], now=0.0)
    with pytest.raises(RuntimeError, match="is on its way"):
        link.next_arrival({B, C})
    assert link.next_arrival({A, B}) == 3.0


def test_a_link_that_takes_no_time():
    link = Link(0.0, chunks=3)
    link.submit([A], [B], now=1.0)
    assert link.next_arrival({B}) == 1.0
    assert sorted(link.arrivals(1.0)) == [A, B]


KINDS = st.sampled_from(["load", "prefetch", "drop", "take"])


@given(st.lists(st.tuples(KINDS, st.integers(0, 3), st.integers(0, 8)), max_size=30))
def test_nothing_is_lost_or_sent_twice(events):
    link, now, coming, came = Link(3.0, chunks=3), 0.0, set(), []
    for what, number, wait in events:
        expert = ExpertId(number, 0)
        now += wait / 4
        if what == "load":
            link.submit([expert], [], now)
            coming.add(expert)
        elif what == "prefetch" and expert not in coming:
            link.submit([], [expert], now)
            coming.add(expert)
        elif what == "drop":
            coming -= set(link.drop(lambda e, expert=expert: e == expert, now))
        elif what == "take":
            found = link.arrivals(now)
            assert set(found) <= coming
            coming -= set(found)
            came += found
    while coming:
        arrival = link.next_arrival(coming)
        now = max(now, arrival)
        found = link.arrivals(now)
        assert found
        coming -= set(found)
        came += found
    assert link.demanded + link.prefetched == 3 * len(came)
    assert link.busy_ms(now) == pytest.approx(3.0 * len(came))


@given(
    prefetches=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 3)), max_size=5),
    when=st.floats(0, 20),
    loads=st.integers(1, 3),
)
def test_prefetches_hold_a_layers_loads_up_by_one_chunk_at_most(prefetches, when, loads):
    """So a layer ends no later than with the same plan and no prefetches, plus one chunk."""
    busy, idle = Link(3.0, chunks=3), Link(3.0, chunks=3)
    number = 0
    for begun, count in sorted(prefetches):
        if begun <= when:
            busy.submit([], [ExpertId(1, number + index) for index in range(count)], now=begun)
            number += count
    wanted = [ExpertId(0, expert) for expert in range(loads)]
    for link in (busy, idle):
        link.submit(wanted, [], now=when)
    for expert in wanted:
        assert busy.next_arrival([expert]) <= idle.next_arrival([expert]) + 1.0 + 1e-9
