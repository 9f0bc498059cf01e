"""The crew on a virtual clock: workers end, hang, differ and refuse, and each row is written once."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.distributed.crew import Crew
from layerscope_jax.distributed.simulated import END, Fleet, VirtualCluster, VirtualRow, simulate
from layerscope_jax.distributed.simulated_rows import as_they_come, by_length, drawn_tokens, expected
from layerscope_jax.distributed.worker import Beat, Failure, Identity, Limits
from layerscope_jax.support.errors import LostWorkers

FLEET = Fleet(nodes=4, slots=2, step_s=1.0, beat_s=1.0, checkpoint_bytes=100, node_bytes_per_s=10.0)


def worked(cluster, shards, *, retries=1000, timeout_s=50.0, workers=None, **options):
    """Runs a crew on a cluster; returns the rows that it wrote, and what it said."""
    written, said = [], []
    crew = Crew(cluster, workers=workers, timeout_s=timeout_s, retries=retries, say=said.append, **options)
    with crew:
        rows = [VirtualRow(f"p.jsonl:{1 + number}") for number in range(sum(map(len, shards)))]
        crew.work(shards, rows, Limits(1, 2), lambda number, line, failed: written.append(number))
    return written, said, crew


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 6),
    st.sampled_from([15.0, 60.0, math.inf]),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 1000),
)
def test_each_row_is_written_once_whatever_happens(tokens, nodes, life, hangs, seed):
    fleet = replace(FLEET, nodes=nodes, mean_life_s=life, hang_rate=hangs, checkpoint_bytes=30)
    shards = by_length(fleet, tokens)
    cluster = VirtualCluster(fleet, tokens, seed)
    try:
        written, said, crew = worked(cluster, shards)
    except LostWorkers:
        pytest.fail("a thousand workers were lost")
    assert sorted(written) == list(range(len(tokens)))
    assert sum(worker.rows for worker in crew.all) == len(tokens)
    lost = [worker for worker in crew.all if worker.lost is not None]
    assert len(said) == len(lost)
    assert not cluster.computed < sum(tokens)
    if life == math.inf and not hangs:
        assert not lost


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.integers(1, 8),
    st.floats(0, 1),
    st.integers(1, 4),
)
def test_no_job_is_faster_than_ideal_and_none_later_than_grahams_bound(tokens, nodes, slow, slots):
    fleet = Fleet(
        nodes=nodes, slots=slots, step_s=1.0, beat_s=1.0, slow_share=slow, slow_factor=2.0,
        checkpoint_bytes=90, storage_bytes_per_s=30.0, node_bytes_per_s=30.0,
    )  # fmt: skip
    shards = by_length(fleet, tokens)
    outcome = simulate(fleet, tokens, shards)
    least = outcome.ideal
    assert outcome.makespan_s >= 90 / 30.0 + max(least.work_s, least.longest_s) - 1e-6
    # All nodes are busy until the last shard is given out; it may be with a slow node, alone in its slots.
    longest = max(sum(tokens[row] for row in shard) for shard in shards) * 2.0
    shard_s = max(sum(tokens[row] for row in shard) / slots + max(tokens) for shard in shards)
    busy = sum(sum(tokens[row] for row in shard) / slots + tokens[shard[0]] for shard in shards)
    beats = 2 * len(shards)
    assert outcome.makespan_s <= least.load_s + 2 * busy / nodes + 2 * shard_s + longest + beats
    assert (outcome.lost, outcome.lost_tokens) == (0, 0)
    assert outcome.read_bytes == pytest.approx(90 * min(nodes, len(shards)))


def test_long_rows_first_end_sooner_than_rows_as_they_come():
    fleet = Fleet(nodes=50, slots=8, step_s=0.1, beat_s=1.0, slow_share=0.1, slow_factor=2.0)
    tokens = drawn_tokens(50 * 160, 200, 0.8, 2000)
    plain = simulate(fleet, tokens, as_they_come(len(tokens), 50))
    by_true_length = simulate(fleet, tokens, by_length(fleet, tokens))
    by_guess = simulate(fleet, tokens, by_length(fleet, expected(tokens, 0.5)))
    assert by_true_length.efficiency > 1.3 * plain.efficiency
    assert by_guess.efficiency > 1.2 * plain.efficiency


class Scripted(VirtualCluster):
    """Each node's workers say what a script has for it."""

    def __init__(self, fleet, tokens, script):
        super().__init__(fleet, tokens)
        self.script = script

    def call(self, worker, method, *arguments):
        said = self.script(worker.place.node.name, method, *arguments)
        stream = super().call(worker, method, *arguments)
        if said is not None:
            self._loading.pop(worker, None)
            self._events = [event for event in self._events if event[2] is not stream]
            for item in said:
                self._say(stream, item)
        return stream


def test_a_worker_that_hangs_is_replaced_after_the_timeout():
    hung = []

    def script(node, method, *arguments):
        if method == "run" and not hung:
            hung.append([number for number, _ in arguments[0]])
            return [Beat(((hung[0][0], b"", False),), 5)]  # and nothing more, not even that it ended
        return None

    cluster = Scripted(replace(FLEET, nodes=4), [5] * 16, script)
    shards = [tuple(range(start, start + 4)) for start in range(0, 16, 4)]
    written, said, crew = worked(cluster, shards, timeout_s=30.0, retries=1)
    assert sorted(written) == list(range(16))
    assert said == [
        "worker 0 on node node0 was lost (no new token for 30 s); 3 rows that it had go to another"
    ]
    assert [worker.rows for worker in crew.all if worker.lost is not None] == [1]


