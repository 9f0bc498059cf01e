"""`layerscope perplexity`: figures of files, and refusals."""

import json
import re
import shutil

import pytest
from command_lines import refusal

from layerscope_jax import Engine, load
from layerscope_jax.cli import main as cli
from layerscope_jax.evaluation.perplexity import Perplexity, prefix_token, token_logprobs

pytestmark = pytest.mark.usefixtures("quick_compiles")

TEXTS = {"sea.txt": "Call me Ishmael. " * 14, "löffel.txt": "ein Löffel: 匙\r\n"}


@pytest.fixture
def ended(tiny, tmp_path):
    """The checkpoint, with a token that ends texts."""
    folder = shutil.copytree(tiny, tmp_path / "ended")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    return folder


@pytest.fixture
def files(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes(text.encode())
    return [str(tmp_path / name) for name in TEXTS]


def test_figures_are_those_of_the_library_by_file_and_together(ended, files, monkeypatch, capsys):
    options = ["--context=64", "--stride=40", "--policy=host-only", "--device-budget=0"]
    assert cli.main(["perplexity", str(ended), *options, "--json", "--text", *files]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["file"] for each in told["texts"]] == [*files, "all"]
    model, expected = load(ended), []
    with Engine(model) as engine:
        for text in TEXTS.values():
            tokens = model.tokenizer.encode(text, add_special_tokens=False).ids
            expected.append(token_logprobs(engine, tokens, prefix=prefix_token(model), context=64, stride=40))
    sizes = [len(text.encode()) for text in TEXTS.values()]
    results = [Perplexity.of([logprobs], size) for logprobs, size in zip(expected, sizes, strict=True)]
    for each, result in zip(told["texts"], [*results, Perplexity.of(expected, sum(sizes))], strict=True):
        assert each["tokens"] == result.tokens
        assert each["bytes"] == result.bytes
        for name in ("nats", "nats_error", "perplexity", "bits_per_byte", "bits_per_byte_error"):
            expected_value = getattr(result, name)
            close = expected_value is None or pytest.approx(expected_value, rel=1e-5)
            assert each[name] == (None if expected_value is None else close)
    assert told["texts"][1]["nats_error"] is None
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, which shows how far it has come
    assert cli.main(["perplexity", str(ended), "--text", files[1], "--text", files[1]]) == 0
    out, err = capsys.readouterr()
    assert f"{1 + results[1].tokens} tokens" in err  # with the one before the text
    assert re.search(r"100%.* tokens/s, 100% hits, link 0%", err)
    assert f"{results[1].nats:.4f}" in out
    assert "±" not in out


def test_what_cannot_be_scored_is_refused(tiny, tmp_path, capsys):
    empty, wrong = tmp_path / "empty", tmp_path / "wrong"
    empty.write_bytes(b"")
    wrong.write_bytes(b"abc\xff")
    cases = [
        ([], "--text must name one text or more, got none"),
        ([f"--text={empty}"], f"--text: {empty} must hold a text, got an empty file"),
        ([f"--text={wrong}"], f"--text: {wrong} must be UTF-8, got other bytes at 3; convert it"),
        ([f"--text={tmp_path / 'none'}"], "No such file or directory"),
        ([f"--text={tiny / 'config.json'}", "--context=255"], "--context must be 1 to 254 tokens, got 255"),
        ([f"--text={tiny / 'config.json'}", "--context=9", "--stride=0"], "--stride must be 1 token to"),
    ]
    for arguments, message in cases:
        assert message in refusal(capsys, "perplexity", tiny, *arguments)
    text = f"--text={tiny / 'config.json'}"
    assert "name a token that begins or ends a text" in refusal(capsys, "perplexity", tiny, text)
