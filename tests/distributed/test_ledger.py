"""Shards, the ledger of a job, and places for engines: whatever is lost, each row is complete once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.distributed.ledger import Ledger
from layerscope_jax.distributed.placing import Node, engines_per_node, free_places, places
from layerscope_jax.distributed.shards import MOST_BATCHES, SHARES, shards_of
from layerscope_jax.support.errors import LostWorkers


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300), st.integers(1, 40), st.integers(1, 16))
def test_every_row_is_in_one_shard_beside_its_like(tokens, workers, slots):
    shards = shards_of(tokens, workers, slots)
    rows = [row for shard in shards for row in shard]
    assert sorted(rows) == list(range(len(tokens)))
    lengths = [tokens[row] for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(shard) <= MOST_BATCHES * slots for shard in shards)
    least = min(slots, -(-len(tokens) // workers))
    assert all(len(shard) >= least for shard in shards[:-1])
    share = sum(tokens) / workers / SHARES
    for shard in shards:  # no more than its share, but for the row that fills it and for a whole batch
        assert len(shard) <= least or sum(tokens[row] for row in shard[:-1]) < share


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 8))
def test_no_worker_goes_without_while_there_are_rows(rows, workers, slots):
    assert len(shards_of([7] * rows, workers, slots)) >= min(rows, workers) / 2


EVENTS = st.tuples(st.integers(0, 3), st.sampled_from(["note", "lose", "end", "late"]), st.integers(0, 9))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.lists(EVENTS, max_size=40))
def test_each_row_counts_once_whoever_is_lost(sizes, events):
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    shards = [tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    ledger, counted, former = Ledger(shards, retries=1000), [], []
    # After what happens to happen, each worker completes what it is given.
    calm = [(worker, "note", row) for row in range(5) for worker in range(4)] * (2 * sum(sizes))
    for worker, deed, pick in [*events, *calm]:
        if worker not in ledger.given:
            ledger.give(worker)
            continue
        rows = ledger.given[worker].rows
        left = [row for row in rows if row not in ledger.complete]
        if deed == "late":  # a lost worker goes on all the same
            assert not any(ledger.note(*of) for of in former)
        elif deed == "lose":
            former += [(f"{worker} before", row) for row in rows]
            assert ledger.lose(worker, "gone") == len(left)
        elif deed == "end" or not left:
            assert ledger.end(worker) == len(left)
        elif ledger.note(worker, rows[pick % len(rows)]):
            counted.append(rows[pick % len(rows)])
    assert sorted(counted) == list(range(sum(sizes)))
    assert (ledger.left, ledger.waiting) == (0, 0)


def test_rows_that_lose_every_worker_are_named():
    ledger = Ledger([(0, 1), (2, 3)], retries=2)
    ledger.give("first")
    ledger.note("first", 0)
    assert ledger.lose("first", "it had completed one") == 1  # which does not count against the others
    for worker in ("a", "b"):
        assert ledger.give(worker) == (1,)  # before what nobody has begun
        assert ledger.lose(worker, f"{worker} has ended") == 1
    ledger.give("c")
    with pytest.raises(
        LostWorkers, match=r"3 workers that had row 1 were lost: a has ended; b .*; c crashed"
    ):
        ledger.lose("c", "c crashed")
    assert ledger.left == 3


@given(st.integers(2, 256), st.data())
def test_a_row_of_which_every_worker_dies_is_found_and_the_others_complete(rows, data):
    deadly, retries = data.draw(st.integers(0, rows - 1)), 3
    ledger, lost = Ledger([tuple(range(rows))], retries), 0
    found = None
    while found is None:
        given = ledger.give("a")
        if deadly not in given:
            for row in given:
                ledger.note("a", row)
            ledger.end("a")
            continue
        lost += 1
        try:
            ledger.lose("a", "it has ended")
        except LostWorkers as error:
            found = error.row
    assert found == deadly
    assert lost <= 2 + rows.bit_length() + retries


def test_without_retries_the_first_loss_ends_a_job():
    ledger = Ledger([(0, 1, 2)], retries=0)
    ledger.give("a")
    ledger.note("a", 0)
    with pytest.raises(LostWorkers, match="1 worker that had row 1 was lost"):
        ledger.lose("a", "it has ended")


def test_a_worker_that_leaves_rows_out_is_found():
    ledger = Ledger([(0, 1)], retries=1)
    ledger.give("a")
    ledger.note("a", 1)
    assert (ledger.end("a"), ledger.left, ledger.give("a")) == (1, 1, (0,))


def test_engines_are_spread_and_a_lost_node_crowds_no_other():
    nodes = [Node(name, name, cpus=8) for name in "abc"]
    per_node = engines_per_node(nodes, 3)
    assert per_node == 1
    taken = {(place.node.id, place.number) for place in free_places(nodes, per_node, 3, set(), ())}
    assert taken == {("a", 0), ("b", 0), ("c", 0)}
    assert free_places(nodes[:2], per_node, 3, taken - {("c", 0)}, ()) == []
    back = free_places(nodes, per_node, 3, taken - {("c", 0)}, ())
    assert [place.node.name for place in back] == ["c"]
    assert free_places(nodes, per_node, 3, set(), {"a", "c"})[0].node.name == "b"


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 20)),
)
def test_as_many_places_as_workers(sizes, workers):
    nodes = [Node(str(number), str(number), cpus, gpus) for number, (cpus, gpus) in enumerate(sizes)]
    per_node = engines_per_node(nodes, workers)
    spots = places(nodes, per_node)
    assert len({(place.node.id, place.number) for place in spots}) == len(spots)
    accelerators = sum(node.gpus for node in nodes)
    begun = free_places(nodes, per_node, workers, set(), ())
    if workers is None:
        assert len(begun) == accelerators + sum(not node.gpus for node in nodes)
    elif any(not node.gpus for node in nodes):
        assert len(begun) == workers
    else:
        assert len(begun) == min(workers, accelerators)
