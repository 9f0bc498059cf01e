"""`layerscope trace`, and the names that the command line knows predictors by."""

import re

import pytest

import predictor
from layerscope_jax.cli import main as cli
from layerscope_jax.cli.main import main
from layerscope_jax.prediction.traces import Trace

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_a_trace_is_recorded_and_gone_on_with(tiny, tmp_path, monkeypatch, capsys):
    text = tmp_path / "letters"
    text.mkdir()
    for index in range(4):
        (text / f"{index}.txt").write_text("The Nation continues to enjoy peace. " * (8 + index))
    files = [str(path) for path in sorted(text.iterdir())]
    command = ["trace", str(tiny), "--text", *files, "--out", str(tmp_path / "trace"), "--length", "32"]
    with monkeypatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")  # a terminal, which shows how far it has come
        assert main([*command, "--train-tokens", "64", "--heldout-tokens", "64", "--device-budget=70KB"]) == 0
    trace = Trace.open(tmp_path / "trace")
    assert trace.complete
    err = capsys.readouterr().err
    assert f"{trace.rows:,} tokens" in err
    count = sum(len(chunk.passages) for chunk in trace.chunks)
    shown = re.findall(rf"{count} of {count} passages.* tokens/s, (\d+)% hits, link (\d+)%", err)
    assert shown
    assert 0 < int(shown[-1][0]) < 100
    assert main([*command, "--heldout-domains", "prose"]) == 2
    assert "heldout-domains must be some of letters, got prose" in capsys.readouterr().err
    assert main([*command, "--train-tokens", "32"]) == 2
    assert "recorded differently" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere",
            "nowhere: expected a trained predictor's folder, or one of gate, popularity",
        ),
        ("gate", ""),
    ],
)
def test_predictors_have_names_or_folders(tiny, name, message, capsys):
    command = ["generate", str(tiny), "--prompt", "Once", "--max-new-tokens", "2", "--predictor", name]
    budget = ["--device-budget", "100KB", "--policy", "fate"]
    assert main([*command, *budget]) == (2 if message else 0)
    assert message in capsys.readouterr().err


def test_the_shipped_predictor_has_a_name():
    assert cli.open_predictor("shipped").model == predictor.shipped().model
    assert cli.open_predictor(None) is None
    assert cli.open_predictor("gate") == "gate"
