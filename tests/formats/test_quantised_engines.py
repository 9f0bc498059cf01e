"""Engines with quantised experts: the same bits wherever experts are computed, near the plain model's."""

import numpy as np
import pytest
from exact_cases import agree, run
from helpers import PROFILE, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.formats import format_named

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCHES = [[[5, 20, 7], [17], list(range(30, 44))]]


@pytest.fixture(scope="module")
def plain():
    return random_model(num_layers=2, num_experts=4, moe_intermediate_size=32)


@pytest.mark.parametrize("name", ["int8", "int4", "mxfp4", "fp8"])
def test_every_policy_has_the_bits_of_everything_resident(plain, name):
    model = plain.with_format(format_named(name))
    with Engine(model) as engine:
        assert engine.generate([[1]], max_new_tokens=1).stats.format == name
        expected = run(engine, BATCHES, 3)
    for policy in ("lru", "host-only", "presched"):
        budget = 0 if policy == "host-only" else 5 * model.bank.expert_bytes
        config = OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)
        with Engine(model, config) as engine:
            agree(run(engine, BATCHES, 3), expected)
    with Engine(plain) as engine:
        _, logits = run(engine, BATCHES, 1)
    first, other = expected[1][0], logits[0]
    assert np.corrcoef(first.ravel(), other.ravel())[0, 1] > (0.97 if "4" in name else 0.99)
