"""Commands that write where another run is writing."""

import re

import pytest

from layerscope_jax.cli import main as cli
from layerscope_jax.support.locks import locked

HOLDER = r"being written by another run \(process \d+ on \S+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)"


def listing(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def text(tmp_path):
    file = tmp_path / "letters.txt"
    file.write_text("The Nation continues to enjoy peace. " * 8)
    return str(file)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "CHECKPOINT", "--prompt=x", "--out=OUT"],
        ["calibrate", "CHECKPOINT", "--out=OUT"],
        ["simulate", "--profile=mixtral-8x7b", "--out=OUT"],
        ["trace", "CHECKPOINT", "--out=OUT", "--heldout-domains", "texts", "--text", "TEXT"],
    ],
    ids=lambda command: command[0],
)
def test_commands(command, tiny, tmp_path, capsys, monkeypatch):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    names = {"CHECKPOINT": str(tiny), "OUT": str(out), "TEXT": text(texts)}
    command = [re.sub("[A-Z]{3,}", lambda found: names[found[0]], part) for part in command]
    if command[0] == "trace":
        out.mkdir()
    with locked(out):
        before = listing(tmp_path)
        assert cli.main(command) == 2
        assert re.match(f"error: .*{HOLDER}", capsys.readouterr().err)
        assert listing(tmp_path) == before
