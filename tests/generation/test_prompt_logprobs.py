"""Log-probabilities of prompts, from an engine's own prefill steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_jit, random_model

from layerscope_jax import Engine, OffloadConfig, Request

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[5, 20, 7], [17], list(range(3, 60)), [9, 9, 9, 50, 3]]


def expected_of(model):
    """Log-probabilities [S, V] after each token of every prompt, from one jit of the whole model."""
    tokens = np.zeros((len(PROMPTS), max(map(len, PROMPTS))), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    return np.asarray(jax.nn.log_softmax(jax.jit(lambda tokens: model.whole()(tokens)[0])(tokens), axis=-1))


def told_of(engine, top=3, **settings):
    completions = engine.generate(PROMPTS, max_new_tokens=2, prompt_logprobs=top, **settings)
    return [completion.prompt_logprobs for completion in completions]


def test_they_are_those_of_the_model_whatever_the_chunks_and_where_experts_are():
    """One prompt is longer than a step takes, others share a step; in one step a padded row is scored too."""
    model = random_model(num_layers=2, seed=3)
    found = []
    for budget, chunk, most in ((None, 4096, 8), (9 * model.bank.expert_bytes, 32, 2)):
        config = OffloadConfig(
            device_budget=budget,
            policy="lru" if budget else "auto",
            prefill_chunk_size=chunk,
            max_num_seqs=most,
        )
        with Engine(model, config) as engine:
            found.append(told_of(engine))
    for prompt, logprobs, *same in zip(PROMPTS, expected_of(model), *found, strict=True):
        for first, *others in same:
            assert first is None
            assert len(others) == len(prompt) - 1
            for place, (token, told) in enumerate(zip(prompt[1:], others, strict=True)):
                assert told.logprob == pytest.approx(logprobs[place, token], abs=1e-5)
                assert [token for token, _ in told.top] == np.argsort(-logprobs[place])[:3].tolist()


def test_a_whole_step_in_one_jit_scores_as_well():
    model = random_model(num_layers=2, seed=3)
    with one_jit(), Engine(model, OffloadConfig(numerics="fast")) as engine:
        assert engine.runner.mode == "whole"
        told = told_of(engine, top=1)
    logprobs = expected_of(model)[0]
    assert [at.logprob for at in told[0][1:]] == pytest.approx([logprobs[0, 20], logprobs[1, 7]], abs=1e-5)


def test_samples_of_a_prompt_have_one_score_and_the_first_token_tells_it():
    model = random_model(num_layers=1, seed=3)
    request = Request(prompt=[5, 6, 7], n=2, temperature=1.0, prompt_logprobs=0, max_new_tokens=3)
    with Engine(model) as engine:
        first, second = engine.generate([request])
        told = [event.prompt_logprobs for event in engine.stream([request])]
    assert first.prompt_logprobs == second.prompt_logprobs
    assert first.prompt_logprobs is not None
    assert [at.top for at in first.prompt_logprobs[1:]] == [(), ()]
    assert [at is None for at in told] == [False, False, True, True, True, True]


def test_a_prompt_whose_scores_are_no_numbers_ends_with_an_error():
    model = random_model(num_layers=1, seed=3)
    embedding = model.dense["embedding"]
    model.dense["embedding"] = jnp.asarray(embedding).at[9].set(jnp.nan)
    with Engine(model) as engine:
        bad, good = engine.generate([[3, 9, 4], [3, 4]], prompt_logprobs=1, max_new_tokens=1)
    assert bad.finish_reason == "error"
    assert bad.prompt_logprobs is None
    assert good.prompt_logprobs is not None
