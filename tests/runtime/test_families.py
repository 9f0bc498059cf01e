"""Every family's golden checkpoint in the engine: transformers' own tokens, whatever a policy decides."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from exact_cases import run
from helpers import PROFILE

from layerscope_jax import Engine, OffloadConfig, load

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))
STEPS = 12
CHUNK = 16
"""Tokens of a prefill at once: two of the four prompts take two steps."""

TOLERANCE = 2e-5
"""Of logits of size 1 to 3, with XLA told to optimise little; with it as users have it, bits are the same
(`test_exactness.py`)."""
BFLOAT16 = 0.35
"""Of logits whose standard deviation is 1.4 to 2.5: bfloat16 has eight bits, and its routers may choose other
experts than those of float32. The largest mean difference seen is 0.13."""


def prompts(golden):
    return [row[:length].tolist() for row, length in zip(golden["tokens"], golden["lengths"], strict=True)]


@cache
def golden(case):
    return dict(np.load(GOLDEN / case / "golden.npz"))


@cache
def model(case, dtype="float32"):
    return load(GOLDEN / case, dtype=dtype)


@cache
def resident(case):
    with Engine(model(case), OffloadConfig(prefill_chunk_size=CHUNK)) as engine:
        return run(engine, [prompts(golden(case))], STEPS)


@pytest.mark.parametrize("case", CASES)
def test_everything_resident_gives_transformers_tokens(case):
    assert resident(case)[0] == [golden(case)["greedy"][:, :STEPS].tolist()]


@pytest.mark.parametrize("policy", ["lru", "host-only", "presched", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_every_plan_gives_the_same(case, policy):
    bank = model(case).bank
    config = OffloadConfig(
        device_budget=bank.total_bytes // 2,
        policy=policy,
        profile=PROFILE,
        prefill_chunk_size=CHUNK,
    )
    with Engine(model(case), config) as engine:
        tokens, logits = run(engine, [prompts(golden(case))], STEPS)
    assert tokens == resident(case)[0]
    for step, (ours, theirs) in enumerate(zip(logits, resident(case)[1], strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=f"step {step}")
