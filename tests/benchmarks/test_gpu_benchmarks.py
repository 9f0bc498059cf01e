"""What `benchmarks/gpu.sh` runs goes through on a CPU too, in its smallest sizes. No time is checked."""

import inspect
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import PROFILE

from benchmarks import bench_gpu_facts, bench_hf_offload, bench_real_sizes, bench_step_fill
from benchmarks.random_models import PUBLISHED, published, random_model
from layerscope_jax import MachineProfile
from layerscope_jax.profiling.calibrate import calibrate
from layerscope_jax.profiling.machine_profile import ModelShape
from layerscope_jax.support import machine

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_bench_gpu_facts(tmp_path, capsys):
    file = tmp_path / "facts.json"
    bench_gpu_facts.main(bench_gpu_facts.Options(quick=True, json=file))
    result = json.loads(file.read_text())
    assert result["benchmark"] == "gpu_facts"
    assert result["platform"] == "cpu"
    assert {"device", "pinned_host"} <= set(result["memories"])
    overlap = result["overlap"]
    assert overlap["bytes"] == 4 * 2**16
    assert set(overlap["hidden"]) < set(overlap["ms"])
    assert {row["bytes"] for row in result["bandwidth"]} == {2**16, 2**20}
    for row in result["bandwidth"]:
        assert row["gb_per_s"].keys() == {"pinned", "pinned, 4 in a row", "NumPy", "read back"}
        assert min(speed["median"] for speed in row["gb_per_s"].values()) > 0
    assert len(result["small_calls_us"]) == 6
    # On a CPU the engine relies on these as well.
    assert result["view"]["view_is_the_buffer"]
    assert result["view"]["cpu_array_is_the_buffer"]
    assert result["donation"] == {"rows": True, "caches": True}
    assert result["same_bits"].keys() == {"2", "32"}
    assert result["pinned_memory"]["bytes"] == 64 * 2**20
    assert result["pinned_memory"]["stopped_by"] == "the limit"
    assert "overlaps a kernel" in capsys.readouterr().out


def test_bench_step_fill(tmp_path, capsys):
    file = tmp_path / "fill.json"
    bench_step_fill.main(bench_step_fill.Options(quick=True, json=file))
    ways = json.loads(file.read_text())["ways"]
    assert list(ways) == ["Python", "warp", "loops", "xla"]
    for way in ways.values():
        assert way["works"]
        assert way.get("right", True)
        assert way.get("pool_stays", True)
        assert min(speed["median"] for speed in way["gb_per_s"].values()) > 0
    assert "bytes right" in capsys.readouterr().out


def test_bench_real_sizes_says_what_does_not_fit(capsys):
    """All rows of a model for which there is no memory, and the names there are."""
    options = bench_real_sizes.Options(models=("mixtral-8x7b",), memory="5GB")
    (row,) = bench_real_sizes.main(options)["rows"]
    assert row["refused"] == "a layer has 2.82 GB of experts; there is room for 5.00"
    assert "room for 5.00" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="deepseek-v2-lite, qwen3-30b-a3b, mixtral-8x7b; got phi"):
        bench_real_sizes.main(replace(options, models=("phi",)))


