"""What tests of `layerscope fit` share: a large model without weights, and the command's answer."""

import json
import shutil
from pathlib import Path

import pytest

from layerscope_jax.checkpoints.safetensors_io import StoredTensor
from layerscope_jax.cli import main as cli

TESTS = Path(__file__).parents[1]
GIB = 2**30


def without_weights(folder):
    """Writes Qwen3-30B-A3B's config alone."""
    shutil.copy(TESTS / "golden" / "old_style_configs" / "qwen3_moe" / "config.json", folder)
    return folder


def fitted(capsys, folder, *options, code=0):
    """What the command says as JSON; it must read no weight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredTensor, "fill", lambda *arguments: pytest.fail("a tensor was read"))
        assert cli.main(["fit", str(folder), *options, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def printed(capsys, folder, *options, code=0):
    """What the command prints, with single spaces."""
    assert cli.main(["fit", str(folder), *options]) == code
    return " ".join(capsys.readouterr().out.split())
