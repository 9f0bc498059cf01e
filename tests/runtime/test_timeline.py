"""Timelines of real runs: every lane adds up to the statistics, every layer has its plan."""

import json

import jax.numpy as jnp
import pytest
from disk_models import on_disk
from helpers import PROFILE, in_time, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.offload.executors import DeviceExperts
from layerscope_jax.runtime import device_side
from layerscope_jax.runtime.timeline_figures import figures_of, lane_and_kind
from layerscope_jax.runtime.timeline_files import join_timelines, read_timeline

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[5, 6, 7], [3, 9, 27, 20, 60, 58, 52, 34, 41, 1, 3]]
NEW_TOKENS = 3


@pytest.fixture(scope="module")
def model():
    return random_model(dtype=jnp.bfloat16, seed=1)


def slices(path):
    return [event for event in read_timeline(path)["traceEvents"] if event["ph"] == "X"]


def drawn_s(events, lane):
    return 1e-6 * sum(event["dur"] for event in events if lane_and_kind(event)[0] == lane)


def run(model, path, **options):
    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, profile=PROFILE, **options)
    with Engine(model, config) as engine:
        return in_time(
            lambda: engine.generate(
                PROMPTS, max_new_tokens=NEW_TOKENS, ignore_eos=True, record_plans=True, timeline=path
            )
        )


def agrees_with_statistics(events, stats):
    for lane in ("device", "host", "link", "disk"):
        share = getattr(stats, f"{lane}_share")
        assert drawn_s(events, lane) == pytest.approx(share * stats.total_s, rel=0.01, abs=1e-4)
    figures = figures_of(events)
    assert sum(layer.hits for layer in figures.layers) == round(
        stats.hit_rate * sum(layer.experts for layer in figures.layers)
    )
    assert figures.bytes.get("demand", 0) == stats.bytes_demand
    assert figures.bytes.get("prefetch", 0) == stats.bytes_prefetch
    assert figures.steps == {"prefill": 1, "decode": NEW_TOKENS - 1}
    return figures


@pytest.mark.parametrize(("policy", "accelerator"), [("lru", False), ("fiddler", True)])
def test_lanes_add_up_to_the_statistics(model, tmp_path, monkeypatch, policy, accelerator):
    if accelerator:  # computes beside Python, which does not wait for it
        monkeypatch.setattr(
            device_side, "device_experts", lambda device, cpu: DeviceExperts(device, cpu.format)
        )
    path = tmp_path / "run.json"
    result = run(model, path, policy=policy)
    events = slices(path)
    agrees_with_statistics(events, result.stats)
    layers = [event for event in events if lane_and_kind(event)[1] == "layer"]
    for event, plan in zip(layers, result.plans, strict=True):
        args = event["args"]
        assert (args["step"], args["layer"]) == (plan.step, plan.layer)
        assert tuple(args["device"]) == plan.device
        assert tuple(args["host"]) == plan.host
        for moved in ("load", "prefetch", "evict"):
            assert [tuple(expert) for expert in args.get(moved, ())] == [*map(tuple, getattr(plan, moved))]
    plans = {(plan.step, plan.layer): plan for plan in result.plans}
    for event in events:
        (lane, kind), args = lane_and_kind(event), event["args"]
        if lane in ("device", "host") and "experts" in args:
            plan = plans[args["step"], args["layer"] - (kind == "experts, attention")]
            assert set(args["experts"]) <= set(getattr(plan, lane))
            assert tuple(args["plan"]["device"]) == plan.device
        elif lane == "link":
            plan = plans[args["planned"]["step"], args["planned"]["layer"]]
            assert (args["layer"], args["expert"]) in (*plan.load, *plan.prefetch)


def test_slices_of_the_scheduler_lie_within_each_other(model, tmp_path):
    run(model, tmp_path / "run.json", policy="lru")
    within: list[float] = []
    own = [event for event in slices(tmp_path / "run.json") if lane_and_kind(event)[0] == "scheduler"]
    for event in own:
        begin, end = event["ts"], event["ts"] + event["dur"]
        while within and within[-1] <= begin:
            within.pop()
        assert not within or end <= within[-1] + 0.01  # times are rounded to a thousandth
        within.append(end)
    assert {lane_and_kind(event)[1] for event in own} >= {"prefill", "decode", "layer", "plan"}


def test_forecasts_and_what_came_stand_beside_each_other(model, tmp_path):
    result = run(model, tmp_path / "run.json", policy="fate", predictor="popularity")
    figures = agrees_with_statistics(slices(tmp_path / "run.json"), result.stats)
    foreseen, foreseeable = (
        sum(getattr(layer, name) for layer in figures.layers) for name in ("foreseen", "foreseeable")
    )
    assert foreseen / foreseeable == pytest.approx(result.stats.forecast_recall)


def test_reads_from_the_disk_have_a_lane(model, tmp_path):
    stored = on_disk(model, tmp_path)
    size = model.bank.expert_bytes
    result = run(stored, tmp_path / "run.json", policy="host-only", host_budget=7 * size)
    figures = agrees_with_statistics(slices(tmp_path / "run.json"), result.stats)
    assert figures.bytes["read"] + figures.bytes.get("read ahead", 0) == result.stats.bytes_read


def test_a_step_that_is_one_program_is_one_slice_and_stays_so(model, tmp_path):
    path = tmp_path / "run.json"
    with Engine(model) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS, ignore_eos=True, timeline=path).stats
        assert engine.runner.transfers.spans is engine.runner.host_experts.spans is None
    assert stats.mode == "decode"
    whole = [event for event in slices(path) if lane_and_kind(event)[1] == "whole step"]
    assert len(whole) == NEW_TOKENS - 1
    assert drawn_s(slices(path), "device") == pytest.approx(stats.device_share * stats.total_s, rel=0.01)


def test_timelines_are_joined_with_numbers_of_their_own(tmp_path):
    head = {"format": "layerscope timeline"}
    for name in "ab":
        processes = [{"pid": 1, "name": name}, {"pid": 2, "name": 2 * name}]
        event = {"ph": "X", "cat": "link,demand", "ts": 0, "dur": 1, "args": {"step": 0, "bytes": 1}}
        events = [{**event, "pid": pid} for pid in (1, 2)]
        content = {"otherData": {**head, "processes": processes}, "traceEvents": events}
        (tmp_path / name).write_text(json.dumps(content))
    join_timelines(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    both = read_timeline(tmp_path / "both")
    assert [(p["pid"], p["name"]) for p in both["otherData"]["processes"]] == [
        (1, "a"),
        (2, "aa"),
        (3, "b"),
        (4, "bb"),
    ]
    assert [event["pid"] for event in both["traceEvents"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "expected a timeline"),
        ('{"traceEvents": []}', "expected a timeline"),
        (
            '{"otherData": {"format": "layerscope timeline", "processes": [{"pid": 1, "name": ""}]}, '
            '"traceEvents": [{"pid": 1, "ph": "X"}]}',
            r"traceEvents\[0\]",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, problem):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=problem):
        read_timeline(tmp_path / "run.json")


def test_a_folder_is_refused_before_anything_runs(model, tmp_path):
    with Engine(model) as engine, pytest.raises(ValueError, match="timeline must be the name of a file"):
        engine.generate(PROMPTS, timeline=tmp_path)
