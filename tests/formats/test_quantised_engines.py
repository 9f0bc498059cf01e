"""Engines with quantised experts: the same bits wherever experts are computed, near the plain model's."""

import numpy as np
import pytest
from exact_cases import RandomPolicy, agree, run
from helpers import PROFILE, random_model

from layerscope_jax import Engine, OffloadConfig, load, save
from layerscope_jax.formats import format_named
from layerscope_jax.models.experts import ExpertBody

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCHES = [[[5, 20, 7], [17], list(range(30, 44))]]


@pytest.fixture(scope="module")
def plain():
    return random_model(num_layers=2, num_experts=4, moe_intermediate_size=32)


@pytest.mark.parametrize("name", ["int8", "int4", "mxfp4", "nvfp4", "fp8"])
def test_every_policy_has_the_bits_of_everything_resident(plain, name):
    if name == "mxfp4":  # as gpt-oss has it
        plain = random_model(plain.config, expert_body=ExpertBody("clamped", bias=True))
    model = plain.with_format(format_named(name))
    with Engine(model) as engine:
        assert engine.generate([[1]], max_new_tokens=1).stats.format == name
        expected = run(engine, BATCHES, 3)
    for policy in ("lru", "host-only", "presched"):
        budget = 0 if policy == "host-only" else 5 * model.bank.expert_bytes
        config = OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)
        with Engine(model, config) as engine:
            agree(run(engine, BATCHES, 3), expected)
    for seed, slots in ((1, 2), (2, 7)):  # any plan, within other budgets
        config = OffloadConfig(device_budget=slots * model.bank.expert_bytes, policy=RandomPolicy(seed))
        with Engine(model, config) as engine:
            agree(run(engine, BATCHES, 3), expected)
    with Engine(plain) as engine:
        _, logits = run(engine, BATCHES, 1)
    first, other = expected[1][0], logits[0]
    assert np.corrcoef(first.ravel(), other.ravel())[0, 1] > (0.97 if "4" in name else 0.99)


def test_an_engine_converts_experts_that_are_in_another_format(plain, tmp_path):
    model = plain.with_format("fp8")
    assert model.with_format("fp8") is model
    with Engine(plain, OffloadConfig(expert_format="fp8")) as engine, Engine(model) as other:
        assert (plain.bank.format.name, engine.model.bank.format.name) == ("float32", "fp8")
        assert engine.budget_bytes == model.bank.total_bytes
        agree(run(engine, BATCHES, 2), run(other, BATCHES, 2))
    for wrong, words in (("int3", "expert_format: expected one of the formats"), (4, "the name of a format")):
        with pytest.raises(ValueError, match=words):
            OffloadConfig(expert_format=wrong)


def test_sizes_that_a_format_cannot_hold_are_refused_before_anything_is_read(tmp_path):
    model = random_model(num_layers=1, num_experts=2, qk_norm="all")  # F of 20
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"'int4' stores groups of 32 numbers .* rows of 20"):
        load(tmp_path, format="int4")
    with pytest.raises(ValueError, match=r"'int4' stores groups of 32 numbers .* rows of 20"):
        Engine(model, OffloadConfig(expert_format="int4"))
    assert load(tmp_path, format="int8").bank.format.name == "int8"
