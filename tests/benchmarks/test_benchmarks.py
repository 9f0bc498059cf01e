"""The benchmarks run, in their smallest sizes, and write what they say they write. No time is checked."""

import json
from dataclasses import replace

import pytest
from helpers import MACHINE, PROFILE
from small_checkpoint import write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks import (
    bench_batching,
    bench_host_experts,
    bench_link,
    bench_overhead,
    bench_planning,
    bench_policies,
    bench_prefill,
    bench_quantised,
    bench_recall,
    bench_resident,
    bench_serving,
    bench_simulator,
    harness,
    serving_load,
)
from benchmarks.random_models import random_decoder, shapes
from benchmarks.stopwatch import Stopwatch
from layerscope_jax import Engine, MachineProfile, OffloadConfig, load, parse_bytes, save
from layerscope_jax.kernels import cpu
from layerscope_jax.profiling.machine_profile import ModelShape
from layerscope_jax.runtime import layerwise
from layerscope_jax.support import machine

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_the_machine_is_named():
    record = harness.machine()
    assert record.keys() == MACHINE
    assert record["versions"].keys() == {"python", *harness.PACKAGES}
    assert record["cpu"] in harness.describe(record)


def test_bench_resident(tmp_path, capsys):
    file = tmp_path / "resident.json"
    bench_resident.main(bench_resident.Options(quick=True, shapes=("olmoe",), batches=(4,), json=file))
    result = json.loads(file.read_text())
    assert result["benchmark"] == "resident"
    assert result["quick"]
    assert result["machine"].keys() == MACHINE
    assert [(row["shape"], row["batch"]) for row in result["rows"]] == [("olmoe", 4)]
    for row in result["rows"]:
        assert row["ms"].keys() >= {"engine", "loop-4-rows"}
        for part in ("prefill", "decode"):
            assert row["ms"]["engine"][part].keys() == {"median", "p90"}
            assert row["ratios"][part].keys() >= {"best", "engine/loop"}
        loops = {name: share for name, share in row["same_tokens_as_engine"].items() if name[:2] != "hf"}
        assert set(loops.values()) == {1.0}
    assert "engine/loop" in capsys.readouterr().out


def test_bench_resident_names_the_shapes_there_are():
    with pytest.raises(SystemExit, match="mixtral, mixtral-444m, olmoe; got phi"):
        bench_resident.main(bench_resident.Options(shapes=("phi",)))


