"""The command that measures a machine."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
from helpers import random_decoder
from recorded import small_profile
from test_calibration import POINTS, SMALL, few  # noqa: F401

import layerscope_jax
from layerscope_jax.cli import calibrate as calibrate_cli
from layerscope_jax.cli import main as cli
from layerscope_jax.profiling import calibrate as profiling
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.support import machine

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    layerscope_jax.save(random_decoder(SMALL), folder)
    return folder


def test_it_writes_a_profile_and_shows_it(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        calibrate_cli, "calibrate", partial(profiling.calibrate, points=POINTS, contexts=(8,))
    )
    file = tmp_path / "new" / "profile.json"
    assert cli.main(["calibrate", str(checkpoint), "--out", str(file), "--device-budget", "50KB"]) == 0
    profile = MachineProfile.load(file)
    assert (profile.name, profile.slots) == (checkpoint.name, 4)
    profile.check(layerscope_jax.load(checkpoint))
    shown = capsys.readouterr().out
    for part in ("host", "device", "link", "alone", "busy", "GB/s", str(file)):
        assert part in shown
    assert max(map(len, shown.replace(str(file), "").splitlines())) <= 80
    # It plans generations of this model over no other link.
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [1, 2]}\n')
    generate = ["generate", str(checkpoint), "--prompts", str(prompts), "--profile", str(file)]
    assert cli.main([*generate, "--emulated-link-bandwidth", "1MB"]) == 2
    assert "emulated_link_bandwidth None there, 1000000 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("left", "options", "budget"),
    [
        (None, [], None),  # as on a CPU: all experts
        (50_000, [], 50_000),
        (10**9, [], 12 * 12096),
        (50_000, ["--device-budget=None"], None),
        (50_000, ["--device-budget=30KB"], "30KB"),
    ],
)
def test_the_budget_is_that_of_an_engine(left, options, budget, checkpoint, tmp_path, monkeypatch, capsys):
    """What weights, caches and steps leave free, unless something else is said."""
    room = None if left is None else SimpleNamespace(left=left, explained=nullcontext)
    seen = []

    def calibrate(model, **sizes):
        seen.append(sizes["device_budget"])
        return small_profile(machine={})

    monkeypatch.setattr(calibrate_cli, "room_on", lambda *arguments, **asked: room)
    monkeypatch.setattr(calibrate_cli, "calibrate", calibrate)
    file = tmp_path / "profile.json"
    assert cli.main(["calibrate", str(checkpoint), f"--out={file}", "--json", *options]) == 0
    assert seen == [budget]


def test_a_device_without_room_is_told(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "device_free_bytes", lambda device: 2**20)
    assert cli.main(["calibrate", str(checkpoint), f"--out={tmp_path / 'profile.json'}"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: device_budget='auto' finds no room for experts: 1.0 MiB free")
    assert said.endswith("or give --device-budget a size")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-budget", "much"], "device_budget must be a size"),
        (["--device-budget", "10"], "must hold an expert of 12096 B"),
        (["--emulated-link-bandwidth", "0"], "more than 0 bytes a second"),
        (["--out", "."], "--out must be a file, got the folder ."),
    ],
)
def test_refusals_are_one_line(checkpoint, capsys, arguments, message):
    assert cli.main(["calibrate", str(checkpoint), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
