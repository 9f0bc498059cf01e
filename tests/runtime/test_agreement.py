"""What an accelerator runs agrees with what a CPU does."""

import pytest
from helpers import PROFILE, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("policy", ["fiddler", "lru"])
def test_what_an_accelerator_runs_gives_the_same_tokens(monkeypatch, policy):
    """Rows that stay on the device, and the host's put among them."""
    model = random_model(num_layers=2, seed=12)
    prompts = [[1, 2, 3], list(range(16))]
    with Engine(model) as engine:
        expected = engine.generate(prompts, max_new_tokens=9).token_ids
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    budget = model.bank.num_experts * model.bank.expert_bytes
    with Engine(model, OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)) as engine:
        assert isinstance(engine.runner.device_experts, SlottedExperts)
        assert engine.generate(prompts, max_new_tokens=9).token_ids == expected
