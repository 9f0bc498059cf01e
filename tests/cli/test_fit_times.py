"""Times of `layerscope fit`: the simulator's, with the error that it was found to have, or what bytes say."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from command_lines import refusal
from fitting import GIB, TESTS, fitted, printed, without_weights
from helpers import PROFILE
from recorded import small_routing

from layerscope_jax import MachineProfile
from layerscope_jax.cli import fit, fit_bounds, fit_times
from layerscope_jax.profiling.machine_profile import ModelShape
from layerscope_jax.simulation.routing import PROFILES, Routing
from layerscope_jax.support import machine

pytestmark = pytest.mark.usefixtures("quick_compiles")

NOWHERE = dict.fromkeys(("cpu", "cores", "device", "memory_bytes"))
MACHINE = ["--device-memory=24GiB", "--host-memory=64GiB"]


@functools.cache
def short(name):
    """The first steps of shipped routing."""
    return Routing.load(PROFILES / f"{name}.npz").shortened(4)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(Routing, "shipped", short)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in fit.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "read_bytes_per_s", lambda: pytest.fail("memory was measured"))


def test_times_are_the_simulators_for_the_profile_s_model(few_steps, qwen, capsys):
    options = [*MACHINE, "--profile=qwen3-30b-a3b", "--max-num-seqs=2"]
    made = fitted(capsys, qwen, *options)
    found = made["times"]
    slower = fitted(capsys, qwen, *options, "--max-num-seqs=1", "--link=2GB/s")["times"]
    assert [each["batch"] for each in found["times"]] == [1, 2]
    assert 0 < found["times"][0]["ttft_s"] < slower["times"][0]["ttft_s"]
    assert "published by the LayerScope authors" in found["source"]
    assert slower["source"].endswith("copies at 2 GB/s")
    assert (made["bounds"], made["no_bounds"]) == (None, None)
    said = printed(capsys, qwen, *options, "--max-num-seqs=1")
    assert "nine of ten decode steps were within 22%, and prefills within 14%" in said
    assert "measured on a CPU of 2 cores with a slowed link, on no accelerator" in said


def test_everything_resident_is_simulated_as_such(few_steps, qwen, capsys):
    options = ["--device-memory=200GiB", "--host-memory=64GiB", "--profile=qwen3-30b-a3b", "--max-num-seqs=1"]
    found = fitted(capsys, qwen, *options)["times"]
    assert (found["policy"], found["experts"]) == ("resident", 48 * 128)


def test_the_error_bar_is_what_the_benchmark_found():
    found = json.loads((TESTS.parent / "benchmarks" / "results" / "simulator.json").read_text())
    assert found["summary"]["decode_error"]["p90"] == pytest.approx(fit_times.DECODE_ERROR, abs=5e-4)
    prefills = [each["prefill_ms"] for each in found["policies"].values()]
    errors = [abs(each["predicted"] / each["measured"] - 1) for each in prefills]
    assert np.quantile(errors, 0.9) == pytest.approx(fit_times.PREFILL_ERROR, abs=5e-4)
    where = found["machine"]
    assert (where["cores"], where["device"]) == (2, "cpu")  # as ERROR_SOURCE says
    assert "CPU of 2 cores" in fit_times.ERROR_SOURCE


@pytest.fixture
def own(tmp_path):
    """A model of sizes of its own, whose routing nobody has recorded, and a profile measured with it."""
    config = json.loads((without_weights(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 96}))
    shape = ModelShape(
        num_layers=48,
        num_experts=96,
        experts_per_token=8,
        hidden_size=2048,
        moe_intermediate_size=768,
        dtype="bfloat16",
    )
    file = tmp_path / "profile.json"
    details = {"memory": {"host_read_bytes_per_s": 5e10}}
    MachineProfile(name="own", costs=PROFILE, model=shape, machine=NOWHERE, details=details).save(file)
    return SimpleNamespace(folder=tmp_path, file=file, shape=shape)


def test_without_routing_times_are_left_out_with_the_remedy(own, capsys):
    options = [*MACHINE, f"--profile={own.file}"]
    found = fitted(capsys, own.folder, *options)
    assert found["times"] is None
    assert (
        "layerscope trace, then layerscope predictor routing, and give the file with --trace"
        in (found["no_times"])
    )
    link = 1e3 * own.shape.expert_bytes / PROFILE.transfer_ms
    rates = [found["bounds"][name]["bytes_per_s"] for name in ("host", "link")]
    assert rates == pytest.approx([5e10, link])
    assert "Expected times are left out: no recorded routing" in printed(capsys, own.folder, *options)


def test_routing_of_another_model_is_refused(own, capsys, tmp_path):
    small_routing().save(tmp_path / "other.npz")
    options = [*MACHINE, f"--profile={own.file}", f"--trace={tmp_path / 'other.npz'}"]
    assert "the recorded routing is of another model" in refusal(capsys, "fit", own.folder, *options)


def test_bytes_say_what_a_step_takes_at_least(qwen, capsys):
    """48 layers of 128 experts, 8 a token, of 3 x 2048 x 768 numbers in two bytes: by hand."""
    options = [*MACHINE, "--link=12GB/s", "--host-bandwidth=60GB/s", "--max-num-seqs=2"]
    found = fitted(capsys, qwen, *options)
    one, two = found["bounds"]["steps"]
    away = 1 - found["chosen"]["share"]
    assert 0 < away < 1
    assert (one["batch"], one["experts"]) == (1, pytest.approx(8))
    assert (two["batch"], two["experts"]) == (2, pytest.approx(8 + 8 * 120 / 128))
    for each in (one, two):
        size = away * each["experts"] * 48 * 3 * 2048 * 768 * 2
        assert each["read_bytes"] == pytest.approx(size)
        times = [each[name] for name in ("host_s", "link_s", "both_s")]
        assert times == pytest.approx([size / 60e9, size / 12e9, size / 72e9])
    assert "no simulation" in found["bounds"]["basis"]
    said = printed(capsys, qwen, *options)
    assert "Each further token at best, by bytes: a bound from bytes alone, and no simulation" in said
    assert "The host reads its memory: 60 GB/s, as given. The link: 12 GB/s, as given." in said


def test_what_is_not_known_of_a_described_machine_is_left_out(qwen, capsys):
    found = fitted(capsys, qwen, *MACHINE)
    assert found["bounds"] is None
    assert "give --host-bandwidth and --link" in found["no_bounds"]
    found = fitted(capsys, qwen, *MACHINE, "--link=12GB/s")["bounds"]
    assert found["host"] == {"bytes_per_s": None, "told": "not known: --host-bandwidth gives it"}
    assert {(each["host_s"], each["both_s"]) for each in found["steps"]} == {(None, None)}
    assert all(each["link_s"] > 0 for each in found["steps"])


def test_a_cpu_alone_reads_dense_weights_too_at_its_measured_speed(qwen, capsys, monkeypatch):
    monkeypatch.setattr(machine, "read_bytes_per_s", lambda: 4e10)
    monkeypatch.setattr(machine, "free_bytes", lambda: 100 * GIB)
    found = fitted(capsys, qwen, "--max-num-seqs=1")
    [step] = found["bounds"]["steps"]
    dense = found["needs"]["dense"] - 151_936 * 2048 * 2  # of the embedding one row is read
    assert step["read_bytes"] == pytest.approx(dense + 48 * 8 * 3 * 2048 * 768 * 2)
    assert step["host_s"] == pytest.approx(step["read_bytes"] / 4e10)
    assert (step["link_s"], step["both_s"]) == (None, None)
    assert found["bounds"]["host"]["told"].startswith("measured just now, by all cores")
    assert found["bounds"]["link"] is None
    said = printed(capsys, qwen, "--max-num-seqs=1")
    assert "40 GB/s, measured just now" in said
    assert "link" not in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--device-memory=200GiB", "--host-memory=200GiB"], "a step reads the device's memory alone"),
        (["--device-memory=24GiB", "--host-memory=20GiB"], "experts would be read from the disk"),
        (["--host-memory=100GiB"], "give --host-bandwidth, or run this command on the machine"),
    ],
)
def test_where_bytes_say_nothing_it_says_why(options, reason, qwen, capsys):
    assert reason in fitted(capsys, qwen, *options)["no_bounds"]


def test_weights_that_caches_may_hold_are_not_timed(tiny, capsys):
    assert "may lie in the processor's caches" in fitted(capsys, tiny)["no_bounds"]


def test_a_profile_without_the_host_s_speed_does_not_have_it_measured():
    profile = MachineProfile.load("mixtral-8x7b")
    assert fit_bounds.host_rate(None, profile, is_here=True).bytes_per_s is None
    assert fit_bounds.link_rate(None, profile).bytes_per_s == pytest.approx(336 * 2**20 / 27e-3)
