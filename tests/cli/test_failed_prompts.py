"""Prompts that cannot be completed: what the command line makes of them."""

import json
from dataclasses import replace

import jax.numpy as jnp
import pytest
from command_lines import read, write
from helpers import random_decoder, spelling_model

from layerscope_jax import save
from layerscope_jax.cli import main as cli

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A checkpoint whose token 1 has no finite embedding."""
    folder = tmp_path_factory.mktemp("damaged")
    decoder = random_decoder(replace(spelling_model().config, qk_norm="all"), 4)
    decoder.embedding[...] = decoder.embedding[...].at[1, 0].set(jnp.nan)
    save(decoder, folder)
    return folder


def test_the_command_line_says_so(damaged, tmp_path, capsys):
    """Rows carry it, the exit code too, and a file that is gone on with keeps them."""
    prompts = write(
        tmp_path / "prompts.jsonl", [{"id": "good", "prompt": [5, 6]}, {"id": "bad", "prompt": [1, 2]}]
    )
    out = tmp_path / "out.jsonl"
    command = ["generate", str(damaged), f"--prompts={prompts}", "--max-new-tokens=2"]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    rows = {row["id"]: row for row in map(json.loads, captured.out.splitlines())}
    assert rows["bad"]["finish_reason"] == "error"
    assert rows["bad"]["token_ids"] == []
    assert "because the weights do: embedding" in rows["bad"]["error"]
    assert "error" not in rows["good"]
    assert len(rows["good"]["token_ids"]) == 2
    assert "error: 1 of 2 prompts could not be completed: the logits hold NaN" in captured.err

    assert cli.main([*command, f"--out={out}"]) == 1
    assert {row["id"]: row for row in read(out)} == rows
    capsys.readouterr()
    assert cli.main([*command, f"--out={out}"]) == 1
    assert {row["id"]: row for row in read(out)} == rows
    assert "1 of the completions in" in capsys.readouterr().err
