"""A command from outside the package: its help, its options, its errors; one that is broken."""

import json
import os
import subprocess
import sys

import pytest

from layerscope_jax import ExpertId, LayerPlan, save_plans
from layerscope_jax.cli import main as cli


def output(capsys, *args):
    """The exit code of a command line, and what it wrote to stdout and stderr."""
    try:
        code = cli.main([str(arg) for arg in args])
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


@pytest.fixture
def plans(tmp_path):
    file = tmp_path / "plans.jsonl"
    loaded = (ExpertId(0, 2), ExpertId(0, 3))
    save_plans([LayerPlan(step=0, layer=0, device=(2, 3), host=(1,), load=loaded)], file)
    return file


def test_it_runs_with_its_options(example, plans, capsys):
    code, out, err = output(capsys, "plans", plans)
    assert (code, err) == (0, "")
    assert dict(line.split() for line in out.splitlines()) == {
        "steps": "1",
        "layers": "1",
        "device": "2",
        "host": "1",
        "load": "2",
        "prefetch": "0",
        "evict": "0",
    }
    code, out, _ = output(capsys, "plans", plans, "--json")
    assert json.loads(out)["load"] == 2


def test_help_names_it(example, capsys):
    code, out, err = output(capsys, "--help")
    assert (code, err) == (0, "")
    assert "Summarise recorded plans" in " ".join(out.split())
    code, out, _ = output(capsys, "plans", "--help")
    assert (code, "save_plans" in out) == (0, True)


def test_what_it_refuses_is_one_line(example, tmp_path, capsys):
    code, out, err = output(capsys, "plans", tmp_path / "missing.jsonl")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "missing.jsonl: expected a file of plans" in err


def test_what_it_did_wrong_is_its_own_fault(install, tmp_path, capsys):
    (tmp_path / "wrong_command.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Wrong:\n"
        "    def run(self):\n"
        "        return 1 / 0\n"
    )
    install("careless", {"layerscope.commands": {"wrong": "wrong_command:Wrong"}})
    code, out, err = output(capsys, "wrong")
    assert (code, out) == (1, "")
    assert "error: this is a bug in careless, not in your input: ZeroDivisionError" in err


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("no_such_module:Command", "cannot be imported (ModuleNotFoundError: No module named"),
        ("json:no_such_name", "cannot be imported (AttributeError"),
        ("json:loads", "must be a dataclass with a method run()"),
        ("layerscope_jax:ExpertId", "must be a dataclass with a method run()"),
    ],
)
def test_a_broken_one_is_a_warning(install, example, plans, capsys, point, reason):
    install("broken", {"layerscope.commands": {"gone": point}})
    code, out, err = output(capsys, "--help")
    assert code == 0
    assert "generate" in out
    assert "plans" in out
    assert err.startswith("warning: command 'gone' ")
    assert reason in err
    code, _, err = output(capsys, "gone")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: command 'gone' ")
    assert output(capsys, "generate", "nowhere", "--prompt=x")[2].startswith("error: nowhere: ")
    assert output(capsys, "plans", plans)[0] == 0


def test_commands_of_our_own_stay_ours(install, capsys):
    install("greedy", {"layerscope.commands": {"demo": "json:loads"}})
    code, out, err = output(capsys, "--help")
    assert (code, "Run the shipped model" in " ".join(out.split())) == (0, True)
    assert "has the name of a built-in command" in err


def test_as_a_process(example, plans):
    path = os.pathsep.join([*map(str, sys.path[:2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "layerscope_jax.cli", "plans", plans, "--json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["device"] == 2
