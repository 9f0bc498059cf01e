"""The command line as such: help, version, one line for each refusal, and devices."""

import subprocess
import sys

import pytest

from layerscope_jax.cli import main as cli


def test_alone_it_prints_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "generate" in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("layerscope-jax ")


def test_no_traceback():
    command = [sys.executable, "-m", "layerscope_jax.cli", "generate", "nowhere", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: nowhere: expected a folder with config.json and safetensors files, or a name on the Hugging "
        'Face hub, "organisation/name"; found no such folder; check the path\n'
    )
