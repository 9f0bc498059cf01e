"""lm-eval itself, with an engine and with a server; skipped where it is not installed."""

import json
from pathlib import Path

import pytest
from helpers import byte_tokenizer
from test_scoring import spelling

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.evaluation.harness import Harness
from layerscope_jax.evaluation.lm_eval_model import LayerscopeLM

lm_eval = pytest.importorskip("lm_eval")

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.filterwarnings("default"),  # lm-eval's and its packages' own
]

TASKS = Path(__file__).parents[2] / "examples" / "evaluation"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def evaluated(model, tasks=("layerscope_endings", "layerscope_texts"), **arguments):
    """Metrics of tasks, and the log-likelihoods of every choice."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **arguments
    )
    samples = {task: [sample["resps"] for sample in found["samples"][task]] for task in tasks}
    return {task: found["results"][task] for task in tasks}, samples


def test_resident_and_offloaded_runs_have_the_same_scores():
    model = spelling(512)
    limited = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")
    results = []
    for config in (OffloadConfig(), limited):
        with Engine(model, config) as engine:
            results.append(evaluated(LayerscopeLM(engine)))
    assert results[0] == results[1]
    assert results[0][0]["layerscope_endings"]["acc,none"] >= 0
    assert len(results[0][1]["layerscope_endings"]) == 8


def test_the_command_line_knows_the_model():
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_model

    assert get_model("layerscope") is LayerscopeLM
    assert issubclass(LayerscopeLM, LM)


def test_a_server_gets_the_scores_of_its_engine(tmp_path):
    """By lm-eval's `local-completions`, which has prompts echoed with their log-probabilities."""
    # What registers models, what reads a tokenizer, and what asks again: of `lm-eval[api]`.
    for name in ("lm_eval.models", "transformers", "tenacity"):
        pytest.importorskip(name)
    pytest.importorskip("lm_eval.tasks")
    from layerscope_jax.serving.server import Server
    from layerscope_jax.serving.settings import ServerConfig

    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with Engine(spelling(512)) as engine:
        _, expected = evaluated(LayerscopeLM(engine), ["layerscope_endings"])
        with Server(engine, ServerConfig(port=0, served_model_name="tiny")) as server:
            arguments = {
                "model": "tiny",
                "tokenizer": str(tmp_path),
                "base_url": f"{server.url}/v1/completions",
                "max_length": Harness(engine).max_length,
            }
            _, found = evaluated("local-completions", ["layerscope_endings"], model_args=arguments)
    pairs = zip(found["layerscope_endings"], expected["layerscope_endings"], strict=True)
    for here, there in pairs:
        assert [score for [(score, _)] in here] == pytest.approx([score for [(score, _)] in there], abs=1e-4)
