"""The engine agrees with Hugging Face transformers, and what an accelerator runs with what a CPU does."""

from pathlib import Path

import numpy as np
import pytest
from exact_cases import tap
from helpers import PROFILE, random_model

from layerscope_jax import Engine, OffloadConfig, Request, load
from layerscope_jax.offload.executors import DeviceExperts
from layerscope_jax.runtime import layerwise

GOLDEN = sorted(file.parent for file in (Path(__file__).parents[1] / "golden").glob("*/golden.npz"))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_the_engine_agrees_with_hugging_face(folder):
    """Within a small budget: logits after ragged prompts and parts of them, and long greedy continuations."""
    model, golden = load(folder), np.load(folder / "golden.npz")
    rows = [row[:size].tolist() for row, size in zip(golden["tokens"], golden["lengths"], strict=True)]
    requests = [Request(prompt=row, max_new_tokens=64) for row in rows]
    requests += [Request(prompt=row[: len(row) // 2], max_new_tokens=1) for row in rows]
    budget = (model.bank.num_experts + 3) * model.bank.expert_bytes
    with Engine(model, OffloadConfig(device_budget=budget, policy="lru")) as engine:
        logits = tap(engine)
        result = engine.generate(requests)
    row = np.tile(np.arange(len(rows)), 2)
    expected = golden["logits"][row, [len(request.prompt) - 1 for request in requests]]
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4)
    assert result.token_ids[: len(rows)] == golden["greedy"].tolist()
    assert result.stats.bytes_moved > 0
    assert result.stats.peak_expert_bytes <= budget < model.bank.total_bytes


@pytest.mark.usefixtures("quick_compiles")  # the tests above run what users run
@pytest.mark.parametrize("policy", ["fiddler", "lru"])
def test_what_an_accelerator_runs_gives_the_same_tokens(monkeypatch, policy):
    """Rows that stay on the device, and the host's put among them."""
    model = random_model(num_layers=3, seed=12)
    prompts = [[1, 2, 3], list(range(16))]
    with Engine(model) as engine:
        expected = engine.generate(prompts, max_new_tokens=9).token_ids
    monkeypatch.setattr(layerwise, "device_experts", lambda device, cpu: DeviceExperts(device))
    budget = model.bank.num_experts * model.bank.expert_bytes
    with Engine(model, OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)) as engine:
        assert isinstance(engine.runner.device_experts, DeviceExperts)
        assert engine.generate(prompts, max_new_tokens=9).token_ids == expected