def test_a_measurement_that_fails_loses_no_other(monkeypatch, tmp_path):
    def calibrated(model, **settings):  # measuring has tests of its own, and takes long
        inspect.signature(calibrate).bind(model, **settings)
        return MachineProfile(
            name="made up",
            costs=PROFILE,
            model=ModelShape.of(model),
            machine=machine.describe(model.device),
            emulated_link_bandwidth=None,
            details={},
        )

    monkeypatch.setattr(bench_real_sizes, "calibrate", calibrated)
    whole = bench_real_sizes.measured

    def measured(engine, work, options):
        if engine.policy.name == "host-only" and work.new_tokens == 1:
            raise bench_real_sizes.TransferError("injected")
        return whole(engine, work, options)

    monkeypatch.setattr(bench_real_sizes, "measured", measured)
    options = bench_real_sizes.Options(
        quick=True,
        models=("mixtral-8x7b",),
        formats=("bfloat16", "int4"),
        policies=("host-only",),
        json=tmp_path / "real.json",
    )
    with pytest.raises(SystemExit, match="2 of 4 measurements failed"):
        bench_real_sizes.main(options)
    result = json.loads(options.json.read_text())
    assert [(row["format"], row.get("failed")) for row in result["rows"]] == [
        ("bfloat16", None),
        ("bfloat16", "injected"),
        ("int4", None),
        ("int4", "injected"),
    ]
    sizes = result["models"]["mixtral-8x7b"]["formats"]
    assert sizes["int4"]["expert_bytes"] * 3.5 < sizes["bfloat16"]["expert_bytes"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_those_of_the_profiles(name):
    config, model = PUBLISHED[name], MachineProfile.load(name).model
    assert (config.num_moe_layers, config.num_experts, config.experts_per_token) == (
        model.num_layers,
        model.num_experts,
        model.experts_per_token,
    )
    assert config.expert_bytes(2) == model.expert_bytes


def test_a_random_model_has_weights_of_about_unit_gain():
    model = random_model(published("qwen3-30b-a3b", quick=True))
    matrices = [np.asarray(a, np.float32) for expert in model.bank for a in model.bank[expert]]
    matrices += [
        np.asarray(layer["attention"]["q"]["weight"], np.float32) for layer in model.dense["layers"].values()
    ]
    for matrix in matrices:
        assert 0.7 < matrix.std() * matrix.shape[1] ** 0.5 < 1.42
        assert abs(matrix.mean()) < 0.2 * matrix.std()
    assert len({matrix.tobytes() for matrix in matrices}) == len(matrices)


class Peer:
    """In place of transformers: as the engine, but for the last token."""

    versions = {"torch": "0", "transformers": "0", "accelerate": "0"}  # noqa: RUF012
    places = {"0": 2, "cpu": 3}  # noqa: RUF012

    def __init__(self, python, folder, threads, device_bytes):
        assert (folder / "model.safetensors").exists()
        self.device_bytes = device_bytes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def usable(self, ways):
        return list(ways)[:1]

    def run(self, prompts, forced, experts):
        assert experts == "eager"
        tokens = [[*row[:-1], row[-1] + 1] for row in forced]
        return {"prefill": 2.0, "decode": 1.0, "tokens": tokens}


def test_bench_hf_offload(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_hf_offload, "HFPeer", Peer)
    options = bench_hf_offload.Options(
        quick=True, policies=("host-only",), hf_python=Path("python"), json=tmp_path / "hf.json"
    )
    bench_hf_offload.main(options)
    result = json.loads(options.json.read_text())
    assert result["benchmark"] == "hf_offload"
    assert result["machine"]["versions"]["accelerate"] == "0"
    assert result["budget_bytes"] == result["all_experts_bytes"] * 40 // 100
    assert result["hf_places"] == {"0": 2, "cpu": 3}
    (row,) = result["rows"]
    assert row["ms"]["decode"]["hf-eager"] == {"median": 1000.0, "p90": 1000.0}
    assert row["same_tokens"] == {"host-only": 1.0, "hf-eager": 0.75}
    assert row["best_hf"] == {"prefill": "hf-eager", "decode": "hf-eager"}
    assert "HF / host-only" in capsys.readouterr().out


def test_bench_hf_offload_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(bench_hf_offload, "find_python", lambda given, *others: None)
    with pytest.raises(SystemExit, match="needs torch, transformers and accelerate"):
        bench_hf_offload.main(bench_hf_offload.Options(quick=True))


def script(*arguments, python, folder):
    """Runs gpu.sh with another interpreter than Python."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{python}\n")
    file.chmod(0o755)
    environment = os.environ | {"PYTHON": str(file), "OUT": str(folder / "out"), "TMPDIR": str(folder)}
    environment.pop("HF_PYTHON", None)
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def test_gpu_sh_names_files_that_there_are():
    text = SCRIPT.read_text()
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    modules = re.findall(r"\bbenchmarks\.(\w+)", text)
    assert len(modules) > 8
    for module in modules:
        assert (ROOT / "benchmarks" / f"{module}.py").exists(), module
    for test in re.findall(r"tests/\w+\.py", text):
        assert (ROOT / test).exists(), test
    parts = re.search(r"parts=\(([^)]*)\)", text)[1].split()
    cases = re.findall(r"^    ([a-z][a-z0-9-]*(?: \| [a-z0-9-]+)*)\)", text, re.MULTILINE)
    assert sorted(parts) == sorted(part for case in cases for part in case.split(" | "))


def test_gpu_sh_goes_on_after_a_failure(tmp_path):
    failing = 'echo "$*"; case "$*" in *bench_overhead*) exit 3;; *accelerate*) exit 1;; esac'
    done = script("--quick", python=failing, folder=tmp_path)
    assert done.returncode == 1
    calls = [line for line in done.stdout.splitlines() if line.startswith("-m benchmarks")]
    assert len(calls) == 11
    assert all("--quick --json" in call for call in calls)
    states = dict(re.findall(r"^(\S+) +\d+ s  (.+)$", done.stdout, re.MULTILINE))
    assert states.pop("overhead") == "failed"
    assert states.pop("hf-offload") == "skipped"
    assert set(states.values()) == {"passed"}
    assert (tmp_path / "out" / "gpu.log").read_text() in done.stdout


def test_gpu_sh_runs_the_parts_that_are_named(tmp_path):
    done = script("host-experts", "tests", python='echo "$*"', folder=tmp_path)
    assert done.returncode == 0
    assert re.findall(r"^== (.+)$", done.stdout, re.MULTILINE) == ["host-experts", "tests"]
    assert "--quick" not in done.stdout
    done = script("everything", python="exit 0", folder=tmp_path)
    assert done.returncode == 2
    assert "got everything" in done.stderr


def test_gpu_sh_ends_a_part_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setenv("PART_SECONDS", "0.2")
    done = script("facts", python="sleep 30", folder=tmp_path)
    assert done.returncode == 1
    assert "failed, out of time" in done.stdout
