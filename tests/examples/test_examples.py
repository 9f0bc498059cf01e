"""Every example runs, and prints what its docstring promises."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest
import quick_compiling
from small_checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compiles")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small one, which compiles sooner than the shipped one."""
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def run(name, *arguments):
    """Calls an example's `main`, in this process: compiled programs are shared."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*arguments)


def test_a_jax_pipeline(checkpoint, capsys):
    run("jax_pipeline", checkpoint)
    out = capsys.readouterr().out
    assert "[[1. " in out
    assert out.count(" | ") == 3


def test_a_batch_script(checkpoint, capsys):
    run("batch_script", checkpoint)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 12
    assert all(-15 < row["log_likelihood_per_token"] < 0 for row in rows)


def test_a_policy_of_ones_own(checkpoint, capsys):
    run("own_policy", checkpoint)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["lru", "host-only", "twice"]


def test_plans_are_compared(checkpoint, capsys):
    run("compare_plans", checkpoint)
    out = capsys.readouterr().out
    assert "34 x device, 0 x host" in out
    assert out.count("of the bound") == 4


def test_a_predictor_is_trained(tmp_path, capsys):
    """Of a model whose experts are larger than its predictor."""
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint", moe_intermediate_size=128))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which Optax needs
        run("train_predictor", checkpoint, str(tmp_path))
    assert "of the experts were forecast" in capsys.readouterr().out


def test_the_openai_client(tmp_path, monkeypatch, capsys):
    """Starts the server as a process, which compiles for all requests that fit in a context: a short one."""
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=32))
    for name, value in quick_compiling.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run("openai_client", checkpoint)
    out = capsys.readouterr().out
    assert "['small']" in out
    assert "completion_tokens=4" in out
