"""Logits that are not finite end their request with an error, and nobody else's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import PROMPTS, bits, one_jit, random_decoder, spelling_model

from layerscope_jax import Engine, Model, OffloadConfig
from layerscope_jax.runtime.non_finite import is_finite, why_not_finite
from layerscope_jax.runtime.sampling import NO_TOKEN, Sampling, sample

pytestmark = pytest.mark.usefixtures("quick_compiles")

BAD = 200
"""A token whose embedding is not finite: only requests with it have logits that are not."""


def spoilt(path, index, value=np.nan):
    """The model with one number changed."""
    model = spelling_model()
    flat = flatten_dict(model.dense)
    flat[path] = flat[path].at[index].set(value)
    return replace(model, dense=unflatten_dict(flat))


def engine_of(model, kind):
    config = OffloadConfig(max_num_seqs=64)
    if kind not in ("resident", "whole"):
        config = replace(config, policy=kind, device_budget=9 * model.bank.expert_bytes)
    with one_jit(kind == "whole"):
        return Engine(model, config)


@pytest.fixture(scope="module", params=["resident", "whole", "lru"])
def engine(request):
    with engine_of(spoilt(("embedding",), (BAD, 3)), request.param) as engine:
        yield engine


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 2}], ids=str)
def test_only_the_request_with_it_ends(engine, settings):
    """PROMPTS[0] holds the token; the others are as if it were not there."""
    assert BAD in PROMPTS[0]
    asked = {"max_new_tokens": 4, "stop_token_ids": [], **settings}
    others = engine.generate(PROMPTS[1:], **asked)
    assert {one.error for one in others} == {None}
    result = engine.generate(PROMPTS, **asked)
    assert result.token_ids == [[], *others.token_ids]
    assert [one.finish_reason for one in result[1:]] == [one.finish_reason for one in others]
    assert result.texts[0] == ""
    assert [one.error is not None for one in result] == [True] + [False] * (len(PROMPTS) - 1)
    assert "because the weights do: embedding; load an undamaged checkpoint" in result[0].error
    assert result.stats.new_tokens == others.stats.new_tokens
    first = [event for event in engine.stream(PROMPTS, **asked) if event.request == 0]
    assert [(event.token_id, event.finish_reason, event.text) for event in first] == [(-1, "error", "")]
    assert first[0].error == result[0].error


def test_a_slot_that_an_error_freed_is_used_again(engine):
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[3]]
    one_slot = replace(engine.config, max_num_seqs=1)
    with one_jit(engine.runner.mode == "whole"), Engine(engine.model, one_slot) as engine:
        result = engine.generate(prompts, max_new_tokens=3)
        alone = engine.generate(PROMPTS[1:], max_new_tokens=3)
    assert [one.finish_reason for one in result] == ["error", "length", "error", "length"]
    assert [result.token_ids[1], result.token_ids[3]] == [alone.token_ids[0], alone.token_ids[2]]


@pytest.mark.parametrize("kind", ["resident", "whole"])
def test_what_was_said_before_an_error_is_kept(kind):
    """The first tokens are right; one of them is the one whose embedding is not finite."""
    model = spelling_model()
    with engine_of(model, kind) as engine:
        right = engine.generate([PROMPTS[1]], max_new_tokens=6)
    bad = right.token_ids[0][2]
    until = right.token_ids[0].index(bad) + 1
    with engine_of(spoilt(("embedding",), (bad, 0), np.inf), kind) as engine:
        result = engine.generate([PROMPTS[1]], max_new_tokens=6)
        events = list(engine.stream([PROMPTS[1]], max_new_tokens=6))
    assert result.token_ids == [right.token_ids[0][:until]]
    assert [one.finish_reason for one in result] == ["error"]
    assert result.texts == [model.tokenizer.decode(result.token_ids[0])]
    assert "".join(event.text for event in events) == result.texts[0]


@pytest.mark.parametrize("kind", ["resident", "whole", "host-only"])
def test_an_expert_that_is_not_finite_reaches_nobody_else(kind):
    """Whoever is not routed to it goes on, bit for bit."""
    decoder = random_decoder(spelling_model().config, 4)
    decoder.experts[0].down[...] = decoder.experts[0].down[...].at[5, 0, 0].set(jnp.nan)
    model = Model.from_decoder(decoder, spelling_model().tokenizer)
    prompts = [[token] for token in range(40)]
    asked = {"max_new_tokens": 2}
    with engine_of(spelling_model(), kind) as engine:
        right = engine.generate(prompts, **asked)
    with engine_of(model, kind) as engine:
        result = engine.generate(prompts, **asked)
    assert {one.finish_reason for one in result} == {"error", "length"}
    for one, expected in zip(result, right.token_ids, strict=True):
        whole = one.finish_reason == "length"
        assert one.token_ids == (expected if whole else expected[: len(one.token_ids)])
        assert whole or "layers.0.experts.5.down;" in one.error


VOCABULARY = 300


def rows_of(*changes):
    logits = np.random.default_rng(0).standard_normal((len(changes), VOCABULARY)).astype(np.float32)
    for row, change in zip(logits, changes, strict=True):
        row[[place for place, _ in change]] = [value for _, value in change]
    return logits


NEGATIVE_NAN = np.array([0xFFC00000], np.uint32).view(np.float32)[0]
ROWS = rows_of(
    [],
    [(7, np.nan)],
    [(299, NEGATIVE_NAN)],
    [(n, np.nan) for n in range(VOCABULARY)],
    [(0, np.inf)],
    [(n, -np.inf) for n in range(VOCABULARY)],
    [(n, -np.inf) for n in range(1, VOCABULARY)],
    [(3, -np.inf), (5, NEGATIVE_NAN)],
)


@pytest.mark.parametrize("heat", [None, 0.0, 1.0])
@pytest.mark.parametrize("jitted", [True, False])
def test_no_token_is_picked_where_there_is_none(heat, jitted):
    rows = len(ROWS)
    sampling = None
    if heat is not None:
        sampling = Sampling(
            np.zeros(rows, np.uint32),
            np.full(rows, heat, np.float32),
            np.full(rows, 3, np.int32),
            np.ones(rows, np.float32),
        )
        sampling = jax.tree.map(jnp.asarray, sampling)
    run = jax.jit(sample) if jitted else sample
    tokens = np.asarray(run(jnp.asarray(ROWS), jnp.zeros(rows, jnp.int32), sampling))
    assert (tokens == NO_TOKEN).tolist() == [False, True, True, True, True, True, False, True]
    assert tokens[6] == 0
    if not heat:
        assert tokens[0] == ROWS[0].argmax()


def test_logits_have_the_bits_they_had():
    """Looking at them changes nothing: beside the old way to pick, inside one program."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((4, 64)).astype(np.float32), rng.standard_normal((64, 500)).astype(np.float32)

    def with_old(x, w):
        logits = x @ w * 1.7 + 0.3
        return jax.lax.top_k(logits, 1)[1][:, 0], logits

    def with_new(x, w):
        logits = x @ w * 1.7 + 0.3
        return sample(logits, jnp.zeros(4, jnp.int32), None), logits

    (old, before), (new, after) = jax.jit(with_old)(x, w), jax.jit(with_new)(x, w)
    np.testing.assert_array_equal(bits(before), bits(after))
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0, 1e-7, 6e4])
def test_finite_numbers_are_known_by_their_bits(dtype, value):
    array = np.ones((5, 7), dtype)
    array[3, 2] = value
    for laid in (array, array.T, array[::2, 1:], array[3, 2]):
        assert is_finite(laid) == bool(np.isfinite(laid.astype(np.float64)).all())


def test_the_cause_is_named():
    assert why_not_finite(spelling_model()).endswith(
        "all weights are finite: activations overflowed float32; check the scale of the weights"
    )
    model = spoilt(("norm", "scale"), 0)
    assert "because the weights do: norm.scale; load" in why_not_finite(model)
    decoder = random_decoder(spelling_model().config, 4, np.float16)
    assert why_not_finite(Model.from_decoder(decoder)).endswith(
        'activations overflowed float16; load the model with dtype="float32"'
    )
    for layer in (0, 1):
        decoder.experts[layer].up[...] = decoder.experts[layer].up[...].at[2:4].set(jnp.inf)
    assert (
        "layers.0.experts.2.up, layers.0.experts.3.up, layers.1.experts.2.up and others; load"
        in why_not_finite(Model.from_decoder(decoder))
    )