SAME = {"checkpoint": "1b06", "experts": "int4"}


def identities(**of):
    """A script in which each node's workers have an identity."""

    def script(node, method, *_):
        return [of.get(node, Identity(SAME, "znver4", 1)), END] if method == "start" else None

    return script


def test_workers_that_run_another_model_are_named():
    other = Identity({"checkpoint": "77aa", "experts": "int8"}, "znver4", 1)
    cluster = Scripted(replace(FLEET, nodes=3), [1] * 6, identities(node2=other))
    with pytest.raises(
        ValueError,
        match="node2 runs another model than node node0: checkpoint 77aa, not 1b06; experts int8, not int4",
    ):
        worked(cluster, [(0, 1), (2, 3), (4, 5)])


def test_workers_that_compute_otherwise_are_named_and_refused_only_where_tokens_are_to_be_exact():
    other = Identity(SAME, "sapphirerapids", 1)
    cluster = Scripted(replace(FLEET, nodes=2), [1] * 4, identities(node1=other))
    written, said, _ = worked(cluster, [(0, 1), (2, 3)])
    assert (sorted(written), len(said)) == ([0, 1, 2, 3], 1)
    assert said[0].startswith("node node1 computes by sapphirerapids, node node0 by znver4")
    cluster = Scripted(replace(FLEET, nodes=2), [1] * 4, identities(node1=other))
    with pytest.raises(ValueError, match="numerics='exact' holds where all compute alike"):
        worked(cluster, [(0, 1), (2, 3)], exact=True)


def test_what_a_worker_refuses_ends_the_job_with_the_nodes_name():
    def script(node, method, *_):
        if method == "start" and node == "node1":
            return [Failure("expected as much memory as the profile 'x' says", is_refusal=True)]
        return None

    with pytest.raises(ValueError, match=r"node node1: expected as much memory as the profile 'x' says"):
        worked(Scripted(replace(FLEET, nodes=2), [9] * 4, script), [(0, 1), (2, 3)])


def test_a_node_on_which_no_worker_starts_is_left_out():
    def script(node, method, *_):
        return [Failure("out of memory")] if (node, method) == ("node1", "start") else None

    cluster = Scripted(replace(FLEET, nodes=2), [9] * 8, script)
    written, said, crew = worked(cluster, [(0, 1), (2, 3), (4, 5), (6, 7)], retries=2)
    assert sorted(written) == list(range(8))
    assert 1 <= len([worker for worker in crew.all if worker.lost]) <= 3
    assert said[0] == "worker 0 on node node1 was lost (out of memory)"


def test_people_hear_of_a_worker_that_does_not_load_and_it_is_given_up_in_time():
    def script(node, method, *_):
        return [] if (node, method) == ("node1", "start") else None

    cluster = Scripted(replace(FLEET, nodes=2), [150] * 8, script)
    written, said, crew = worked(
        cluster, [(0, 1), (2, 3), (4, 5), (6, 7)], timeout_s=500.0, start_timeout_s=200.0
    )
    assert sorted(written) == list(range(8))
    assert said[0].startswith(
        "worker 0 on node node1 has not loaded the model for 120 s: it may still read it"
    )
    assert said[1] == "worker 0 on node node1 was lost (no model loaded for 200 s)"
    assert len([worker for worker in crew.all if worker.place.node.name == "node1"]) >= 2


def test_a_cluster_on_which_no_worker_starts_ends_the_job():
    cluster = Scripted(replace(FLEET, nodes=2), [9] * 4, lambda *_: [Failure("disk error")])
    with pytest.raises(LostWorkers, match=r"3 workers were lost: node node\d: disk error; .*"):
        worked(cluster, [(0, 1), (2, 3)], retries=1)


def test_rows_that_every_worker_dies_of_are_named():
    def script(node, method, *arguments):
        if method == "run" and any(number == 2 for number, _ in arguments[0]):
            return [Failure("XlaRuntimeError: INTERNAL")]
        return None

    cluster = Scripted(replace(FLEET, nodes=3), [1] * 4, script)
    with pytest.raises(LostWorkers, match=r"3 workers that had p.jsonl:3 were lost: node node\d: XlaRuntime"):
        worked(cluster, [(0, 1), (2, 3)], retries=1)


def test_a_worker_that_leaves_rows_out_gets_them_again():
    calls = []

    def script(node, method, *arguments):
        if method == "run":
            calls.append([number for number, _ in arguments[0]])
        return [Beat(((0, b"", False),), 1), END] if calls == [[0, 1]] else None

    written, said, _ = worked(Scripted(replace(FLEET, nodes=1), [1, 1], script), [(0, 1)])
    assert (calls, written) == ([[0, 1], [1]], [0, 1])
    assert said == ["worker 0 on node node0 left rows out, which are given out again"]
