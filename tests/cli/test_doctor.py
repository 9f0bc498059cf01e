"""`layerscope doctor`: every check says what it found, how bad that is, and how to mend it."""

import json
from types import SimpleNamespace

import jax
import pytest

from layerscope_jax.cli import main as cli
from layerscope_jax.kernels import host_kernels, registry
from layerscope_jax.profiling import checkup, copies
from layerscope_jax.support import machine, target
from layerscope_jax.support.pinned_memory import LIMIT

pytestmark = pytest.mark.usefixtures("quick_compiles")

GIB = 2**30


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """What measuring gives, quickly; and kernels for two formats alone."""
    found = SimpleNamespace(copies=copies.Copies(2e10, 0.9))
    monkeypatch.setattr(checkup, "measured_copies", lambda device: found.copies)
    monkeypatch.setattr(machine, "read_bytes_per_s", lambda: 1e10)
    monkeypatch.setattr(checkup, "ENCODINGS", checkup.ENCODINGS[:1])
    return found


def gpu(kinds=("device", "pinned_host"), free=20 * GIB):
    """A stand-in for a GPU."""
    return SimpleNamespace(
        platform="gpu",
        device_kind="a GPU",
        addressable_memories=lambda: [SimpleNamespace(kind=kind) for kind in kinds],
        memory_stats=lambda: {"bytes_limit": 24 * GIB, "bytes_in_use": 24 * GIB - free},
    )


def by_name(findings):
    return {finding.name: finding for finding in findings}


def diagnosed(capsys, code=0):
    assert cli.main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] == (code == 0)
    for each in found["findings"]:
        assert (each["mend"] is None) == (each["state"] == "ok"), each
    return {each["name"]: each for each in found["findings"]}


def test_this_machine_is_well(capsys):
    found = diagnosed(capsys)
    assert {"versions", "devices", "host", "memory kinds", "host memory", "device memory"} <= found.keys()
    assert {"kernel of bfloat16", "kernel of int8", "dense kernels", "copies", "overlap"} <= found.keys()
    assert all(each["state"] != "broken" for each in found.values())
    assert found["copies"]["told"] == "20 GB/s from pinned host memory to the device"
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [each["state"] for each in found.values()]


def test_a_check_that_fails_is_broken_and_the_others_are_done(capsys, monkeypatch):
    def fails(device):
        raise RuntimeError("the device fell out\nof its slot")

    monkeypatch.setattr(checkup, "measured_copies", fails)
    found = diagnosed(capsys, code=1)
    assert found["copies"]["state"] == "broken"
    assert found["copies"]["told"] == "the device fell out"
    assert "compilation cache" in found


def test_a_backend_that_does_not_start_is_broken(capsys, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fails)
    found = diagnosed(capsys, code=1)
    assert found["devices"]["told"] == "Unable to initialize backend 'cuda'"


def test_a_gpu_that_jax_does_not_use_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(checkup, "NVIDIA", tmp_path)
    found = by_name(checkup.devices(jax.devices()[0]))
    assert found["devices"].state == "slow"
    assert "jax[cuda13]" in found["devices"].mend


def test_without_a_cpu_backend_there_is_no_host(monkeypatch):
    def none():
        raise ValueError("experts on the host need JAX's CPU backend")

    monkeypatch.setattr(machine, "cpu_device", none)
    assert by_name(checkup.devices(jax.devices()[0]))["host"].state == "broken"


def test_memory_of_a_gpu(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    monkeypatch.setattr(machine, "free_bytes", lambda: 100 * GIB)
    found = by_name(checkup.memory(gpu()))
    assert found["device memory"].told == "20.00 GiB of 24.00 GiB free for JAX"
    assert found["pinned memory"].state == "slow"
    assert f"set {LIMIT}=104" in found["pinned memory"].mend
    monkeypatch.setenv(LIMIT, "104")
    assert by_name(checkup.memory(gpu()))["pinned memory"].state == "ok"
    found = by_name(checkup.memory(gpu(kinds=("device",))))
    assert found["memory kinds"].state == "broken"
    assert "without pinned_host" in found["memory kinds"].told


@pytest.mark.parametrize(
    ("rate", "overlap", "states"),
    [(2e10, 0.9, ("ok", "ok")), (3e9, 0.9, ("slow", "ok")), (2e10, 0.1, ("ok", "slow"))],
)
def test_copies_to_a_gpu(rate, overlap, states, measured):
    measured.copies = copies.Copies(rate, overlap)
    found = by_name(checkup.copies(gpu()))
    assert (found["copies"].state, found["overlap"].state) == states


def test_a_kernel_that_cannot_be_compiled_is_told(monkeypatch):
    monkeypatch.setattr(target, "refusal", lambda: "NUMBA_DISABLE_JIT is set")
    monkeypatch.setattr(registry, "_fallbacks", {})
    registry.choose.cache_clear()
    host_kernels.not_compiled.cache_clear()
    try:
        found = by_name(checkup.kernels(jax.devices()[0]))
    finally:
        registry.choose.cache_clear()
        host_kernels.not_compiled.cache_clear()
    assert found["kernel of bfloat16"].state == "slow"
    assert "NUMBA_DISABLE_JIT is set" in found["kernel of bfloat16"].mend
    assert found["kernel of bfloat16"].told.endswith("xla")
    assert found["dense kernels"].state == "slow"


def test_what_a_faster_kernel_needs_is_told(monkeypatch):
    monkeypatch.setattr(target, "features", lambda: frozenset({"avx512bw"}))
    found = checkup.of_kernel("bfloat16", "loops", [])
    assert found.state == "ok"
    assert "this CPU lacks amx-bf16, amx-tile, avx512bf16" in found.told
    assert "lacks" not in checkup.of_kernel("bfloat16", "amx", []).told


def test_copies_are_measured(monkeypatch):
    monkeypatch.setattr(copies, "MOST_BYTES", 2**16)
    monkeypatch.setattr(copies, "WIDTH", 32)
    found = copies.measured_copies(jax.devices()[0])
    assert found.bytes_per_s > 0
    assert 0 <= found.overlap <= 1


def test_programs_that_are_not_kept_are_told(monkeypatch):
    monkeypatch.setattr(checkup, "kept_in", lambda: None)
    assert by_name(checkup.cache(jax.devices()[0]))["compilation cache"].state == "slow"
