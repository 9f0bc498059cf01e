"""Settings change logits as the processors of transformers do, and as OpenAI's documentation says."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.runtime.choosing import Changes, changed, choose
from layerscope_jax.runtime.sampling import NO_TOKEN, Sampling, ranked_scores

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())
CASES = GOLDEN["cases"]
LOGITS = np.array([case["logits"] for case in CASES], np.float32)
ROWS, VOCABULARY = LOGITS.shape
POSITIONS = np.array([len(case["prompt"]) + len(case["new"]) for case in CASES], np.int32)

ranked, change = jax.jit(ranked_scores), jax.jit(changed)


def of(name, default, dtype=np.float32):
    """One setting of every case."""
    return jnp.array([case["settings"].get(name, default) for case in CASES], dtype)


def golden_changes():
    bias, ends = np.zeros((ROWS, VOCABULARY), np.float32), np.zeros((ROWS, VOCABULARY), bool)
    in_prompt, counts = np.zeros((ROWS, VOCABULARY), bool), np.zeros((ROWS, VOCABULARY), np.int32)
    ends[:, GOLDEN["ends"]] = True
    for row, case in enumerate(CASES):
        for token, added in case["settings"].get("logit_bias", {}).items():
            bias[row, int(token)] = added
        in_prompt[row, case["prompt"]] = True
        np.add.at(counts[row], case["new"], 1)
    first_end = [len(case["prompt"]) + case["settings"].get("min_new_tokens", 0) for case in CASES]
    none = jnp.zeros(ROWS)
    arrays = (jnp.array(array) for array in (np.array(first_end, np.int32), ends, bias, in_prompt))
    return Changes(of("repetition_penalty", 1), none, none, *arrays), jnp.array(counts)


def golden_sampling():
    numbers = of("temperature", 1), of("top_k", 0, np.int32), of("top_p", 1), of("min_p", 0)
    return Sampling(jnp.arange(ROWS, dtype=jnp.uint32), *numbers)


def test_what_is_sampled_from_is_what_transformers_keeps():
    scores, tokens = ranked(change(LOGITS, POSITIONS, *golden_changes()), golden_sampling())
    for case, row, ids in zip(CASES, np.asarray(scores, np.float64), np.asarray(tokens), strict=True):
        kept = ids[row > -np.inf]
        assert sorted(kept) == case["kept"], case["settings"]
        logprobs = row - np.log(np.exp(row).sum())
        found = dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
        np.testing.assert_allclose([found[token] for token in case["kept"]], case["logprobs"], atol=2e-5)


def test_what_is_drawn_is_among_them_and_counted():
    changes, counts = golden_changes()
    before = np.asarray(counts)
    found = jnp.where(jnp.arange(ROWS) == 1, NO_TOKEN, 0)
    chosen = choose(LOGITS, found, POSITIONS, golden_sampling(), changes, counts, None)
    tokens, added = np.asarray(chosen.tokens), np.asarray(chosen.counts) - before
    assert tokens[1] == NO_TOKEN
    assert not added[1].any()
    for row, case in enumerate(CASES):
        if row != 1:
            assert tokens[row] in case["kept"]
            assert (added[row].sum(), added[row, tokens[row]]) == (1, 1)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_penalties_are_those_of_the_formula(number):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, with c[j] of the new tokens alone."""
    rng = np.random.default_rng(number)
    counts = rng.integers(0, 4, (3, 11)) * rng.integers(0, 2, (3, 11))
    presence, frequency = rng.uniform(-2, 2, (2, 3)).astype(np.float32)
    logits = rng.standard_normal((3, 11)).astype(np.float32)
    none = np.zeros((3, 11), bool)
    changes = Changes(
        np.ones(3, np.float32), presence, frequency, np.zeros(3, np.int32), none, none * 0.0, ~none
    )
    found = change(logits, np.full(3, 9), changes, jnp.array(counts, jnp.int32))
    expected = logits - counts * frequency[:, None] - (counts > 0) * presence[:, None]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_log_probabilities_are_those_of_the_model():
    """Before any setting; the likeliest first."""
    expected = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(1, keepdims=True))
    changes, counts = golden_changes()
    chosen = choose(LOGITS, np.zeros(ROWS, np.int32), POSITIONS, golden_sampling(), changes, counts, 20)
    rows = np.arange(ROWS)
    np.testing.assert_allclose(chosen.logprob, expected[rows, chosen.tokens], atol=1e-5)
    np.testing.assert_allclose(chosen.top_logprobs, -np.sort(-expected)[:, :20], atol=1e-5)
    np.testing.assert_array_equal(chosen.top_ids, np.argsort(-expected)[:, :20])
