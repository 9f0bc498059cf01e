"""Every option that takes a file or a folder, and one that is missing, empty, or of another kind."""

import os
import re

import pytest
from command_lines import refusal

from layerscope_jax.cli import main as cli

GENERATE = ["generate", "CHECKPOINT", "--prompt=x"]
PLACES = {
    "checkpoint": (["generate", "PLACE", "--prompt=x"], "PLACE"),
    "demo": (["demo", "PLACE"], "PLACE"),
    "--prompts": (["generate", "CHECKPOINT", "--prompts=PLACE"], "--prompts: PLACE"),
    "--json-schema": ([*GENERATE, "--json-schema=PLACE"], "--json-schema: PLACE"),
    "--profile": ([*GENERATE, "--profile=PLACE"], "--profile: .*PLACE"),
    "--predictor": ([*GENERATE, "--predictor=PLACE"], "--predictor: PLACE"),
    "simulate --profile": (["simulate", "--profile=PLACE"], "--profile: .*PLACE"),
    "simulate --trace": (["simulate", "--profile=mixtral-8x7b", "--trace=PLACE"], "--trace: PLACE"),
    "trace --text": (["trace", "CHECKPOINT", "--out=OUT", "--text", "PLACE"], "text: PLACE"),
    "trace --text as lines": (["trace", "CHECKPOINT", "--out=OUT", "--text", "PLACE"], "text: PLACE"),
}
CONTENTS = {
    "missing": None,
    "empty": b"",
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "list": b"[]\n",
    "null": b"null\n",
    "folder": "folder",
    "unreadable": "unreadable",
    "device": "device",
}


def put(command, **names):
    """A command with these in place of their names."""
    return [re.sub("[A-Z]{3,}", lambda found: str(names[found[0]]), part) for part in command]


def listing(folder):
    return sorted((path, path.read_bytes() if path.is_file() else None) for path in folder.rglob("*"))


# Of the contents of files, some are texts as good as any.
CASES = [
    (option, content)
    for option in PLACES
    for content in CONTENTS
    if option != "trace --text" or content not in ("empty", "deep", "list", "null", "device")
]


@pytest.mark.parametrize(("option", "content"), CASES)
def test_it_is_named_in_one_line(option, content, tiny, tmp_path, capsys):
    command, expected = PLACES[option]
    place = tmp_path / ("place.jsonl" if "lines" in option else "place")
    match CONTENTS[content]:
        case None:
            pass
        case "folder":
            place.mkdir()
        case "unreadable":
            if os.name != "posix" or os.geteuid() == 0:
                pytest.skip("who runs this may read everything")
            place.touch(mode=0)
        case "device":
            place.symlink_to(os.devnull)
        case found:
            place.write_bytes(found)
    command = put(command, CHECKPOINT=tiny, OUT=tmp_path / "out", PLACE=place)
    before = listing(tmp_path)
    said = refusal(capsys, *command)
    assert re.match(expected.replace("PLACE", re.escape(str(place))), said), said
    assert len(said) < 600
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "CHECKPOINT", "--prompt=x", "--out=PLACE"],
        ["calibrate", "CHECKPOINT", "--out=PLACE"],
        ["simulate", "--profile=mixtral-8x7b", "--out=PLACE"],
        ["trace", "CHECKPOINT", "--text", "TEXT", "--heldout-domains=texts", "--out=PLACE"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("kind", ["other", "below a file", "too long"])
def test_places_to_write(command, kind, tiny, tmp_path, capsys):
    """A folder for a file, and the other way round; a place that no folder can be made for."""
    place, text = tmp_path / "place", tmp_path / "texts" / "text.txt"
    text.parent.mkdir()
    text.write_text("The Nation continues to enjoy peace. " * 8)
    if kind == "other":
        place.touch() if command[0] == "trace" else place.mkdir()
    elif kind == "below a file":
        place.touch()
        place = place / "below"
    else:
        place = tmp_path / ("x" * 300)
    command = put(command, CHECKPOINT=tiny, TEXT=text, PLACE=place)
    before = listing(tmp_path)
    said = refusal(capsys, *command)
    if command[0] != "trace":
        assert said.startswith("--out")
    assert str(tmp_path / "place") in said or "xxx: File name too long" in said
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("quick_compiles")
def test_a_pipe_is_read_if_somebody_writes_to_it(tiny, tmp_path, capsys):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes with names")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "a pipe without a writer" in refusal(capsys, "generate", tiny, f"--prompts={pipe}")
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "x", "id": "piped"}\n')
    os.close(writing)
    command = ["generate", str(tiny), f"--prompts=/dev/fd/{reading}", "--max-new-tokens=1"]
    assert cli.main(command) == 0
    os.close(reading)
    assert '"id": "piped"' in capsys.readouterr().out
