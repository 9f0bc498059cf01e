"""Every command alike: help with examples, `--json`, option names, refusals, completion."""

import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from recorded import small_profile, small_routing

from layerscope_jax.cli import calibrate
from layerscope_jax.cli import main as cli
from layerscope_jax.cli.commands import told
from layerscope_jax.cli.completion import script_of
from layerscope_jax.cli.groups import ENGINE_GROUPS
from layerscope_jax.cli.main import COMMANDS

pytestmark = pytest.mark.usefixtures("quick_compiles")


def leaves(commands):
    """Commands by their words on the command line; a group has a field `command`."""
    found = {}
    for name, command in commands.items():
        inner = get_type_hints(command, include_extras=True).get("command")
        if inner is None:
            found[name] = command
        for kind in get_args(get_args(inner)[0]) if inner is not None else ():
            found[f"{name} {get_args(kind)[1].name}"] = get_args(kind)[0]
    return found


LEAVES = leaves(COMMANDS)
NAMES = sorted(LEAVES)
NO_PLACE = {
    "chat": ["PLACE"],
    "demo": ["PLACE"],
    "calibrate": ["PLACE"],
    "convert": ["PLACE", "--out=OUT"],
    "fit": ["PLACE"],
    "generate": ["PLACE", "--prompt=x"],
    "inspect": ["PLACE"],
    "report": ["PLACE"],
    "serve": ["PLACE"],
    "simulate": ["--profile=PLACE"],
    "trace": ["PLACE", "--out=OUT", "--text", "PLACE"],
}
"""Arguments of commands that read a place; there is nothing at PLACE."""

OTHER_NAMES = {"budget", "policies", "experts", "dense", "model", "output", "format"}
"""What an option must not be called, because another command has another name for it."""


DIFFERS = {"out", "json", "policy", "predictor", "profile", "device_budget", "host_budget"}
"""Options that name a file or several things in some commands, and something else in others."""


HIDDEN = {"chat": {"chat", "n", "logprobs", "prompt_logprobs", "max_num_seqs"}}
"""Options that a command has set, and does not show."""


def printed(capsys, *args, code=0):
    """What a command prints to standard output, as one JSON document."""
    assert cli.main([str(arg) for arg in args]) == code
    return json.loads(capsys.readouterr().out)


