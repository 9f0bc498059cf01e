"""`layerscope predictor`: a model's own predictor in one command, and who uses it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, random_model

from layerscope_jax import OffloadConfig, load
from layerscope_jax.cli.main import Generate, main
from layerscope_jax.cli.options import measured_predictor
from layerscope_jax.cli.predictors import told
from predictor import recipe
from predictor.llapor import LLaPor
from predictor.verdict import Verdict, more_tokens

pytestmark = pytest.mark.usefixtures("quick_compiles")

WORDS = "call me ishmael some years ago never mind how long precisely having little or no money"


def documents(folder, domain, count, words):
    """A file of documents of one domain."""
    random = np.random.default_rng(count)
    lines = [
        json.dumps({"id": str(i), "text": " ".join(random.choice(WORDS.split(), words))})
        for i in range(count)
    ]
    file = folder / f"{domain}.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def test_one_command_makes_it_and_the_others_use_what_was_better(tiny, tmp_path, capsys, monkeypatch):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    monkeypatch.setattr(recipe, "FEWEST", 512)
    monkeypatch.setattr(recipe, "SHOWN", 1024)
    monkeypatch.setattr(recipe, "needed", lambda *_: 1234)
    short = ["--text", documents(tmp_path, "notes", 6, 30)]
    assert main(["predictor", "train", str(folder), *short, "--tokens", "1024"]) == 2
    said = capsys.readouterr().err
    assert "text: expected 512 tokens or more to train on" in said
    assert re.search(r"give about [\d,]+ tokens more, some \d+ kB", said)

    enough = ["--text", documents(tmp_path, "letters", 90, 10), documents(tmp_path, "verse", 20, 10)]
    made = ["predictor", "train", str(folder), *enough, "--heldout-domains", "verse", "--tokens", "1024"]
    assert main(made) == 0
    said = capsys.readouterr().err
    record = json.loads((folder / "predictor" / "verdict.json").read_text())
    assert record["forecast"] in ("llapor", "gate")
    assert re.search(r"llapor: recall \d+\.\d % 1 layers ahead", said)
    assert ("policy 'auto' uses it" in said) == (record["forecast"] == "llapor")
    assert ("about 1,234 tokens more" in said) == (record["forecast"] == "gate")
    assert record["trained_tokens"] >= 512

    model = load(folder)
    other = random_model(replace(TINY, num_layers=2))
    for forecast in ("gate", "llapor"):
        (folder / "predictor" / "verdict.json").write_text(json.dumps({**record, "forecast": forecast}))
        best = measured_predictor(folder, model)
        assert best == "gate" if forecast == "gate" else isinstance(best, LLaPor)
    options = Generate(checkpoint=str(folder), prompt=("Once",))
    assert isinstance(options.measured(OffloadConfig(), model).predictor, LLaPor)
    assert replace(options, policy="lru").measured(OffloadConfig(), model).predictor is None
    asked = replace(options, predictor="gate")
    assert asked.measured(asked.engine_config(), model).predictor == "gate"
    assert measured_predictor(folder, other) is None
    assert "belongs to another model" in capsys.readouterr().err
    (folder / "predictor" / "verdict.json").write_text('{"forecast": "best"}')
    with pytest.raises(
        ValueError, match="forecast must be one of llapor, gate, got 'best'; measure it again"
    ):
        measured_predictor(folder, model)
    assert measured_predictor(tmp_path, model) is None


def test_a_verdict_says_what_would_help(tmp_path):
    behind = Verdict(
        forecast="gate",
        horizons=(1, 2),
        recall={"llapor": [0.8, 0.7], "gate": [0.85, 0.75]},
        lead=-0.05,
        error=0.01,
        heldout_tokens=900,
        trained_tokens=8192,
        more_tokens=20_000,
    )
    lines = told(behind, tmp_path, used=True)
    assert lines[0] == "llapor: recall 80.0, 70.0 % 1, 2 layers ahead"
    assert "-5.0 points" in lines[2]
    assert lines[-1].endswith("about 20,000 tokens more to train on would put it ahead")
    assert told(replace(behind, more_tokens=None), tmp_path, used=True)[-1].endswith("not seen to help")
    ahead = replace(behind, forecast="llapor", more_tokens=None)
    assert told(ahead, tmp_path, used=False)[-1].endswith(f"use it with --predictor {tmp_path}")


def test_tokens_that_are_missing_are_told_from_two_trainings():
    assert more_tokens(1000, wrong=0.1, wrong_at_quarter=0.2, gate_wrong=0.1) == 0
    assert more_tokens(1000, wrong=0.2, wrong_at_quarter=0.2, gate_wrong=0.1) is None
    assert more_tokens(1000, wrong=0.2, wrong_at_quarter=0.4, gate_wrong=0.05) == 15_000
