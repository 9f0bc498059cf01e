"""What `layerscope generate` refuses and how it says so, and what it says when a run fails."""

from pathlib import Path

import jax
import pytest
from command_lines import refusal

import layerscope_jax
from layerscope_jax.cli import main as cli
from layerscope_jax.generation.prompt_files import read_prompts

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected either --prompt TEXT or --prompts FILE, got neither"),
        (["--prompt=x", "--prompts=y"], "expected either --prompt TEXT or --prompts FILE, got both"),
        (["--prompt=x", "--policy=best"], "policy must be one of"),
        (["--prompt=x", "--expert-format=int3"], "--expert-format: expected one of the formats float32, "),
        (["--prompt=x", "--device-budget=2 gigs"], "device_budget must be a size such as '8GiB'"),
        (
            ["--prompt=x", "--policy=lru", "--device-budget=1KB"],
            "device_budget is too small for policy 'lru'",
        ),
        (["--prompt=x", "--emulated-link-bandwidth=0"], "emulated_link_bandwidth must be more than 0"),
        (["--prompt=x", "--max-num-seqs=0"], "max_num_seqs must be 1 or more, got 0"),
        (["--prompt=x", "--top-p=0"], "top_p must be a number in (0, 1], got 0.0"),
        (["--prompt=x", "--device-budget=" + "9" * 400 + "TiB"], "device_budget must be less than 2**63"),
        (["--prompt=a\udcffb"], "the prompt holds half a surrogate pair"),
        (["--prompt="], "--prompt '': the prompt is empty"),
        (["--prompt=" + "long " * 300], "the model's context holds 256, including at least one new token"),
    ],
)
def test_refusals(tiny, capsys, args, message):
    assert message in refusal(capsys, "generate", tiny, *args)


def test_a_schema_that_is_none(tiny, tmp_path, capsys):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "frog"}')
    said = refusal(capsys, "generate", tiny, "--prompt=x", f"--json-schema={file}")
    assert "json_schema must be one that llguidance takes (Invalid type: frog" in said


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
        (
            '{"prompt": "x", "top_k": "3"}\n',
            ":1: top_k must be a whole number, 0 (all) or more, or -1, got '3'",
        ),
        (f'{{"prompt": "x", "temperature": {"9" * 400}}}\n', ":1: temperature must be a number from 0"),
        ('{"prompt": "x", "stop_token_ids": [true]}\n', ":1: stop_token_ids must be a list of token ids"),
        (
            '{"prompt": "x", "max_tokens": 3}\n',
            ":1: unknown key 'max_tokens'; did you mean 'max_new_tokens'?",
        ),
        ('{"prompt": "x", "temperature": -1}\n', ":1: temperature must be a number from 0 (greedy) to"),
        ('{"prompt": "x", "id": 1}\n{"prompt": "y"}\n', ":2: id 1 is used by "),
        ('{"prompt": "x"}\n\n{"prompt": ""}\n', ":3: the prompt is empty; it needs at least one token"),
        ('{"prompt": [600]}\n', ":1: the prompt has ids outside 0..599: [600]"),
        ("\n", ': expected lines {"prompt": ...}, got none'),
        ('{"prompt": "x", "n": 2}\n', ":1: n must be 1 at temperature 0"),
        ('{"prompt": "x", "qqq": 2}\n', ":1: unknown key 'qqq'; known keys are id, prompt, messages, "),
        ('{"prompt": "x", "messages": []}\n', ":1: expected either a prompt or messages, got both"),
        ('{"messages": "x"}\n', ":1: messages must be a list of"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}\n',
            ":1: the prompt: expected the checkpoint to have",
        ),
        ('{"messages": [{"role": "user"}]}\n', ":1: messages must be a list of"),
        ('{"prompt": "x", "logit_bias": {"a": 1}}\n', ":1: logit_bias must be token ids with numbers in"),
        (
            '{"prompt": "x", "logit_bias": {"600": 1}}\n',
            ":1: the prompt has logit_bias of ids outside 0..599",
        ),
        ('{"prompt": "x", "note": "y"}\n', ":1: unknown key 'note'; "),
        ('{"prompt": "x", "": "y"}\n', ":1: unknown key ''; "),
        ('{"prompt": "x", "prompt": "y"}\n', ":1: expected each key once, got 'prompt' twice"),
        ('{"prompt": "x"}\n{"prompt": ' + "[" * 100_000 + "\n", ":2: expected a JSON object"),
        ('{"prompt": "x", "temperature": NaN}\n', ":1: expected JSON, which has no NaN"),
        ('{"prompt": "x", "metadata": -Infinity}\n', ":1: expected JSON, which has no -Infinity"),
        ('{"prompt": "x", "temperature": 1e999}\n', ":1: temperature must be a number from 0"),
        (f'{{"prompt": "x", "seed": 1{"0" * 5000}}}\n', ":1: "),
        (f'{{"prompt": [1{"0" * 4000}]}}\n', ":1: the prompt has ids outside 0..599"),
        ('{"prompt": {"role": "user"}}\n', ":1: prompt must be text or a list of token ids, got {'role'"),
        ('{"prompt": "\ufeff"}\n'.encode("utf-16"), ":1: expected text in UTF-8, got UTF-16"),
        ('{"prompt": "x"}\n'.encode("utf-16-le"), ":1: expected text in UTF-8, got UTF-16"),
        (b'{"prompt": "x"}\n{"prompt": "\xff"}\n', ":2: expected text in UTF-8, got byte 0xff at 12"),
    ],
)
def test_bad_lines(tiny, tmp_path, capsys, lines, message):
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    said = refusal(capsys, "generate", tiny, f"--prompts={file}", f"--out={out}")
    assert said.removeprefix("--prompts: ").startswith(f"{file}{message}")
    assert list(tmp_path.iterdir()) == [file]