def ended(capsys, *args):
    """Exit code and streams of a command line that ends before its command runs."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(args))
    return stopped.value.code, *capsys.readouterr()


def test_help_begins_with_examples_that_are_command_lines(capsys):
    code, out, _ = ended(capsys, "--help")
    assert code == 0
    _, _, rest = cli.ABOUT.partition("Examples:\n")
    lines = [line.strip() for line in rest.partition("\n\n")[0].splitlines()]
    assert len(lines) > 1
    for line in lines:
        assert f"    {line}\n" in out  # not wrapped
        if not line.endswith("--help"):
            cli.parsed(shlex.split(line)[1:])


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_that_are_command_lines(name, capsys):
    code, out, err = ended(capsys, *name.split(), "--help")
    assert (code, err) == (0, "")
    _, _, examples = told(LEAVES[name]).partition("Examples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert lines
    for line in lines:
        assert f"    {line}\n" in out  # not wrapped
        words = shlex.split(line.partition(" > ")[0])
        assert words[: 1 + len(name.split())] == ["layerscope", *name.split()]
        command = cli.parsed(words[1:])
        assert isinstance(getattr(command, "command", command), LEAVES[name])


@pytest.mark.parametrize("name", ["generate", "chat", "serve", "perplexity"])
def test_help_shows_options_by_group_and_what_most_people_use_first(name, capsys):
    _, out, _ = ended(capsys, name, "--help")
    lines = [line.strip("╭─╮│ ") for line in out.splitlines()]
    titles = [line.removesuffix(" options") for line in lines if re.fullmatch(r"[a-z ]+ options", line)]
    assert titles == [title for title in ENGINE_GROUPS if title in titles]
    assert {"prompt", "memory and policy", "output"} <= set(titles)
    shown = set(re.findall(r"^--([a-z][a-z-]*)", "\n".join(lines), re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(LEAVES[name])} - HIDDEN.get(name, set())
    assert {option.removeprefix("no-") for option in shown} == {
        field.replace("_", "-") for field in fields - {"checkpoint"}
    }


def test_every_option_of_a_group_is_one():
    known = {field.name for command in LEAVES.values() for field in dataclasses.fields(command)}
    grouped = [option for options in ENGINE_GROUPS.values() for option in options]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) <= known


def test_options_of_groups_reach_the_command():
    words = ["generate", "shipped", "--temperature=0.5", "--json", "--ray=auto", "--stop=a", "--prompt=x"]
    command = cli.parsed(words)
    assert (command.checkpoint, command.temperature, command.json) == ("shipped", 0.5, True)
    assert (command.ray, command.stop, command.prompt, command.policy) == ("auto", ("a",), ("x",), "auto")


@pytest.mark.parametrize("name", NAMES)
def test_what_it_does_not_know_is_refused_without_a_traceback(name, capsys):
    given = NO_PLACE.get(name, ["bash"] if name == "completion" else [])
    code, out, err = ended(capsys, *name.split(), *given, "--no-such-option")
    assert (code, out) == (2, "")
    assert "Unrecognized options: --no-such-option" in err or name not in NO_PLACE
    assert "Traceback" not in err


@pytest.mark.parametrize("name", sorted(NO_PLACE))
def test_a_place_where_nothing_is_has_one_line(name, tmp_path, capsys):
    words = {"PLACE": str(tmp_path / "nowhere"), "OUT": str(tmp_path / "out")}
    args = [arg.replace("PLACE", words["PLACE"]).replace("OUT", words["OUT"]) for arg in NO_PLACE[name]]
    assert cli.main([name, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])
    assert err.startswith("error: ")
    assert "nowhere" in err
    assert cli.main(["--debug", name, *args]) == 2
    said = capsys.readouterr().err.splitlines()
    assert (said[0], said[-1]) == ("Traceback (most recent call last):", err.rstrip("\n"))


def test_one_thing_has_one_name():
    """An option of several commands has one type, but for where a command writes to and what it runs over."""
    seen = {}
    for name, command in LEAVES.items():
        fields = {field.name for field in dataclasses.fields(command)}
        assert "json" in fields, name
        assert not fields & OTHER_NAMES, name
        hints = get_type_hints(command, include_extras=True)
        for field in fields - DIFFERS:
            kinds = get_args(hints[field]) or (hints[field],)
            if kinds[0] is type(None):  # hidden: it has no meaning there
                continue
            kind = str(kinds[0]).removesuffix(" | None").replace("<class 'int'>", "int")
            assert seen.setdefault(field, kind) == kind, (name, field)
    assert {"checkpoint", "revision", "timeline", "dtype", "expert_format", "dense_format"} <= seen.keys()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return f"--chat-template={file}"


@pytest.fixture(scope="module")
def timeline(tmp_path_factory):
    return tmp_path_factory.mktemp("timeline") / "run.json"


def test_generate_prints_one_document(tiny, timeline, tmp_path, capsys):
    prompts = ["--prompt=Call me", "--prompt=x", "--max-new-tokens=3", "--ignore-eos"]
    found = printed(capsys, "generate", tiny, *prompts, f"--timeline={timeline}", "--json")
    assert [len(row["token_ids"]) for row in found["completions"]] == [3, 3]
    assert (found["failed"], found["stats"]["new_tokens"]) == (0, 6)
    out = tmp_path / "rows.jsonl"
    assert printed(capsys, "generate", tiny, *prompts, f"--out={out}", "--json")["stats"]["new_tokens"] == 6
    again = printed(capsys, "generate", tiny, *prompts, f"--out={out}", "--json")
    assert again == {"out": str(out), "failed": 0, "stats": None}
    page = tmp_path / "page.html"
    told = printed(capsys, "report", timeline, f"--out={page}", "--json")
    assert (told["page"], told["svg"], len(told["runs"])) == (str(page), None, 1)
    assert page.exists()


def test_chat_prints_one_document(tiny, template, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Call me Ishmael.\n"))
    found = printed(capsys, "chat", tiny, template, "--max-new-tokens=3", "--ignore-eos", "--json")
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    assert [stats["new_tokens"] for stats in found["stats"]] == [3]


def test_convert_inspect_and_fit_print_one_document(tiny, tmp_path, capsys):
    out = tmp_path / "converted"
    found = printed(capsys, "convert", tiny, f"--out={out}", "--expert-format=float16", "--json")
    assert found["checkpoint"] == str(out)
    assert found["bytes"] == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert printed(capsys, "inspect", out, "--json")["supported"] is True
    assert printed(capsys, "fit", out, "--json")["formats"]


def test_calibrate_and_simulate_print_one_document(tiny, tmp_path, monkeypatch, capsys):
    machine = dict.fromkeys(("cpu", "cores", "device", "memory_bytes"))
    monkeypatch.setattr(calibrate, "calibrate", lambda model, **sizes: small_profile(machine=machine))
    file, routing, rows = tmp_path / "profile.json", tmp_path / "routing.npz", tmp_path / "rows.json"
    found = printed(capsys, "calibrate", tiny, f"--out={file}", "--json")
    assert found == json.loads(file.read_text())
    small_routing().save(routing)
    command = ["simulate", f"--profile={file}", f"--trace={routing}", "--device-budget=5", "--batch", "2"]
    found = printed(capsys, *command, "--policy", "host-only", f"--out={rows}", "--json")
    assert found == json.loads(rows.read_text())
    assert {row["policy"] for row in found["rows"]} == {"host-only"}


def test_trace_prints_one_document(tiny, tmp_path, capsys):
    text, out = tmp_path / "letters" / "text.txt", tmp_path / "trace"
    text.parent.mkdir()
    text.write_text("The Nation continues to enjoy peace. " * 8)
    sizes = ["--train-tokens=16", "--heldout-tokens=16", "--length=16", "--batch-size=1", "--hidden=0"]
    found = printed(
        capsys, "trace", tiny, "--text", text, "--heldout-domains=letters", f"--out={out}", *sizes, "--json"
    )
    assert found == {"trace": str(out), "tokens": 16, "passages": 1}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell, capsys):
    script = script_of(COMMANDS, shell)
    for name in COMMANDS:
        assert name in script
    assert "emulated-link-bandwidth" in script
    assert printed(capsys, "completion", shell, "--json") == {"shell": shell, "script": script}
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True, capture_output=True).stderr == ""
