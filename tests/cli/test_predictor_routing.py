"""`layerscope predictor routing`: from a trace to simulated times of a model without a shipped profile."""

import json
from dataclasses import replace

import pytest
from command_lines import refusal
from recorded import small_profile
from synthetic import LAYERS, MODEL, untrained, write_trace

from layerscope_jax.cli import main as cli
from layerscope_jax.simulation import comparison
from layerscope_jax.simulation.routing import Routing
from predictor.llapor import LLaPor

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHORT = ["--decode-steps=4", "--prompt-tokens", "3", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trace, an untrained predictor, and a profile of the same model."""
    folder = tmp_path_factory.mktemp("own")
    untrained(write_trace(folder / "trace")).save(folder / "predictor")
    machine = dict.fromkeys(("cpu", "cores", "device", "memory_bytes"))
    shape = replace(small_profile().model, **MODEL.counts())
    small_profile(machine=machine, model=shape).save(folder / "profile.json")
    return folder


@pytest.fixture(scope="module")
def routing(folder):
    out = folder / "routing.npz"
    command = ["predictor", "routing", folder / "trace", "--predictor", folder / "predictor", "--out", out]
    assert cli.main([str(word) for word in [*command, *SHORT]]) == 0
    return out


def test_what_it_makes_is_simulated_with_nothing_more_said(folder, routing, monkeypatch, capsys):
    """Neither batches nor a predictor: of twelve requests, and of the forecasts that are there."""
    monkeypatch.setattr(comparison, "lower_bound_ms", lambda *of, **more: 1.0)  # compiles for long
    command = ["simulate", f"--profile={folder / 'profile.json'}", f"--trace={routing}", "--policy=presched"]
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    decoded = [row for row in rows if row["phase"] == "decode"]
    assert [(row["batch"], row["steps"], row["predictor"]) for row in decoded] == [
        (4, 4, "llapor"),
        (12, 4, "llapor"),
    ]
    assert all(row["tpot_s"] > 0 for row in decoded)


def test_without_a_predictor_it_is_the_gate_that_is_simulated(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "lower_bound_ms", lambda *of, **more: 1.0)
    out = tmp_path / "new" / "gate.npz"
    assert cli.main(["predictor", "routing", str(folder / "trace"), f"--out={out}", *SHORT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["routing"], found["requests"], found["decode_steps"]) == (str(out), 12, 4)
    assert found["forecasts"] == ["gate"]
    assert found["recall"] == Routing.load(out).header["recall"]
    assert [path.name for path in out.parent.iterdir()] == ["gate.npz"]
    command = ["simulate", f"--profile={folder / 'profile.json'}", f"--trace={out}", "--policy=presched"]
    assert cli.main([*command, "--batch=2", "--json"]) == 0
    assert {row["predictor"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"gate"}


def test_the_same_command_writes_the_same_file_in_place_of_another(folder, tmp_path, capsys):
    files = [tmp_path / name for name in ("routing.npz", "again.npz")]
    files[0].write_text("something else")
    assert "got 0 of 12" in refusal(capsys, "predictor", "routing", folder / "trace", "--out", files[0])
    assert files[0].read_text() == "something else"
    for out in files:
        assert cli.main(["predictor", "routing", str(folder / "trace"), "--out", str(out), *SHORT]) == 0
        said = capsys.readouterr().err
        assert f"{out} holds 12 requests of 4 decode steps each, with the forecasts of gate" in said
        assert "gate: recall " in said
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_predictor_of_another_model_is_refused(folder, tmp_path, capsys):
    other = replace(LLaPor.load(folder / "predictor"), model=replace(MODEL, routers="fedcba9876543210"))
    other.save(tmp_path / "predictor")
    out = tmp_path / "routing.npz"
    command = [folder / "trace", "--predictor", tmp_path / "predictor", "--out", out, *SHORT]
    said = refusal(capsys, "predictor", "routing", *command)
    assert "the predictor belongs to another model: routers fedcba9876543210 there, 0123" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], "nowhere: expected a trace (trace.json), found none; `layerscope trace` records one"),
        (["TRACE", "--predictor=nowhere"], "--predictor: nowhere: expected a trained predictor"),
        (["TRACE", "--decode-steps=0"], "decode_steps must be 1 or more, got 0"),
        (["TRACE", "--prompt-tokens", "8", "3"], "prompt_tokens must be two lengths, the smaller one first"),
        (["TRACE", "--requests=13", *SHORT], "expected 13 held-out passages of 12 tokens or more"),
        (["TRACE", "--out=."], "--out must be a file, got the folder ."),
    ],
)
def test_the_command_refuses(options, words, folder, tmp_path, capsys):
    options = [str(folder / "trace") if word == "TRACE" else word for word in options]
    out = [] if "--out=." in options else [f"--out={tmp_path / 'new' / 'routing.npz'}"]
    assert words in refusal(capsys, "predictor", "routing", *options, *out)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_without_hidden_states_is_refused(tmp_path, capsys):
    write_trace(tmp_path / "trace", hidden=False)
    out = f"--out={tmp_path / 'routing.npz'}"
    assert "recorded without them" in refusal(capsys, "predictor", "routing", tmp_path / "trace", out, *SHORT)


def test_an_own_model_without_routing_is_told_how_to_make_it(folder, capsys):
    said = refusal(capsys, "simulate", f"--profile={folder / 'profile.json'}", "--policy=lru")
    assert "`layerscope predictor routing` makes one" in said
    assert LAYERS == 4  # of which no shipped routing is
