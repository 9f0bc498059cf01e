"""Every family's golden checkpoint in the engine: transformers' own tokens, whatever a policy decides."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from exact_cases import run, tap
from helpers import PROFILE

from layerscope_jax import Engine, OffloadConfig, Request, load

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))
STEPS = 12
CHUNK = 16
"""Tokens of a prefill at once: two of the four prompts take two steps."""

TOLERANCE = 2e-5
"""Of logits of size 1 to 3, with XLA told to optimise little; with it as users have it, bits are the same
(`test_exactness.py`)."""

BFLOAT16 = 0.08
"""Mean difference of logits, in their standard deviations; the largest seen is 0.054. bfloat16 has 8 bits,
and where a router's scores are near, other experts are chosen."""


def family(case):
    return json.loads((GOLDEN / case / "config.json").read_text())["model_type"]


FAMILIES = sorted({family(case): case for case in CASES[::-1]}.values())
"""The first case of each family."""


def prompts(case):
    rows = golden(case)["tokens"], golden(case)["lengths"]
    return [row[:length].tolist() for row, length in zip(*rows, strict=True)]


@cache
def golden(case):
    return dict(np.load(GOLDEN / case / "golden.npz"))


@cache
def model(case, dtype=None):
    return load(GOLDEN / case, dtype=dtype)


@cache
def resident(case):
    with Engine(model(case), OffloadConfig(prefill_chunk_size=CHUNK)) as engine:
        return run(engine, [prompts(case)], STEPS)


@pytest.mark.parametrize("case", CASES)
def test_the_engine_agrees_with_transformers(case):
    """Within a small budget: logits after ragged prompts and parts of them, and long greedy continuations."""
    rows, bank = prompts(case), model(case).bank
    requests = [Request(prompt=row, max_new_tokens=64) for row in rows]
    requests += [Request(prompt=row[: len(row) // 2], max_new_tokens=1) for row in rows]
    budget = (bank.num_experts + 3) * bank.expert_bytes
    with Engine(model(case), OffloadConfig(device_budget=budget, policy="lru")) as engine:
        logits = tap(engine)
        result = engine.generate(requests)
    row = np.tile(np.arange(len(rows)), 2)
    expected = golden(case)["logits"][row, [len(request.prompt) - 1 for request in requests]]
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4)
    assert result.token_ids[: len(rows)] == golden(case)["greedy"].tolist()
    assert result.stats.bytes_moved > 0
    assert result.stats.peak_expert_bytes <= budget < bank.total_bytes


@pytest.mark.parametrize("case", FAMILIES)
def test_everything_resident_gives_the_same_in_chunks(case):
    assert resident(case)[0] == [golden(case)["greedy"][:, :STEPS].tolist()]


@pytest.mark.parametrize("policy", ["lru", "host-only", "presched", "auto"])
@pytest.mark.parametrize("case", FAMILIES)
def test_every_plan_gives_the_same(case, policy):
    config = OffloadConfig(
        device_budget=model(case).bank.total_bytes // 2,
        policy=policy,
        profile=PROFILE,
        prefill_chunk_size=CHUNK,
    )
    with Engine(model(case), config) as engine:
        tokens, logits = run(engine, [prompts(case)], STEPS)
    assert tokens == resident(case)[0]
    for step, (ours, theirs) in enumerate(zip(logits, resident(case)[1], strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=f"step {step}")


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_near_float32(case):
    """After every second length of each prompt."""
    lengths = [
        (row, length) for row, prompt in enumerate(prompts(case)) for length in range(1, len(prompt) + 1, 2)
    ]
    requests = [Request(prompt=prompts(case)[row][:length], max_new_tokens=1) for row, length in lengths]
    with Engine(model(case, "bfloat16"), OffloadConfig(max_num_seqs=64)) as engine:
        logits = tap(engine)
        engine.generate(requests)
    expected = np.stack([golden(case)["logits"][row, length - 1] for row, length in lengths])
    assert np.abs(np.concatenate(logits) - expected).mean() < BFLOAT16 * expected.std()