@pytest.fixture
def checkpoint(tmp_path):
    """A random model with a tokenizer of one word an id, and prompts in its words."""
    folder = tmp_path / "checkpoint"
    config = replace(shapes(quick=True)["olmoe"], num_layers=2)
    save(random_decoder(config), folder)
    words = {str(number): number for number in range(config.vocab_size)}
    Tokenizer(WordLevel(words, unk_token="0")).save(str(folder / "tokenizer.json"))
    # This tokenizer parts nothing: a prompt is one word, a token.
    rows = [{"id": str(n), "domain": "numbers", "prompt": str(n)} for n in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_bench_policies(checkpoint, tmp_path, capsys):
    file = tmp_path / "policies.json"
    options = bench_policies.Options(
        quick=True, checkpoint=checkpoint, policies=("lru", "host-only"), budgets=(50,), batch=4, json=file
    )
    bench_policies.main(options)
    result = json.loads(file.read_text())
    assert result["benchmark"] == "policies"
    assert result["machine"].keys() == MACHINE
    assert result["model"]["experts"] == 64
    assert [row["policy"] for row in result["rows"]] == ["resident", "lru", "host-only"]
    for row in result["rows"]:
        assert row["same_tokens_as_resident"]
        assert row["tpot_ms"].keys() == row["tokens_per_s"].keys() == {"median", "p90"}
        assert row["stats"]["new_tokens"] == 3 * 4
    assert result["rows"][0]["stats"]["bytes_moved"] == 0
    assert min(row["time_to_best"]["median"] for row in result["rows"][1:]) == 1.0
    assert "tokens/s" in capsys.readouterr().out


def test_a_policy_that_a_budget_is_too_small_for_is_said_to_be(checkpoint, capsys):
    options = bench_policies.Options(quick=True, checkpoint=checkpoint, policies=("lru",), budgets=(10,))
    row = bench_policies.main(options)["rows"][0]
    assert row["policy"] == "lru"
    assert "device_budget is too small" in row["refused"]
    assert "budget too small" in capsys.readouterr().out


def test_bench_policies_says_what_is_missing(checkpoint):
    with pytest.raises(SystemExit, match=r"absent\.jsonl: expected lines of JSON"):
        bench_policies.main(
            bench_policies.Options(checkpoint=checkpoint, prompts=checkpoint / "absent.jsonl")
        )


def test_bench_batching(checkpoint, tmp_path, capsys):
    file = tmp_path / "batching.json"
    options = bench_batching.Options(quick=True, checkpoint=checkpoint, policies=("resident",), json=file)
    bench_batching.main(options)
    result = json.loads(file.read_text())
    assert result["benchmark"] == "batching"
    assert result["machine"].keys() == MACHINE
    assert len(result["prompt_tokens"]) == len(result["new_tokens"]) == 6
    assert [(row["policy"], row["slots"]) for row in result["rows"]] == [("resident", 2)]
    for row in result["rows"]:
        steps = row["steps"]
        assert steps.keys() == row["tokens_per_s"].keys() == {"continuous", "batch by batch", "even"}
        assert steps["even"]["decode"] <= steps["continuous"]["decode"] <= steps["batch by batch"]["decode"]
        assert row["same_tokens"] == 1
    assert "to batch by batch" in capsys.readouterr().out


def test_bench_serving_under_load(checkpoint, tmp_path, capsys):
    file = tmp_path / "load.json"
    options = bench_serving.Options(quick=True, checkpoint=checkpoint, budget=50, seconds=1, json=file)
    bench_serving.main(replace(options, policies=("lru",)))
    [row] = json.loads(file.read_text())["rows"]
    assert row["requests"] >= row["clients"] == 3
    assert (row["policy"], row["lost"], row["same_tokens"], row["warm_ups"]) == ("lru", 0, 1.0, 1)
    assert row["memory_mib"]["end"] > 0


def test_growth_is_that_of_the_second_half():
    memory = serving_load.Watched()
    memory.times, memory.bytes = [0.0, 1.0, 2.0, 3.0, 4.0], [0, 50, 100, 101, 102]
    assert memory.growth() == pytest.approx(60)


def test_bench_serving(checkpoint, tmp_path, capsys):
    file = tmp_path / "serving.json"
    options = bench_serving.Options(quick=True, checkpoint=checkpoint, policies=("resident",), json=file)
    bench_serving.main(replace(options, shape="olmoe"))
    result = json.loads(file.read_text())
    assert (result["benchmark"], result["shape"]) == ("serving", "olmoe")
    with pytest.raises(SystemExit, match="shapes are mixtral, mixtral-444m, olmoe; got phi"):
        bench_serving.main(replace(options, shape="phi"))
    assert result["machine"].keys() == MACHINE
    [row] = result["rows"]
    assert (row["policy"], row["clients"], row["same_tokens"]) == ("resident", 3, 1)
    assert row["tokens_per_s"].keys() == {"generate", "serve"}
    assert 0 < row["gap_ms"]["p50"] <= row["gap_ms"]["p99"]
    assert "to generate" in capsys.readouterr().out


def test_bench_prefill(checkpoint, tmp_path, capsys):
    file = tmp_path / "prefill.json"
    bench_prefill.main(bench_prefill.Options(quick=True, checkpoint=checkpoint, budget=50, json=file))
    result = json.loads(file.read_text())
    assert result["benchmark"] == "prefill"
    assert result["machine"].keys() == MACHINE
    assert [(row["policy"], row["chunk"], row["steps"]) for row in result["rows"]] == [
        (policy, chunk, steps)
        for policy in ("resident", "on-demand")
        for chunk, steps in ((4096, 1), (32, 2))
    ]
    for row in result["rows"]:
        assert row["prompt_tokens"] == 40
        assert row["ttft_ms"].keys() == {"median", "p90"}
        assert (row["bytes_moved"] > 0) == (row["policy"] == "on-demand")
    assert "MB grown" in capsys.readouterr().out


def test_bench_link(tmp_path, capsys):
    file = tmp_path / "link.json"
    bench_link.main(bench_link.Options(quick=True, json=file))
    result = json.loads(file.read_text())
    assert result["benchmark"] == "link"
    assert result["machine"].keys() == MACHINE
    assert [(row["policy"], row["link"]) for row in result["bound"]] == [
        ("on-demand", "20MB"),
        ("on-demand", "unpaced"),
    ]
    for row in result["bound"]:
        # Nothing is kept, so all that is needed is copied, again and again.
        assert row["bytes_moved"]["median"] > 3 * 2 * 4 * result["model"]["expert_bytes"]
        assert row["busy_share"].keys() == row["loading_to_loop"].keys() == {"median", "p90"}
        assert row["bytes_per_s"].keys() == {"whole", "loading", "loop"}
        assert row["bytes_per_s"]["whole"]["median"] < row["bytes_per_s"]["loading"]["median"]
    assert [row["policy"] for row in result["overlap"]] == ["fate"]
    (shares,) = (row["shares"] for row in result["overlap"])
    assert sum(share["median"] for share in shares.values()) == pytest.approx(
        result["overlap"][0]["together"]["median"]
    )
    assert {(row["profile"], row["link"]) for row in result["overtaking"]} == {
        ("qwen3-30b-a3b", "20MB"),
        ("qwen3-30b-a3b", "unpaced"),
    }
    for row in result["overtaking"]:
        assert row["prefetches"] == 15
        for way in ("alone", "overtaking"):
            begins, there = row["chunks_until_it_begins"][way], row["chunks_until_it_is_there"][way]
            assert 0 < begins["median"] <= begins["most"]
            assert begins["median"] < there["median"]
    assert "overtaking" in capsys.readouterr().out


def test_bench_simulator(checkpoint, tmp_path, capsys, monkeypatch):
    def calibrated(model, *, emulated_link_bandwidth, **_):  # measuring has tests of its own, and takes long
        return MachineProfile(
            name="made up",
            costs=PROFILE,
            model=ModelShape.of(model),
            machine=machine.describe(model.device),
            emulated_link_bandwidth=parse_bytes(emulated_link_bandwidth),
            details={"seconds": 0.0},
        )

    monkeypatch.setattr(bench_simulator, "calibrate", calibrated)
    file = tmp_path / "simulator.json"
    options = bench_simulator.Options(
        quick=True,
        checkpoint=checkpoint,
        policies=("lru", "fate"),  # nothing on the host: less to compile
        budget=50,
        link="1GB",
        json=file,
    )
    bench_simulator.main(options)
    result = json.loads(file.read_text())
    assert result["benchmark"] == "simulator"
    assert result["machine"].keys() == MACHINE
    assert result["policies"].keys() == {"lru", "fate"}
    for row in result["policies"].values():
        for way in ("measured", "predicted"):
            assert row["prefill_ms"][way] > 0
            assert len(row["decode_ms"][way]) == 2
            assert min(row["decode_ms"][way]) > 0
    for name in ("decode_error", "decode_error_with_planning"):
        assert result["summary"][name].keys() == {"mean", "p90"}
    assert -1 <= result["summary"]["kendall_tau"] <= 1
    assert "Kendall's tau" in capsys.readouterr().out


def test_bench_recall(tmp_path, capsys):
    file = tmp_path / "recall.json"
    bench_recall.main(bench_recall.Options(quick=True, profiles=("mixtral-8x7b",), json=file))
    result = json.loads(file.read_text())
    assert result["benchmark"] == "recall"
    assert result["machine"].keys() == MACHINE
    rows = [(row["policy"], row["recall_percent"]) for row in result["rows"]]
    assert rows == [(policy, recall) for policy in ("presched", "auto") for recall in (None, 100, 0)]
    for row in result["rows"]:
        assert row["step_ms"] > 0
        assert 0 <= row["mb_wasted_per_step"] <= row["mb_moved_per_step"]
    assert [row["experts_foreseen"] for row in result["rows"][:2]] == [None, 1.0]
    assert len(result["verdicts"]) == 2
    assert "pays from" in capsys.readouterr().out


def test_bench_planning(tmp_path, capsys):
    file = tmp_path / "planning.json"
    options = bench_planning.Options(
        quick=True, profiles=("mixtral-8x7b",), policies=("lru", "presched"), json=file
    )
    bench_planning.main(options)
    result = json.loads(file.read_text())
    assert result["benchmark"] == "planning"
    assert result["machine"].keys() == MACHINE
    assert [(row["policy"], row["look_ahead"]) for row in result["rows"]] == [("lru", None), ("presched", 2)]
    for row in result["rows"]:
        assert row["assignments"] == 4 * 2
        assert 0 < row["resident"] <= 88
        assert row["us"].keys() == {"median", "p90"}
    assert "µs a layer" in capsys.readouterr().out


def test_bench_host_experts(tmp_path, capsys):
    file = tmp_path / "host_experts.json"
    bench_host_experts.main(bench_host_experts.Options(quick=True, json=file))
    result = json.loads(file.read_text())
    assert result["benchmark"] == "host_experts"
    assert result["machine"].keys() == MACHINE
    assert {(row["format"], row["tokens"]) for row in result["rows"]} == {
        (dtype, tokens) for dtype in ("bfloat16", "float32") for tokens in (1, 4)
    }
    for row in result["rows"]:
        # Three matrices of 64 x 96 are read, by the times that stand beside.
        size = 3 * 64 * 96 * (2 if row["format"] == "bfloat16" else 4)
        assert row["ms"].keys() >= {"loops", "xla", row["taken"]}
        for way, ms in row["ms"].items():
            assert row["gb_per_s"][way]["median"] == pytest.approx(size / ms["median"] / 1e6, rel=1e-3)
    assert "reading alone" in capsys.readouterr().out


def test_bench_quantised(tmp_path, capsys):
    """Of a small model and a text of its own, as the shipped one takes long."""
    file, text = tmp_path / "quantised.json", tmp_path / "text.jsonl"
    folder = write_checkpoint(tmp_path / "checkpoint", num_layers=4)  # a quarter holds a layer
    rows = ({"id": str(n), "text": f"The {n}th house by the old road. " * 12} for n in range(4))
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = bench_quantised.Options(
        quick=True,
        model=folder,
        text=(text,),
        length=32,
        formats=("int8",),  # others are other numbers
        dense=("int8",),
        json=file,
    )
    bench_quantised.main(options)
    result = json.loads(file.read_text())
    assert result["machine"].keys() == MACHINE
    plain, *others = result["quality"].values()
    assert (plain["loss_to_plain"], plain["kl"], plain["routing_agreement"]) == (1, 0, 1)
    for found in others:  # other numbers, of nearly the same model
        assert 0 < found["kl"] < 0.1
        assert 0.8 < found["routing_agreement"] < 1
    assert result["expert_bytes"]["int8"] == 3 * 64 * 96 + 4 * (2 * 96 + 64)
    assert result["step"].keys() == result["quality"].keys()
    assert result["quality"].keys() == result["host"]["1"].keys() | {"int8 + dense int8"}
    dense = result["dense_bytes"]
    assert dense["int8 + dense int8"] < 0.8 * dense["int8"] == 0.8 * dense["bfloat16"]
    assert "held-out loss" in capsys.readouterr().out


def test_another_model_is_scored_on_its_own_tokens(tmp_path):
    options = bench_quantised.Options()
    assert bench_quantised.passages_of(options, None).shape == (options.passages, 32)  # of the shipped one
    with pytest.raises(SystemExit, match="--model needs --text"):
        bench_quantised.main(bench_quantised.Options(quick=True, model=tmp_path))


@pytest.mark.parametrize("bench", [bench_recall, bench_planning])
def test_simulations_name_the_profiles_there_are(bench):
    with pytest.raises(SystemExit, match="mixtral-8x7b@pcie4-x16"):
        bench.main(bench.Options(quick=True, profiles=("phi",)))


def test_bench_overhead(tmp_path, capsys):
    file = tmp_path / "overhead.json"
    options = bench_overhead.Options(quick=True, models=("wide",), policies=("host-only",), json=file)
    bench_overhead.main(options)
    result = json.loads(file.read_text())
    assert result["benchmark"] == "overhead"
    assert result["machine"].keys() == MACHINE
    rows = result["models"][0]["rows"]
    assert [row["policy"] for row in rows] == ["host-only"]
    for row in rows:
        assert {"dispatching attention", "attention", "experts", "policy.plan"} <= row["us"].keys()
        assert row["timed_calls_a_layer"] > 10
        assert row["layer_us"]["median"] > 0
    assert "all but arithmetic and copying" in capsys.readouterr().out


def test_bench_overhead_leaves_the_engine_as_it_was(checkpoint):
    """Timed and untimed runs take turns on one engine."""
    with Engine(load(checkpoint), OffloadConfig(device_budget=0, policy="host-only")) as engine:
        parts = [
            engine.runner,
            engine.runner.transfers,
            engine.runner.residency,
            engine.policy,
            cpu,
            layerwise,
        ]
        before = [dict(vars(part)) for part in parts]
        with bench_overhead.timed_parts(engine, Stopwatch()):
            assert [dict(vars(part)) for part in parts] != before
        assert [dict(vars(part)) for part in parts] == before
