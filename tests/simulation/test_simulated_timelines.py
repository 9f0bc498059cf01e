"""Timelines of simulated runs: as those of an engine, from the virtual clock."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import SEEDS, geometry, random_costs, random_demand
from recorded import small_profile, small_routing

from layerscope_jax import POLICIES, simulate_profile
from layerscope_jax.runtime.timeline import Timeline
from layerscope_jax.runtime.timeline_figures import figures_of, lane_and_kind
from layerscope_jax.runtime.timeline_files import read_timeline
from layerscope_jax.scheduling.presched import PreSched
from layerscope_jax.simulation import comparison
from layerscope_jax.simulation.simulator import Workload, simulate

LANES = ("device", "host", "link", "disk")


def busy_s(timeline, lane):
    return sum(span.end - span.begin for span in timeline if span.lane == lane)


@given(seed=SEEDS, policy=st.sampled_from(["lru", "fiddler", "fate", "presched"]), on_disk=st.booleans())
@settings(deadline=None, max_examples=30)
def test_lanes_add_up_and_change_nothing(seed, policy, on_disk):
    """Copies and reads that the end cuts off are drawn whole; the statistics count them until then."""
    rng = np.random.default_rng(seed)
    shape = (3, int(rng.integers(1, 4)), int(rng.integers(2, 6)))
    counts = random_demand(rng, shape)
    workload = Workload(phase="decode", tokens=8, counts=counts)
    costs = replace(random_costs(rng), read_ms=0.7, read_start_ms=0.1)
    total = shape[1] * shape[2]
    made = geometry(shape, int(rng.integers(shape[2], total + 1)))
    host_slots = total // 2 + 1 if on_disk else None

    def go(timeline=None):
        policies = {**POLICIES, PreSched.name: PreSched}
        return simulate(
            policies[policy](), [workload], made, costs, host_slots=host_slots, timeline=timeline
        )[0]

    timeline = Timeline()
    result = go(timeline)
    assert result == go()
    spans = list(timeline)
    for lane in ("device", "host"):
        busy = busy_s(spans, lane)
        assert busy == pytest.approx(getattr(result, f"{lane}_share") * result.total_s, rel=1e-6, abs=1e-9)
    link = sum(max(0.0, min(s.end, result.total_s) - s.begin) for s in spans if s.lane == "link")
    assert link == pytest.approx(result.link_share * result.total_s, rel=1e-6, abs=1e-9)
    assert sum(s.what.bytes for s in spans if s.lane == "disk") == result.bytes_read
    layers = [span for span in spans if span.kind == "layer"]
    assert sum(s.end - s.begin for s in layers) == pytest.approx(result.total_s)
    assert [(s.step, s.layer) for s in layers] == [(s, layer) for s in range(3) for layer in range(shape[1])]
    hits = sum(len(span.what.hits) for span in layers)
    assert hits / np.count_nonzero(counts) == pytest.approx(result.hit_rate)


def test_a_comparison_writes_a_process_for_each_run(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "lower_bound_ms", lambda *of, **more: 0.0)  # compiles, and is not drawn
    path = tmp_path / "runs.json"
    compared = simulate_profile(
        small_profile(), small_routing(), batches=[2, 4], policies=["lru", "presched"], timeline=path
    )
    content = read_timeline(path)
    processes = content["otherData"]["processes"]
    assert [process["name"] for process in processes] == [
        f"{policy}, batch {batch} on small" for batch in (2, 4) for policy in ("lru", "presched")
    ]
    for process in processes:
        events = [e for e in content["traceEvents"] if e["ph"] == "X" and e["pid"] == process["pid"]]
        rows = [
            row
            for row in compared.rows
            if (row.policy, row.batch) == (process["outcomes"][0]["policy"], process["about"]["batch"])
        ]
        figures = figures_of(events)
        assert figures.steps == {"prefill": 1, "decode": rows[1].steps}
        assert figures.drawn_s == pytest.approx(sum(row.total_s for row in rows), rel=1e-3)
        recall = rows[1].forecast_recall
        foreseeable = sum(layer.foreseeable for layer in figures.layers)
        assert (recall is None) == (foreseeable == 0)
        if recall is not None:
            foreseen = sum(layer.foreseen for layer in figures.layers)
            assert foreseen / foreseeable == pytest.approx(recall)
    kinds = {lane_and_kind(event) for event in content["traceEvents"] if event["ph"] == "X"}
    assert ("link", "demand") in kinds
    assert {lane for lane, _ in kinds} <= {"scheduler", *LANES}
