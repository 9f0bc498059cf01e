"""`layerscope generate`: what it prints and writes, and how it goes on with what is left half done."""

import json
import re
import shutil
import sys
from io import BytesIO, TextIOWrapper

import pytest
from command_lines import PROMPTS, read, refusal, write

import layerscope_jax
from layerscope_jax.cli import main as cli
from layerscope_jax.generation.completions import Output, Token
from layerscope_jax.generation.requests import CHAT, DEFAULTS

pytestmark = pytest.mark.usefixtures("quick_compiles")

LINE = {"id", "prompt", "text", "token_ids", "finish_reason", "settings", "model"}


def test_texts(tiny, capsys):
    code = cli.main(["generate", str(tiny), "--prompt=The sea", "--prompt=def f", "--max-new-tokens=4"])
    out, err = capsys.readouterr()
    assert code == 0
    with layerscope_jax.Engine(layerscope_jax.load(tiny)) as engine:
        texts = engine.generate(["The sea", "def f"], max_new_tokens=4).texts
    assert out == "".join(text + "\n" for text in texts)
    assert "8 tokens for 2 prompts" in err
    assert "100% hits" in err


def test_experts_and_dense_layers_are_converted_to_formats(tiny, capsys):
    formats = ["--expert-format=int8", "--dense-format=int8"]
    assert cli.main(["generate", str(tiny), "--prompt=The sea", "--max-new-tokens=3", *formats]) == 0
    model = layerscope_jax.load(tiny, format="int8", dense_format="int8")
    with layerscope_jax.Engine(model) as engine:
        (text,) = engine.generate(["The sea"], max_new_tokens=3).texts
    assert capsys.readouterr().out == text + "\n"


def test_json_by_a_schema(tiny, tmp_path, capsys):
    file = tmp_path / "schema.json"
    file.write_text('{"enum": ["red", "green"]}')
    assert cli.main(["generate", str(tiny), "--prompt=A colour: ", f"--json-schema={file}"]) == 0
    assert json.loads(capsys.readouterr().out) in ("red", "green")


def test_rows_to_stdout(tiny, prompts, capsys):
    code = cli.main(["generate", str(tiny), f"--prompts={prompts}"])
    assert code == 0
    rows = {row["id"]: row for row in map(json.loads, capsys.readouterr().out.split("\n")[:-1])}
    assert list(rows) == ["stop", 7, "sea", "ids"]  # as they are complete
    assert [len(rows[row["id"]]["token_ids"]) for row in PROMPTS] == [5, 3, 5, 1]
    assert [rows[row["id"]]["prompt"] for row in PROMPTS] == [row["prompt"] for row in PROMPTS]
    assert all(row.keys() - {"stop_reason"} == LINE for row in rows.values())
    assert [row.get("stop_reason") for row in rows.values()] == [
        rows["stop"]["token_ids"][0],
        None,
        None,
        None,
    ]
    assert rows["ids"]["settings"]["seed"] == 3
    assert rows[7]["settings"] == {
        **{name: value for name, value in DEFAULTS.items() if name not in CHAT},
        "max_new_tokens": 3,
    }
    assert [rows[row["id"]]["finish_reason"] for row in PROMPTS] == ["length", "length", "length", "stop"]
    assert rows["stop"]["text"] == ""


def test_goes_on_with_a_file(tiny, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    budget = ["--device-budget=20KB", "--policy=host-only", "--numerics=auto", "--max-num-seqs=1"]
    command = [
        "generate",
        str(tiny),
        f"--prompts={prompts}",
        f"--out={out}",
        *budget,
    ]
    assert cli.main(command) == 0
    assert "host-only, 0.0 of 0.1 MB" in capsys.readouterr().err
    whole = out.read_bytes()
    assert [row["id"] for row in read(out)] == ["sea", 7, "ids", "stop"]
    out.write_bytes(whole[:-20])
    assert cli.main(command) == 0
    assert out.read_bytes() == whole  # sampling hangs on the row's own seed alone
    assert "out.jsonl has 3 of 4 completions already" in capsys.readouterr().err
    assert cli.main(command) == 0  # nothing left to do
    assert out.read_bytes() == whole


def test_an_interrupted_run_keeps_whole_rows(tiny, prompts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"

    def interrupted(engine, rows, requests, *, on_row, **_):
        on_row(rows[0], [Output(text="text", token_ids=[1, 2], finish_reason="length")])
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "complete", interrupted)
    assert cli.main(["generate", str(tiny), f"--prompts={prompts}", f"--out={out}"]) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert [row["id"] for row in read(out)] == ["sea"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--max-new-tokens=4"],
            ":1: expected a completion .*, got max_new_tokens 5 .now 4.; use those of",
        ),
        (["--temperature=0.5", "--seed=1"], ":1: .*, got temperature 0.0 .now 0.5., seed 0 .now 1.;"),
        (["--dtype=bfloat16"], r":1: .*, got model (\w{12}) .now \1 as bfloat16.;"),
        (["--expert-format=int8"], r":1: .*, got model (\w{12}) .now \1 with experts in int8.;"),
        (["--dense-format=int8"], r":1: .*, got model (\w{12}) .now \1 with dense layers in int8.;"),
    ],
)
def test_other_settings_do_not_go_on_with_a_file(tiny, tmp_path, capsys, args, message):
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in PROMPTS]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "out.jsonl"
    command = ["generate", str(tiny), f"--prompts={prompts}", f"--out={out}", "--max-new-tokens=5"]
    assert cli.main(command) == 0
    whole = out.read_bytes()
    capsys.readouterr()
    assert re.search(f"out.jsonl{message}", refusal(capsys, *command, *args))
    assert out.read_bytes() == whole


def test_another_checkpoint_does_not_go_on_with_a_file(tiny, prompts, tmp_path, capsys):
    out, other = tmp_path / "out.jsonl", tmp_path / "other"
    shutil.copytree(tiny, other)
    command = [f"--prompts={prompts}", f"--out={out}"]
    assert cli.main(["generate", str(tiny), *command]) == 0
    assert cli.main(["generate", str(other), *command]) == 0  # a copy of it is the same
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    capsys.readouterr()
    assert ":1: expected a completion by this checkpoint" in refusal(capsys, "generate", other, *command)


def test_letters_that_the_terminal_lacks(tiny, monkeypatch):
    def says_snowman(engine, rows, requests, on_token, **_):
        on_token(Token(0, 1, "\u2603", "stop"))
        raise KeyboardInterrupt

    terminal = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "complete", says_snowman)
    assert cli.main(["generate", str(tiny), "--prompt=x"]) == 130
    terminal.flush()
    assert terminal.buffer.getvalue() == b"\\u2603\n"
