"""Log-likelihoods and perplexity, from an engine's prefill steps."""

import math
from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
import pytest
from helpers import EOS, byte_tokenizer, random_model
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.evaluation.perplexity import Perplexity, prefix_token, token_logprobs, windows
from layerscope_jax.evaluation.scoring import batches, score

pytestmark = pytest.mark.usefixtures("quick_compiles")


@lru_cache
def spelling(context=96):
    sizes = {"vocab_size": 280, "num_layers": 2, "max_position_embeddings": context}
    model = random_model(seed=4, stop_token_ids=(EOS,), **sizes)
    return replace(model, tokenizer=byte_tokenizer())


def after(model, tokens):
    """Log-probabilities [T, V] after each token, from one jit of the whole model."""
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = jax.jit(lambda tokens: model.whole()(tokens)[0])(padded)
    return np.asarray(jax.nn.log_softmax(logits[0], axis=-1))


def test_scores_are_the_models_in_the_order_asked_for():
    model = spelling()
    pairs = [([5, 9], [200, 7]), (list(range(60)), [3]), ([17], [4, 4, 4]), ([8], [])]
    with Engine(model, OffloadConfig(prefill_chunk_size=64, max_num_seqs=2)) as engine:
        found = score(engine, pairs)
        likeliest = int(after(model, [5, 9])[1].argmax())
        [sure] = score(engine, [([5, 9], [likeliest])])
    for (context, tokens), scored in zip(pairs, found, strict=True):
        logprobs = after(model, [*context, *tokens])[len(context) - 1 :]
        expected = [logprobs[place, token] for place, token in enumerate(tokens)]
        np.testing.assert_allclose(scored.logprobs, expected, atol=1e-5)
        assert list(scored.greedy) == [logprobs[p].argmax() == token for p, token in enumerate(tokens)]
    assert sure.greedy == (True,)


def test_what_cannot_be_scored_is_refused():
    with Engine(spelling()) as engine:
        for pair in (([], [3]), (list(range(90)), list(range(6)))):
            with pytest.raises(
                ValueError, match="pair 1 must have a context of at least one token and, with"
            ):
                score(engine, [([5], [6]), pair])
        with pytest.raises(ValueError, match="context at most 94, got stride=2 and context=95"):
            token_logprobs(engine, [5, 6], prefix=1, context=95, stride=2)


@given(st.lists(st.integers(1, 95), min_size=1, max_size=40), st.integers(16, 256), st.integers(1, 5))
def test_batches_fit_in_a_step_and_hold_each_prompt_once(lengths, chunk, most):
    class Stub:
        config = OffloadConfig(prefill_chunk_size=chunk, max_num_seqs=most)

    found = list(batches(Stub, lengths))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= most
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= chunk


@given(st.integers(1, 300), st.integers(1, 50), st.data())
def test_each_token_but_the_first_is_scored_once_with_context_enough(length, context, data):
    stride = data.draw(st.integers(1, context))
    found = windows(length, context, stride)
    assert [place for at in found for place in range(at.scored, at.end)] == list(range(1, length))
    for number, at in enumerate(found):
        assert at.start < at.scored < at.end <= at.start + context + 1
        assert number == 0 or at.scored - at.start > context - stride


def test_a_text_is_scored_by_windows_as_one_forward_pass_would():
    model = spelling()
    tokens = model.tokenizer.encode("It was the best of times, it was the worst of times").ids
    with Engine(model) as engine:
        found = token_logprobs(engine, tokens, prefix=prefix_token(model), context=90, stride=45)
        sliding = token_logprobs(engine, tokens, prefix=EOS, context=20, stride=7)
    logprobs = after(model, [EOS, *tokens])
    np.testing.assert_allclose(
        found, [logprobs[place, token] for place, token in enumerate(tokens)], atol=1e-5
    )
    assert len(sliding) == len(tokens)
    np.testing.assert_array_equal(np.abs(sliding[:20] - found[:20]) < 1e-5, True)
    assert np.abs(sliding[20:] - found[20:]).max() > 1e-3  # with less context


def test_figures_of_independent_tokens_have_the_error_of_independent_tokens():
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(2.0, 64 * 400)
    found = Perplexity.of([logprobs[:9000], logprobs[9000:]], size=100_000)
    assert found.tokens == len(logprobs)
    assert found.nats == pytest.approx(-logprobs.mean())
    assert found.perplexity == pytest.approx(math.exp(found.nats))
    assert found.bits_per_byte == pytest.approx(-logprobs.sum() / math.log(2) / 100_000)
    assert found.nats_error == pytest.approx(logprobs.std() / math.sqrt(len(logprobs)), rel=0.15)
    assert found.perplexity_error == pytest.approx(found.perplexity * found.nats_error)
    # Neighbours that are alike say less: each block is one sample.
    alike = Perplexity.of([np.repeat(-rng.exponential(2.0, 400), 64)], size=1)
    assert alike.nats_error == pytest.approx(2.0 / math.sqrt(400), rel=0.2)
    assert Perplexity.of([logprobs[:100]], size=100).nats_error is None


def test_a_prefix_is_needed():
    with pytest.raises(ValueError, match="name a token that begins or ends a text"):
        prefix_token(random_model(num_layers=1))
