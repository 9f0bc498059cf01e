"""The commands of the pages run, with a tiny model in place of the reader's; a few are run by other tests."""

import functools
import io
import json
import re
import sys

import pytest
from docs_pages import PAGES, ROOT, commands
from recorded import small_profile, small_routing
from small_checkpoint import write_checkpoint

from layerscope_jax.checkpoints.headers import read_configs
from layerscope_jax.cli import main as cli
from layerscope_jax.cli.demo import SHIPPED as SHIPPED_MODEL
from layerscope_jax.cli.main import COMMANDS
from layerscope_jax.profiling.machine_profile import ModelShape
from layerscope_jax.simulation import comparison
from predictor import SHIPPED

pytestmark = pytest.mark.usefixtures("quick_compiles")

ELSEWHERE = {
    "calibrate": "tests/profiling/test_calibrate_command.py",
    "demo": "tests/cli/test_demo.py",
    "doctor": "tests/cli/test_doctor.py",
    "perplexity": "tests/cli/test_perplexity.py",
    "predictor": "tests/cli/test_predictors.py",  # and tests/cli/test_predictor_routing.py
    "serve": "tests/examples/test_examples.py",
    "simulate": "tests/simulation/test_comparison.py",
    "trace": "tests/cli/test_trace.py",
}
"""Commands that take long, or run until they are ended, and the tests that run them.

Here their options are parsed (`tests/test_docs.py`), as are those of training and of benchmarks.
"""

NEEDS = {
    "--profile": "a profile of this machine and model",
    "--ray": "a cluster, which tests/distributed/test_ray.py has",
}
"""Options with which a command is only parsed, and what it would need."""

ROUTING = ["predictor", "routing", "build/trace"]
"""Makes routing of a model of the reader's, here of the shipped one and its held-out trace."""

SIZES = ("num_experts", "experts_per_token", "hidden_size", "moe_intermediate_size")
"""Numbers that configs and profiles call alike."""

MODELS = {"path/to/checkpoint", "shipped", "Qwen/Qwen3-30B-A3B", "allenai/OLMoE-1B-7B-0924"}
"""What stands for a model on the pages."""

SMALLER = {"--max-new-tokens": "2", "--device-budget": "70KB", "--steps": "0:1", "--layers": "0:1"} | {
    "--context": "64",
    "--expert-format": "int8",
    "--batch": "2",
}
"""Values of options in place of those of the pages: the tiny model has two layers."""

WHOLE = [page for page in PAGES if page.parent == ROOT / "docs" or page == ROOT / "README.md"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with a chat template, as all pages are given."""
    folder = write_checkpoint(tmp_path_factory.mktemp("docs") / "tiny")
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    return folder


@pytest.mark.parametrize("page", WHOLE, ids=lambda page: page.name)
def test_commands_of_a_page_run(page, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Call me", "max_new_tokens": 2}\n')
    monkeypatch.setattr(comparison, "lower_bound_ms", lambda *of, **more: 1.0)  # compiles for long
    makes_routing = any(words[1:4] == ROUTING for words in commands(page))
    machine = dict.fromkeys(("cpu", "cores", "device", "memory_bytes"))
    small_profile(machine=machine, **(of_shipped() if makes_routing else {})).save("profile.json")
    small_routing().save("routing.npz")
    for words in commands(page):
        if runs(words, makes_routing):
            monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))
            args = [*given(tuple(words[1:]), "shipped" if makes_routing else str(folder))]
            if words[1] == "generate":
                args += ["--max-new-tokens=2"] * ("--max-new-tokens" not in args)
            if words[1:4] == ROUTING:
                args[2] = str(SHIPPED / "heldout")
                args += ["--decode-steps=3", "--prompt-tokens", "2", "5", "--requests=4"]
            assert cli.main(args) == 0, (args, capsys.readouterr().err)


def of_shipped():
    """What a profile says of the shipped model, and a budget for a part of its experts."""
    config = read_configs(SHIPPED_MODEL)[0]
    sizes = {name: getattr(config, name) for name in SIZES}
    shape = ModelShape(**sizes, num_layers=config.num_moe_layers, dtype="bfloat16")
    return {"model": shape, "slots": shape.total_experts // 4}


def runs(words, makes_routing):
    """Whether this test runs a command."""
    if words[0] != "layerscope" or words[1] not in COMMANDS:
        return False
    if words[1:4] == ROUTING or (words[1] == "fit" and makes_routing):
        return True
    if words[1] == "simulate":  # of a small profile and routing; those of published models take ten seconds
        return "profile.json" in words and "--host-budget" not in words
    if words[1] in ELSEWHERE:
        return False
    return words[2:] != ["--help"] and not any(word.startswith(tuple(NEEDS)) for word in words)


@functools.cache
def given(words, folder):
    """Returns the arguments of a command, with the tiny model and small values in their places."""
    args = [folder if word in MODELS else word for word in words]
    args = [str(ROOT / word) if word.startswith("examples/") else word for word in args]
    return [SMALLER.get(before, word) for before, word in zip([None, *args], args, strict=False)]


def test_what_is_run_elsewhere_is():
    for command, test in ELSEWHERE.items():
        text = (ROOT / test).read_text()
        assert re.search(rf'"{command}"|"openai_client"', text), (command, test)
