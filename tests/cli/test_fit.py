"""`layerscope fit`: what fits where, without reading a weight."""

import json
import re
import shutil
from pathlib import Path

import pytest
from command_lines import refusal
from helpers import in_time

from layerscope_jax import Engine, OffloadConfig, load
from layerscope_jax.checkpoints.safetensors_io import StoredTensor
from layerscope_jax.cli import fit, fit_times
from layerscope_jax.cli import main as cli
from layerscope_jax.cli.fit_report import HOST_MARGIN
from layerscope_jax.support import machine

pytestmark = pytest.mark.usefixtures("quick_compiles")

TESTS = Path(__file__).parents[1]
GIB = 2**30


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen3-30B-A3B without its weights."""
    folder = tmp_path_factory.mktemp("qwen3")
    shutil.copy(TESTS / "golden" / "old_style_configs" / "qwen3_moe" / "config.json", folder)
    return folder


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in fit.FRACTIONS:
        monkeypatch.delenv(name, raising=False)


def fitted(capsys, folder, *options, code=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredTensor, "fill", lambda *arguments: pytest.fail("a tensor was read"))
        assert cli.main(["fit", str(folder), *options, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_an_accelerator_has_room_for_what_weights_caches_and_steps_leave(qwen, capsys):
    found = fitted(capsys, qwen, "--device-memory=24GiB", "--host-memory=64GiB", "--context=1024")
    assert found["memory"]["device_bytes"] == 18 * GIB
    needs, chosen = found["needs"], found["chosen"]
    assert needs["dense"] == 2 * (30_532_122_624 - 48 * 128 * 3 * 2048 * 768)
    assert needs["caches"] == 32 * 1024 * 48 * 2 * 4 * 128 * 2
    assert chosen["total_bytes"] == 48 * 128 * 3 * 2048 * 768 * 2
    assert chosen["left_bytes"] == 18 * GIB - needs["total"]
    assert chosen["share"] == chosen["left_bytes"] // chosen["expert_bytes"] / (48 * 128)
    assert (chosen["experts_lie"], found["runs"]) == ("host", True)
    assert [each["format"] for each in found["formats"]][:3] == ["bfloat16", "int8", "int4"]
    assert all(each["share"] > chosen["share"] for each in found["formats"][1:])
    assert "--profile" in found["no_times"]


def test_it_has_the_room_that_an_engine_takes(tiny, capsys, monkeypatch):
    """Of the same free memory, once the dense weights are there."""
    options = ["--device-memory=1GiB", "--host-memory=64GiB", "--context=64", "--max-num-seqs=3"]
    found = fitted(capsys, tiny, *options)
    size, needs = found["chosen"]["expert_bytes"], found["needs"]
    total = needs["total"] + 9 * size
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1")
    found = fitted(capsys, tiny, f"--device-memory={total}", *options[1:])
    slots = found["chosen"]["left_bytes"] // size
    monkeypatch.setattr(machine, "device_free_bytes", lambda device: total - needs["dense"])
    with Engine(load(tiny), OffloadConfig(policy="lru", context=64, max_num_seqs=3)) as engine:
        assert slots <= engine.budget_bytes // size <= slots + 1
        assert slots in (8, 9)


@pytest.mark.parametrize(
    ("device", "host", "where", "code"),
    [
        ("200GiB", "200GiB", "device", 0),
        ("24GiB", "200GiB", "host", 0),
        ("24GiB", "20GiB", "disk", 0),
        ("8GiB", "200GiB", "nowhere", 1),
    ],
)
def test_where_experts_lie(device, host, where, code, qwen, capsys):
    options = [f"--device-memory={device}", f"--host-memory={host}"]
    found = fitted(capsys, qwen, *options, code=code)
    assert found["chosen"]["experts_lie"] == where
    assert found["runs"] == (where != "nowhere")
    advice = [each["change"] for each in found["advice"]]
    assert (advice == []) == (where == "device")
    assert where != "disk" or any("host memory for all experts" in change for change in advice)
    assert where != "host" or "dense weights in int8 (--dense-format int8)" in advice
    assert where != "nowhere" or "max_num_seqs 16, context 1,024, prefill_chunk_size 2,048" in advice
    assert cli.main(["fit", str(qwen), *options]) == code
    said = " ".join(capsys.readouterr().out.split())
    expected = {
        "device": "It fits on the device: there is",
        "host": "It runs with experts in host memory: there is",
        "disk": f"--host-budget {20 * 1024 - HOST_MARGIN // 2**20}MiB or less: there is",
        "nowhere": "It does not fit: weights, caches and steps take",
    }
    assert expected[where] in said


@pytest.mark.parametrize("device", ["4GiB", "5"])
def test_where_device_and_host_are_both_too_small_it_says_what_would_do(qwen, capsys, device):
    found = in_time(lambda: fitted(capsys, qwen, f"--device-memory={device}", "--host-memory=1GiB", code=1))
    [change] = [each["change"] for each in found["advice"]]
    sizes = re.fullmatch(r"a device with (\S+) GiB, and (\S+) GiB of free host memory", change)
    enough = [f"--device-memory={sizes[1]}GiB", f"--host-memory={sizes[2]}GiB"]
    assert fitted(capsys, qwen, *enough)["runs"]


def test_host_memory_that_is_left_free_is_told(tiny, capsys):
    assert cli.main(["fit", str(tiny), "--device-memory=8GiB", "--host-memory=1GiB"]) == 1
    assert "because 1.00 GiB of it is left free" in " ".join(capsys.readouterr().out.split())


def test_a_cpu_alone_has_all_experts_in_its_memory(tiny, capsys):
    found = fitted(capsys, tiny)
    assert found["memory"]["device"] is None
    assert found["chosen"]["share"] == 1
    assert found["advice"] == []
    small = fitted(capsys, tiny, "--host-memory=1GiB", code=1)
    assert small["chosen"]["experts_lie"] == "nowhere"


def test_times_are_the_simulators_for_the_profile_s_model(qwen, capsys):
    options = ["--device-memory=24GiB", "--host-memory=64GiB", "--profile=qwen3-30b-a3b", "--max-num-seqs=2"]
    found = fitted(capsys, qwen, *options)["times"]
    slower = fitted(capsys, qwen, *options, "--link=2GB/s")["times"]
    assert [each["batch"] for each in found["times"]] == [1, 2]
    for one, other in zip(found["times"], slower["times"], strict=True):
        assert 0 < one["ttft_s"] < other["ttft_s"]
    assert "published by the LayerScope authors" in found["source"]
    assert slower["source"].endswith("copies at 2 GB/s")
    assert cli.main(["fit", str(qwen), *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "its mean error was 13% for decode steps and 14% for prefills" in said


def test_everything_resident_is_simulated_as_such(qwen, capsys):
    options = ["--device-memory=200GiB", "--host-memory=64GiB", "--profile=qwen3-30b-a3b", "--max-num-seqs=1"]
    found = fitted(capsys, qwen, *options)["times"]
    assert (found["policy"], found["experts"]) == ("resident", 48 * 128)


def test_the_error_bar_is_what_the_benchmark_found():
    file = TESTS.parent / "benchmarks" / "results" / "simulator.json"
    summary = json.loads(file.read_text())["summary"]
    assert summary["decode_error"]["mean"] == pytest.approx(fit_times.DECODE_ERROR, abs=5e-4)
    assert summary["prefill_error"] == pytest.approx(fit_times.PREFILL_ERROR, abs=5e-4)


def test_a_format_that_the_experts_cannot_have_is_told(tmp_path, capsys):
    """Blocks of 32 numbers do not part 24."""
    config = json.loads((TESTS / "golden" / "qwen3_moe" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 24}))
    found = fitted(capsys, tmp_path)
    assert "32" in found["refused"]["mxfp4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-memory=much"], "--device-memory must be a size such as"),
        (["--host-memory=0"], "--host-memory must be more than 0 bytes, got '0'"),
        (["--link=fast"], "--link must be a size such as '8GiB'"),
        (["--link=2GB/s"], "--link changes expected times, which need costs of a machine; add --profile"),
        (["--context=0"], "context must be 1 or more positions, or None, got 0"),
        (["--context=9999999"], "--context must be at most 40,960 positions"),
        (["--max-num-seqs=0"], "max_num_seqs must be 1 or more, got 0"),
        (["--profile=nothing"], "--profile: profile must be a file"),
        (["--trace=nothing"], "--trace: "),
        (
            ["--profile=mixtral-8x7b", "--device-memory=24GiB", "--host-memory=64GiB"],
            "the profile 'mixtral-8x7b' is of another model: 32 layers of 8 experts",
        ),
    ],
)
def test_refusals(options, message, qwen, capsys):
    assert message in refusal(capsys, "fit", qwen, *options)


def test_the_share_that_jax_takes(qwen, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    options = ["--device-memory=80GiB", "--host-memory=64GiB"]
    assert fitted(capsys, qwen, *options)["memory"]["device_bytes"] == 40 * GIB
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    assert "XLA_CLIENT_MEM_FRACTION must be a share" in refusal(capsys, "fit", qwen, *options)