def test_an_option_that_contradicts_a_row(tiny, tmp_path, capsys):
    """The same value may be said twice, and an option is for the rows that say nothing."""
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "x", "seed": 2}\n{"prompt": "y", "top_p": 0.5, "seed": 3}\n')
    start = ("generate", tiny, f"--prompts={file}", f"--out={out}")
    assert refusal(capsys, *start, "--temperature=1", "--seed=2") == (
        f"--prompts: {file}:2: seed is 3 in the row and 2 for all rows (--seed); "
        "set it in only one of the two places"
    )
    assert "top_p is 0.5 in the row and 0.9 for all rows (--top-p)" in refusal(capsys, *start, "--top-p=0.9")
    found = read_prompts(file, {"temperature": 1.0, "top_p": 0.5})
    assert [(row.request.temperature, row.request.top_p, row.request.seed) for row in found] == [
        (1.0, 0.5, 2),
        (1.0, 0.5, 3),
    ]


def test_files_that_cannot_be_used(tiny, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "open_model", lambda *_, **__: pytest.fail("it must be refused before"))
    start = ("generate", tiny, f"--prompts={prompts}")
    missing = f"--prompts={tmp_path / 'none'}"
    assert "none: expected a file of prompts, got No such file" in refusal(capsys, *start[:2], missing)
    assert "cannot write to" in refusal(capsys, *start, f"--out={tmp_path / 'none' / 'out.jsonl'}")
    assert "Is a directory" in refusal(capsys, *start, f"--out={tmp_path}")
    before = prompts.read_bytes()
    assert "--out is the file of prompts" in refusal(capsys, *start, f"--out={prompts}")
    assert prompts.read_bytes() == before


def test_a_read_only_folder(tiny, prompts, tmp_path, capsys, monkeypatch):
    def refuse(path, mode="r", **settings):  # without this, a superuser may write anywhere
        if "a" in mode:
            raise PermissionError(13, "Permission denied")
        return open(path, mode, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    message = refusal(capsys, "generate", tiny, f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}")
    assert message.endswith("Permission denied; choose a file in an existing folder that you may write to")


def test_damaged_checkpoints(tiny, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "config.json: expected this file, found none" in refusal(capsys, "generate", folder, "--prompt=x")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "expected one of the architectures" in refusal(capsys, "generate", folder, "--prompt=x")
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-9])
    assert "expected a complete safetensors file" in refusal(capsys, "generate", folder, "--prompt=x")
    (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    assert "the model has no tokenizer" in refusal(capsys, "generate", folder, "--prompt=x")


def test_failed_copies_are_one_line(tiny, monkeypatch, capsys):
    def failing(*_, **__):
        raise layerscope_jax.TransferError("copying expert 3 of layer 0 failed")

    monkeypatch.setattr(cli, "complete", failing)
    assert "copying expert 3" in refusal(capsys, "generate", tiny, "--prompt", "x", code=1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers:"),
            "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; "
            "set a smaller --device-budget or --max-num-seqs",
        ),
        (MemoryError(), "out of memory: none is left; set a smaller --device-budget or --max-num-seqs"),
        (RuntimeError("Unable to initialize backend 'cuda': none"),) * 2,
    ],
)
def test_lack_of_memory_is_one_line(tiny, monkeypatch, capsys, error, message):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(cli, "complete", failing)
    assert refusal(capsys, "generate", tiny, "--prompt", "x", code=1) == str(message)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_device_is_named(tiny, prompts, capsys):
    args = ("generate", str(tiny), f"--prompts={prompts}", "--out=/dev/full")
    assert refusal(capsys, *args, code=1) == "/dev/full: No space left on device"
