"""Every family's golden checkpoint in the engine: transformers' own tokens, whatever a policy decides."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from exact_cases import tap
from helpers import PROFILE

from layerscope_jax import Engine, OffloadConfig, Request, load

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))
STEPS = 12

BFLOAT16 = 0.08
"""Mean difference of logits, in their standard deviations; the largest seen is 0.054. bfloat16 has 8 bits,
and where a router's scores are near, other experts are chosen."""


def family(case):
    return json.loads((GOLDEN / case / "config.json").read_text())["model_type"]


FAMILIES = sorted({family(case): case for case in CASES[::-1]}.values())
"""The first case of each family; `tests/models/test_parity.py` has all of them."""

KINDS = ("deepseek_v3", "gemma4", "gpt_oss", "qwen3_moe", "qwen3_next")
"""A case of each kind of attention: latent; of two sizes; with sinks and windows; plain; gated, among gated
DeltaNet."""

ROUNDED = (*KINDS, "ernie4_5_moe", "granitemoe", "minimax_m2", "phimoe", "qwen2_moe")
"""With them a case of each arithmetic that is a family's own: routers, factors, norms, shared experts."""


def prompts(case):
    rows = golden(case)["tokens"], golden(case)["lengths"]
    return [row[:length].tolist() for row, length in zip(*rows, strict=True)]


@cache
def golden(case):
    return dict(np.load(GOLDEN / case / "golden.npz"))


@cache
def model(case, dtype=None):
    return load(GOLDEN / case, dtype=dtype)


def agree(engine, case, steps=STEPS):
    """Tokens of all prompts, and logits after them: transformers' own."""
    logits = tap(engine)
    result = engine.generate(prompts(case), max_new_tokens=steps)
    assert result.token_ids == golden(case)["greedy"][:, :steps].tolist()
    last = golden(case)["lengths"] - 1
    np.testing.assert_allclose(logits[0], golden(case)["logits"][range(len(last)), last], rtol=0, atol=1e-4)
    return result.stats


@pytest.mark.parametrize("case", FAMILIES)
def test_the_engine_agrees_with_transformers(case):
    """Within a small budget, where experts come and go."""
    bank = model(case).bank
    budget = (bank.num_experts + 3) * bank.expert_bytes
    with Engine(model(case), OffloadConfig(device_budget=budget, policy="lru")) as engine:
        stats = agree(engine, case, 64 if case in KINDS else STEPS)
    assert stats.bytes_moved > 0
    assert stats.peak_expert_bytes <= budget < bank.total_bytes


@pytest.mark.parametrize("case", KINDS)
def test_so_it_does_with_everything_resident(case):
    """Decode steps are one program."""
    with Engine(model(case)) as engine:
        assert engine.runner.mode == "decode"
        agree(engine, case)


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        *((case, policy) for case in (*KINDS, "qwen3_5_moe") for policy in ("host-only", "presched")),
        *((case, "fiddler") for case in ("gemma4", "qwen3_next", "qwen3_5_moe")),  # with lru the fourth
    ],
)
def test_so_it_does_whatever_a_policy_decides(case, policy):
    budget = model(case).bank.total_bytes // 2
    config = OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)
    with Engine(model(case), config) as engine:
        agree(engine, case)


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_so_it_does_with_a_forecast_of_every_kind_of_router(case):
    """Of scores through a sigmoid; with biases; plain."""
    config = OffloadConfig(device_budget=model(case).bank.total_bytes // 2, policy="auto", profile=PROFILE)
    with Engine(model(case), config) as engine:
        agree(engine, case)
        assert engine.runner.forecasts.name == "gate"


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_prefill_in_chunks_says_the_same(case):
    """Two of the four prompts take two steps, and each comes again, in a row that another has left.

    The row is as new, also where a layer keeps a state of all tokens that the row has seen.
    """
    twice = prompts(case) * 2
    with Engine(model(case), OffloadConfig(prefill_chunk_size=16, max_num_seqs=4)) as engine:
        result = engine.generate(twice, max_new_tokens=STEPS)
    assert result.token_ids == golden(case)["greedy"][:, :STEPS].tolist() * 2


@pytest.mark.parametrize("case", ROUNDED)
def test_bfloat16_is_near_float32(case):
    """After every second length of each prompt."""
    rows = prompts(case)
    lengths = [(row, length) for row in range(len(rows)) for length in range(1, len(rows[row]) + 1, 2)]
    requests = [Request(prompt=rows[row][:length], max_new_tokens=1) for row, length in lengths]
    with Engine(model(case, "bfloat16"), OffloadConfig(max_num_seqs=64)) as engine:
        logits = tap(engine)
        engine.generate(requests)
    expected = np.stack([golden(case)["logits"][row, length - 1] for row, length in lengths])
    assert np.abs(np.concatenate(logits) - expected).mean() < BFLOAT16 * expected.std()
