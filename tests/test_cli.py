"""The command line as its users see it: what it prints and writes, what it refuses and how it says so."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import jax
import pytest
from helpers import TINY, random_decoder
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import layerscope_jax
from layerscope_jax import cli, demo, demo_view
from layerscope_jax.batch_files import Completions, Row, completion, read_prompts
from layerscope_jax.complete import Live
from layerscope_jax.generation import Request, Token
from layerscope_jax.training.tokenizer import train_tokenizer

PROMPTS = [
    {"id": "sea", "prompt": "Call me Ishmael."},
    {"id": 7, "prompt": "ein Löffel: 匙\u2028", "max_new_tokens": 3},
    {"id": "ids", "prompt": [5, 6, 7], "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3, "note": "x"},
    {"id": "stop", "prompt": "x", "stop_tokens": list(range(600))},
]

MODEL = "1b06093c6a5c"
LINE = {"id", "prompt", "text", "tokens", "finish", "settings", "model"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer([row["prompt"] for row in demo.read_demo_prompts()], vocabulary=600)
    config = replace(TINY, vocab_size=600, num_layers=2, max_positions=256, qk_norm="all")
    layerscope_jax.save(random_decoder(config), folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.fixture
def prompts(tmp_path):
    """A file of four prompts."""
    return write(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def report(tiny):
    """What `demo --json` prints; nothing else may stand beside it."""
    found = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", found)
        code = cli.main(
            [
                "demo",
                "--json",
                f"--checkpoint={tiny}",
                "--policies=lru",
                "host-only",
                "--budget-share=0.6",
                "--max-new-tokens=3",
            ]
        )
    assert code == 0
    return json.loads(found.getvalue())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def refusal(capsys, *args):
    """The message of a command that is refused."""
    assert cli.main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


class TestTop:
    def test_alone_it_prints_help(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main([])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert "demo" in out
        assert "generate" in out

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out.startswith("layerscope-jax ")

    def test_unknown_options_are_refused(self):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["generate", "x", "--tokens", "3"])
        assert stopped.value.code == 2

    def test_no_traceback(self):
        command = [sys.executable, "-m", "layerscope_jax.cli", "generate", "nowhere", "--prompt", "x"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == (
            "error: nowhere: expected a folder with config.json and safetensors files, found none\n"
        )

    @pytest.mark.parametrize(("first", "devices"), [("pass", 2), ("jax.devices()", 1)])
    def test_makes_a_host_device_where_it_still_can(self, tiny, first, devices):
        program = f"import jax; from layerscope_jax.cli import open_model; {first}; open_model({str(tiny)!r})"
        program += "; print(len(jax.devices('cpu')))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (f"{devices}\n", "")


class TestDemo:
    def test_shipped_prompts(self):
        rows = demo.read_demo_prompts()
        assert len(rows) == len({row["id"] for row in rows}) == 8
        assert {row["domain"] for row in rows} == {
            "novels",
            "verse",
            "speeches",
            "python-source",
            "python-docs",
        }

    def test_report(self, report):
        assert report["exact"] is True
        assert [(run["policy"], run["mode"]) for run in report["runs"]] == [
            ("resident", "whole"),
            ("resident", "layers"),
            ("lru", "layers"),
            ("host-only", "layers"),
        ]
        total = report["model"]["total_expert_bytes"]
        for run in report["runs"]:
            assert {"tokens_per_s", "ttft_s", "tpot_s", "hit_rate", "bytes_moved"} <= run.keys()
            assert run["budget_bytes"] == (total if run["policy"] == "resident" else int(0.6 * total))
            assert run["same_tokens"]
            assert run["programs_compiled"] == 0
        assert [len(row["tokens"]) for row in report["prompts"]] == [3] * 8
        assert {"layerscope-jax", "jax", "python"} <= report["versions"].keys()

    @pytest.mark.parametrize("width", [80, 120])
    def test_fits_the_terminal(self, report, width):
        console = Console(file=StringIO(), width=width, highlight=False)
        demo_view.show(report, console)
        text = console.file.getvalue()
        assert max(map(len, text.split("\n"))) <= width
        assert "…" not in text  # rich cuts cells that do not fit
        text = " ".join(text.split())
        assert "All 4 runs gave the same 24 tokens." in text
        assert "no compilation is in the figures" in text
        assert "With 60% of the experts' bytes on the device" in text

    def test_other_tokens_end_in_1(self, report, monkeypatch, capsys):
        runs = [run | {"same_tokens": run["policy"] != "lru"} for run in report["runs"]]
        monkeypatch.setattr(demo, "compare", lambda *_, **__: report | {"exact": False, "runs": runs})
        monkeypatch.setattr(cli, "open_model", lambda *_: None)
        assert cli.main(["demo"]) == 1
        assert "layer by layer: lru." in capsys.readouterr().out
        assert cli.main(["demo", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["exact"] is False

    def test_one_jit_may_round_differently(self, report, tiny, monkeypatch):
        class Rounding(demo.Engine):
            def generate(self, *args, **settings):
                result = super().generate(*args, **settings)
                if result.stats.mode == "whole":
                    result.tokens[0][0] += 1
                return result

        monkeypatch.setattr(demo, "Engine", Rounding)
        found = demo.compare(
            layerscope_jax.load(tiny),
            demo.read_demo_prompts()[:2],
            policies=["host-only"],
            max_new_tokens=2,
            budget_share=0.6,
            link_bandwidth=None,
        )
        assert found["exact"] is True
        assert [run["same_tokens"] for run in found["runs"]] == [False, True, True]
        assert "the same 4 tokens; one jit rounds differently" in demo_view.verdict(found).plain

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--policies", "best"], "policy must be one of"),
            (["--budget-share", "1.5"], "budget-share must lie between 0 and 1, got 1.5"),
            (["--budget-share", "0.1"], "device_budget is too small for policy 'on-demand'"),
            (["--link-bandwidth", "fast"], "link_bandwidth must be a size such as '8GiB'"),
            (
                ["--policies", "host-only", "--max-new-tokens", "0"],
                "max_new_tokens must be a whole number in 1..2**31-1, got 0",
            ),
        ],
    )
    def test_refusals(self, tiny, capsys, args, message):
        assert message in refusal(capsys, "demo", f"--checkpoint={tiny}", *args)


class TestGenerate:
    def test_texts(self, tiny, capsys):
        code = cli.main(["generate", str(tiny), "--prompt=The sea", "--prompt=def f", "--max-new-tokens=4"])
        out, err = capsys.readouterr()
        assert code == 0
        with layerscope_jax.Engine(layerscope_jax.load(tiny)) as engine:
            texts = engine.generate(["The sea", "def f"], max_new_tokens=4).texts
        assert out == "".join(text + "\n" for text in texts)
        assert "8 tokens for 2 prompts" in err
        assert "100% hits" in err

    def test_rows_to_stdout(self, tiny, prompts, capsys):
        code = cli.main(["generate", str(tiny), f"--prompts={prompts}", "--max-new-tokens=5"])
        assert code == 0
        rows = {row["id"]: row for row in map(json.loads, capsys.readouterr().out.split("\n")[:-1])}
        assert list(rows) == ["stop", 7, "sea", "ids"]  # as they are complete
        assert [len(rows[row["id"]]["tokens"]) for row in PROMPTS] == [5, 3, 5, 1]
        assert [rows[row["id"]]["prompt"] for row in PROMPTS] == [row["prompt"] for row in PROMPTS]
        assert all(row.keys() == LINE for row in rows.values())
        assert rows["ids"]["settings"]["seed"] == 3
        assert rows[7]["settings"] == {
            "max_new_tokens": 3,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "seed": 0,
            "stop_tokens": None,
        }
        assert [rows[row["id"]]["finish"] for row in PROMPTS] == ["length", "length", "length", "stop"]
        assert rows["stop"]["text"] == ""

    def test_goes_on_with_a_file(self, tiny, prompts, tmp_path, capsys):
        out = tmp_path / "out.jsonl"
        budget = ["--device-budget=20KB", "--policy=host-only", "--numerics=exact", "--batch-size=1"]
        command = [
            "generate",
            str(tiny),
            f"--prompts={prompts}",
            f"--out={out}",
            "--max-new-tokens=5",
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

    def test_an_interrupted_run_keeps_whole_rows(self, tiny, prompts, tmp_path, monkeypatch, capsys):
        out = tmp_path / "out.jsonl"

        def interrupted(engine, rows, *, on_row, **_):
            on_row(rows[0], "text", [1, 2], "length")
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "complete", interrupted)
        assert cli.main(["generate", str(tiny), f"--prompts={prompts}", f"--out={out}"]) == 130
        assert "interrupted; the same command goes on" in capsys.readouterr().err
        assert [row["id"] for row in read(out)] == ["sea"]

    def test_failed_copies_are_one_line(self, tiny, monkeypatch, capsys):
        def failing(*_, **__):
            raise layerscope_jax.TransferError("copying expert 3 of layer 0 failed")

        monkeypatch.setattr(cli, "complete", failing)
        assert "copying expert 3" in refusal(capsys, "generate", tiny, "--prompt", "x")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers:"),
                "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; "
                "give a smaller --device-budget or --batch-size",
            ),
            (MemoryError(), "out of memory: none is left; give a smaller --device-budget or --batch-size"),
            (RuntimeError("no backend"), "no backend"),
        ],
    )
    def test_lack_of_memory_is_one_line(self, tiny, monkeypatch, capsys, error, message):
        def failing(*_, **__):
            raise error

        monkeypatch.setattr(cli, "complete", failing)
        assert refusal(capsys, "generate", tiny, "--prompt", "x") == message

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
    def test_a_full_device_is_named(self, tiny, prompts, capsys):
        args = ("generate", str(tiny), f"--prompts={prompts}", "--out=/dev/full", "--max-new-tokens=1")
        assert refusal(capsys, *args) == "/dev/full: No space left on device"

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (
                ["--max-new-tokens=4"],
                ":1: expected a completion .*, got max_new_tokens 5 .now 4.; go on with",
            ),
            (["--temperature=0.5", "--seed=1"], ":1: .*, got temperature 0.0 .now 0.5., seed 0 .now 1.;"),
            (["--dtype=bfloat16"], r":1: .*, got model (\w{12}) .now \1 as bfloat16.;"),
        ],
    )
    def test_other_settings_do_not_go_on_with_a_file(self, tiny, prompts, tmp_path, capsys, args, message):
        out = tmp_path / "out.jsonl"
        command = ["generate", str(tiny), f"--prompts={prompts}", f"--out={out}", "--max-new-tokens=5"]
        assert cli.main(command) == 0
        whole = out.read_bytes()
        capsys.readouterr()
        assert re.search(f"out.jsonl{message}", refusal(capsys, *command, *args))
        assert out.read_bytes() == whole

    def test_another_checkpoint_does_not_go_on_with_a_file(self, tiny, prompts, tmp_path, capsys):
        out, other = tmp_path / "out.jsonl", tmp_path / "other"
        shutil.copytree(tiny, other)
        command = [f"--prompts={prompts}", f"--out={out}", "--max-new-tokens=1"]
        assert cli.main(["generate", str(tiny), *command]) == 0
        assert cli.main(["generate", str(other), *command]) == 0  # a copy of it is the same
        weights = bytearray((other / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (other / "model.safetensors").write_bytes(weights)
        capsys.readouterr()
        assert ":1: expected a completion by this checkpoint" in refusal(capsys, "generate", other, *command)

    def test_letters_that_the_terminal_lacks(self, tiny):
        program = (
            "import sys; from layerscope_jax import cli; from layerscope_jax.generation import Token; "
            "cli.complete = lambda engine, rows, on_token, **_: (on_token(Token(0, 1, '\u2603', 'stop')), "
            "sys.exit(0)); cli.main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, "generate", str(tiny), "--prompt=x"],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
        assert (done.returncode, done.stdout) == (0, b"\\u2603\n")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([], "expected either --prompt TEXT or --prompts FILE, got neither"),
            (["--prompt=x", "--prompts=y"], "expected either --prompt TEXT or --prompts FILE, got both"),
            (["--prompt=x", "--policy=best"], "policy must be one of"),
            (["--prompt=x", "--device-budget=2 gigs"], "device_budget must be a size such as '8GiB'"),
            (["--prompt=x", "--device-budget=1KB"], "device_budget is too small for policy 'lru'"),
            (["--prompt=x", "--link-bandwidth=0"], "link_bandwidth must be more than 0"),
            (["--prompt=x", "--batch-size=0"], "batch-size must be 1 or more, got 0"),
            (["--prompt=x", "--top-p=0"], "top_p must be a number in (0, 1], got 0.0"),
            (["--prompt=x", "--device-budget=" + "9" * 400 + "TiB"], "device_budget must be less than 2**63"),
            (["--prompt=a\udcffb"], "the prompt holds half a surrogate pair"),
            (["--prompt="], "--prompt '': the prompt is empty"),
            (["--prompt=" + "long " * 300], "the model's context holds 256 with at least one new one"),
        ],
    )
    def test_refusals(self, tiny, capsys, args, message):
        assert message in refusal(capsys, "generate", tiny, *args)

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (
                '{"prompt": "x"}\nnot json\n',
                ':2: expected a JSON object {"prompt": ...}, got Expecting value',
            ),
            ("[1]\n", ':1: expected a JSON object {"prompt": ...}, got [1]'),
            ('{"promt": "x"}\n', ":1: expected a prompt that is text or a list of token ids, got none"),
            (
                '{"prompt": [1, true]}\n',
                ":1: prompt must be text or a list of token ids, got [1, True]",
            ),
            ('{"prompt": "\\ud800"}\n', ":1: the prompt holds half a surrogate pair"),
            ('{"prompt": "x", "id": 1.5}\n', ":1: expected an id that is a string or an integer, got 1.5"),
            ('{"prompt": "x", "id": "\\udfff"}\n', ":1: the id holds half a surrogate pair"),
            ('{"prompt": null}\n', ":1: prompt must be text or a list of token ids, got None"),
            ('{"prompt": "x", "top_k": "3"}\n', ":1: top_k must be a whole number, 0 (all) or more, got '3'"),
            (f'{{"prompt": "x", "temperature": {"9" * 400}}}\n', ":1: temperature must be a number from 0"),
            ('{"prompt": "x", "stop_tokens": [true]}\n', ":1: stop_tokens must be a list of token ids"),
            (
                '{"prompt": "x", "max_tokens": 3}\n',
                ":1: unknown key 'max_tokens'; did you mean 'max_new_tokens'?",
            ),
            ('{"prompt": "x", "temperature": -1}\n', ":1: temperature must be a number from 0 (greedy) to"),
            ('{"prompt": "x", "id": 1}\n{"prompt": "y"}\n', ":2: id 1 is taken by "),
            ('{"prompt": "x"}\n\n{"prompt": ""}\n', ":3: the prompt is empty; it needs at least one token"),
            ('{"prompt": [600]}\n', ":1: the prompt has ids outside 0..599: [600]"),
            ("\n", ': expected lines {"prompt": ...}, found none'),
        ],
    )
    def test_bad_lines(self, tiny, tmp_path, capsys, lines, message):
        file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
        file.write_text(lines)
        assert refusal(capsys, "generate", tiny, f"--prompts={file}", f"--out={out}").startswith(
            f"{file}{message}"
        )
        assert not out.exists()

    def test_files_that_cannot_be_used(self, tiny, prompts, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(cli, "open_model", lambda *_: pytest.fail("it must be refused before"))
        start = ("generate", tiny, f"--prompts={prompts}")
        missing = f"--prompts={tmp_path / 'none'}"
        assert "none: expected a file of prompts, got No such file" in refusal(capsys, *start[:2], missing)
        assert "cannot write to" in refusal(capsys, *start, f"--out={tmp_path / 'none' / 'out.jsonl'}")
        assert "Is a directory" in refusal(capsys, *start, f"--out={tmp_path}")
        before = prompts.read_bytes()
        assert "--out is the file of prompts" in refusal(capsys, *start, f"--out={prompts}")
        assert prompts.read_bytes() == before

    def test_a_read_only_folder(self, tiny, prompts, tmp_path, capsys, monkeypatch):
        def refuse(path, mode="r", **settings):  # without this, a superuser may write anywhere
            if "a" in mode:
                raise PermissionError(13, "Permission denied")
            return open(path, mode, **settings)

        monkeypatch.setattr(Path, "open", refuse)
        message = refusal(capsys, "generate", tiny, f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}")
        assert message.endswith("Permission denied; choose a file in a folder that is there and yours")

    def test_damaged_checkpoints(self, tiny, tmp_path, capsys):
        folder = tmp_path / "model"
        folder.mkdir()
        assert "config.json: expected this file, found none" in refusal(
            capsys, "generate", folder, "--prompt=x"
        )
        (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        assert "expected one of the architectures" in refusal(capsys, "generate", folder, "--prompt=x")
        (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-9])
        assert "expected a complete safetensors file" in refusal(capsys, "generate", folder, "--prompt=x")
        (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
        assert "came without tokenizer.json" in refusal(capsys, "generate", folder, "--prompt=x")


class TestCompletions:
    @pytest.fixture
    def rows(self, prompts):
        return read_prompts(prompts, {})

    def test_ids_default_to_the_number(self, tmp_path):
        file = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "id": "x"}, {"prompt": "c"}])
        assert [row.id for row in read_prompts(file, {})] == [0, "x", 2]

    def test_cut_at_every_byte_of_the_last_line(self, rows, tmp_path):
        file = tmp_path / "out.jsonl"
        lines = [completion(row, "Löffel 匙", [1, 2], "stop", MODEL) for row in rows]
        whole = b"".join(lines)
        for length in range(len(whole) - len(lines[-1]), len(whole)):
            file.write_bytes(whole[:length])
            with Completions(file, rows, MODEL) as found:
                assert found.done == {"sea", 7, "ids"}
                assert file.read_bytes() == b"".join(lines[:-1])
                found.write(lines[-1])
            assert file.read_bytes() == whole

    @given(st.binary(min_size=1, max_size=80))
    def test_other_files_are_left_alone(self, tmp_path_factory, content):
        file = tmp_path_factory.mktemp("other") / "out"
        file.write_bytes(content)
        row = Row("a", Request(prompt="b"), "")
        if not completion(row, "", [], "", MODEL).startswith(content):
            with pytest.raises(ValueError, match="the file belongs to other prompts"):
                Completions(file, [row], MODEL)
            assert file.read_bytes() == content

    def test_other_prompts_are_refused(self, rows, tmp_path):
        file = tmp_path / "out.jsonl"
        for line in (
            completion(Row("sea", Request(prompt="Call me Ahab."), ""), "", [], "stop", MODEL),
            completion(Row("ocean", rows[0].request, ""), "", [], "stop", MODEL),
            b'{"id": "sea", "prompt": "Call me Ishmael."}\n',
            b"\n",
        ):
            file.write_bytes(line)
            with pytest.raises(ValueError, match="jsonl:1: expected a completion of one of these prompts"):
                Completions(file, rows, MODEL)
            assert file.read_bytes() == line

    def test_a_full_disk_leaves_whole_lines(self, rows, tmp_path):
        class Full:
            """Takes half of what it is given, then nothing."""

            def __init__(self, file):
                self.file = file
                self.full = False

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, data):
                if self.full:
                    raise OSError(28, "No space left on device")
                self.full = True
                return self.file.write(data[: len(data) // 2])

        file = tmp_path / "out.jsonl"
        line = completion(rows[0], "text", [1], "stop", MODEL)
        with Completions(file, rows, MODEL) as found:
            found.write(line)
            found._file = Full(found._file)
            with pytest.raises(OSError, match=r"No space left on device: '.*out.jsonl'"):
                found.write(completion(rows[1], "text", [1], "stop", MODEL))
        assert file.read_bytes() == line


class TestLive:
    def test_texts_come_in_order(self, monkeypatch, capsys):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "dumb")  # nothing is dimmed
        live = Live([Row(i, Request(prompt=f"p{i}"), "") for i in range(3)])
        shown = [capsys.readouterr().out]
        for request, text, finish in ((0, "a", None), (1, "b", "stop"), (2, "c", None), (0, "d", "length")):
            live(Token(request, 0, text, finish))
            shown.append(capsys.readouterr().out)
        live(Token(2, 0, "e", "length"))
        shown.append(capsys.readouterr().out)
        assert shown == ["p0", "a", "", "", "d\n\np1b\n\np2c", "e\n"]
