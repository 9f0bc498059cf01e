"""Prompts in, tokens out: what a caller may rely on, whichever way the model runs."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import (
    EOS,
    PAD,
    PROFILE,
    PROMPTS,
    VOCABULARY,
    byte_tokenizer,
    fallback_tokenizer,
    one_jit,
    spelling_model,
)
from hypothesis import example, given
from hypothesis import strategies as st

from layerscope_jax import POLICIES, Engine, OffloadConfig, Replay, Request, load_plans, save_plans
from layerscope_jax.generation.detokenize import TextStream
from layerscope_jax.generation.scheduler import batch_rows, bucket

pytestmark = pytest.mark.usefixtures("quick_compiles")

SNOWMAN = "☃"  # three bytes
TOKENIZERS = {"bytes": byte_tokenizer(), "fallback": fallback_tokenizer()}


@pytest.fixture(scope="module")
def model():
    return spelling_model()


@pytest.fixture(scope="module")
def whole(model):
    with one_jit(), Engine(model, OffloadConfig(numerics="fast")) as engine:
        yield engine


@pytest.fixture(scope="module")
def layers(model):
    """Layer by layer, with experts coming and going."""
    with Engine(model, OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")) as engine:
        yield engine


@pytest.fixture(params=["whole", "layers"])
def engine(request):
    return request.getfixturevalue(request.param)


class Dictation:
    """Stands for a runner that says given tokens, one row each."""

    def __init__(self, rows):
        self.rows, self.said = rows, -1

    def step(self, tokens, positions, last, caches, sampling):
        self.said += 1
        found = [row[min(self.said, len(row) - 1)] for row in self.rows]
        return np.array(found + [0] * (len(tokens) - len(found)), np.int32), None, caches


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(engine):
    together = engine.generate(PROMPTS, max_new_tokens=12)
    for prompt, tokens in zip(PROMPTS, together.token_ids, strict=True):
        assert engine.generate([prompt], max_new_tokens=12).token_ids == [tokens]
    assert len({tuple(tokens) for tokens in together.token_ids}) == 4
    assert [one.finish_reason for one in together] == ["length"] * 4
    backwards = engine.generate(PROMPTS[::-1], max_new_tokens=12)
    assert backwards.token_ids == together.token_ids[::-1]


@pytest.mark.parametrize("size", [1, 3])
def test_how_prompts_are_parted_into_batches_does_not_matter(engine, size):
    together = engine.generate(PROMPTS, max_new_tokens=6)
    few = replace(engine.config, max_num_seqs=size)
    with one_jit(engine.runner.mode == "whole"), Engine(engine.model, few) as engine:
        parted = engine.generate(PROMPTS, max_new_tokens=6)
    assert parted.token_ids == together.token_ids
    assert parted.texts == together.texts
    assert (parted.stats.prompts, parted.stats.prompt_tokens) == (4, 23)


def test_texts_and_their_ids_are_the_same_prompt(engine, model):
    ids = model.tokenizer.encode(SNOWMAN + " ab").ids
    by_text, by_ids = engine.generate([SNOWMAN + " ab", ids, np.array(ids)], max_new_tokens=4).token_ids[:2]
    assert by_text == by_ids


def test_each_request_has_its_own_length(engine):
    long = engine.generate([PROMPTS[0]] * 4, max_new_tokens=9).token_ids[0]
    requests = [Request(prompt=PROMPTS[0], max_new_tokens=count) for count in (1, 9, 2, 5)]
    # Settings are for prompts that are no requests.
    result = engine.generate([*requests, PROMPTS[0]], max_new_tokens=7)
    assert result.token_ids == [long[:1], long, long[:2], long[:5], long[:7]]
    assert result.stats.new_tokens == 24


def test_a_stop_token_ends_its_own_request(engine):
    free = engine.generate(PROMPTS, max_new_tokens=10)
    stop = free.token_ids[1][4]
    result = engine.generate(PROMPTS, max_new_tokens=10, stop_token_ids=[PAD, stop])
    for tokens, why, text, whole in zip(
        result.token_ids, [one.finish_reason for one in result], result.texts, free.token_ids, strict=True
    ):
        if stop in whole:
            assert tokens == whole[: whole.index(stop) + 1]
            assert why == "stop"
            assert text == engine.model.tokenizer.decode(tokens[:-1])
        else:
            assert (tokens, why) == (whole, "length")
    assert result[1].finish_reason == "stop"
    assert "length" in [one.finish_reason for one in result]

    # The last token that is allowed may be the one to stop at.
    last = engine.generate(PROMPTS[:2], max_new_tokens=5, stop_token_ids=(stop,))
    assert last[1].finish_reason == "stop"
    assert engine.generate(PROMPTS, max_new_tokens=10, stop_token_ids=()).token_ids == free.token_ids


def test_the_models_own_stop_tokens_are_the_default(model, layers):
    free = layers.generate(PROMPTS[:2], max_new_tokens=8).token_ids
    stopping = replace(model, config=replace(model.config, stop_token_ids=(free[0][3],)))
    with Engine(stopping, layers.config) as engine:
        result = engine.generate(PROMPTS[:2], max_new_tokens=8)
        assert result.token_ids[0] == free[0][: free[0].index(free[0][3]) + 1]
        assert result[0].finish_reason == "stop"
        assert engine.generate(PROMPTS[:2], max_new_tokens=8, stop_token_ids=[]).token_ids == free


def test_the_context_ends_a_request(model, monkeypatch):
    """The last position there is may be filled, and none after it."""
    prompts = [[1] * 95, [1] * 90, [1] * 4]
    assert model.config.max_position_embeddings == 96
    with Engine(model, OffloadConfig(policy="host-only")) as engine:
        monkeypatch.setattr(engine.runner, "step", Dictation([[7, 8, 9]] * 3).step)
        events = list(engine.stream(prompts, max_new_tokens=10))
    counts = [sum(event.request == index for event in events) for index in range(3)]
    assert counts == [1, 6, 10]
    assert [event.request for event in events if event.finish_reason == "length"] == [0, 1, 2]


def check_stream(engine, **settings):
    settings |= {"max_new_tokens": 12, "stop_token_ids": [PAD]}
    expected = engine.generate(PROMPTS, **settings)
    tokens, texts, finish = [[] for _ in PROMPTS], [""] * 4, [None] * 4
    for event in engine.stream(PROMPTS, **settings):
        assert finish[event.request] is None
        tokens[event.request].append(event.token_id)
        texts[event.request] += event.text
        finish[event.request] = event.finish_reason
    assert (tokens, texts, finish) == (
        expected.token_ids,
        expected.texts,
        [one.finish_reason for one in expected],
    )
    assert any(texts)


def test_a_stream_is_what_generate_gives(engine):
    check_stream(engine)


def test_a_stream_of_samples_is_what_generate_gives(layers):
    check_stream(layers, temperature=1.5, seed=3)


@pytest.mark.parametrize(
    ("text", "specials", "finish", "expected"),
    [
        ("a" + SNOWMAN + "b", [], "length", "a" + SNOWMAN + "b"),
        ("a" + SNOWMAN, [EOS], "stop", "a" + SNOWMAN),
        (SNOWMAN, [PAD, EOS], "stop", SNOWMAN),  # a special token has no text
        ("é" * 3, [PAD], "length", "ééé"),
        ("", [EOS], "stop", ""),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_pieces_of_text_join_to_the_text(
    model, monkeypatch, tokenizer, text, specials, finish, expected, cut
):
    """Characters of several bytes come whole; one that is cut off is shown as `generate` shows it."""
    model = replace(model, tokenizer=TOKENIZERS[tokenizer])
    ids = model.tokenizer.encode(text).ids
    ids = ids[: len(ids) - cut] + specials if text else specials
    with Engine(model, OffloadConfig(policy="host-only")) as engine:
        monkeypatch.setattr(engine.runner, "step", Dictation([ids]).step)
        # Behind a prompt without text, so that a text's beginning is one here too.
        events = list(engine.stream([[PAD]], max_new_tokens=len(ids), stop_token_ids=[EOS]))
        assert [event.token_id for event in events] == ids
        joined = "".join(event.text for event in events)
        assert events[-1].finish_reason == finish
        assert joined == model.tokenizer.decode(ids)  # special tokens left out
        if not cut:
            assert joined == expected
        assert all("\N{REPLACEMENT CHARACTER}" not in event.text for event in events[:-1])


def encoded(tokenizer, text):
    return TOKENIZERS[tokenizer].encode(text, add_special_tokens=False).ids


letters = st.sampled_from(["a", "é", SNOWMAN, "\N{GRINNING FACE}", " ", "\n", "b"])
a_few_tokens = st.one_of(
    st.integers(0, VOCABULARY).map(lambda token: (token,)),  # one that the tokenizer does not know, too
    st.integers(256, VOCABULARY - 1).map(lambda token: (token,)),
    st.tuples(letters, st.integers(1, 4)),  # so many tokens of a letter
)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(st.lists(a_few_tokens, max_size=12), st.sampled_from(["stop", "length"]))
@example([(0x0A,), (0xF0,), (0x9F,), (260,), (260,)], "length")
@example([(SNOWMAN, 1), (PAD,), (SNOWMAN, 2), (0xFF,), (258,)], "length")
def test_no_text_is_taken_back_whatever_the_tokens(tokenizer, parts, finish):
    ids = []
    for part in parts:
        ids += part if len(part) == 1 else encoded(tokenizer, part[0])[-4:][: part[1]]
    spoken = TOKENIZERS[tokenizer]
    stream, shown = TextStream(spoken), ""
    for count, token in enumerate(ids, 1):
        shown += stream.add(token)
        assert spoken.decode(ids[:count]).startswith(shown)
    final = [*ids, EOS] if finish == "stop" else ids
    assert shown + stream.end(final, finish) == spoken.decode(ids)


@pytest.mark.parametrize(("tokenizer", "token"), [("bytes", 255), ("bytes", PAD), ("fallback", 258)])
def test_a_long_text_is_not_decoded_again_and_again(tokenizer, token):
    """Bytes that are no character, tokens without text and idle spaces must not pile up."""
    lengths = []

    class Counting:
        def __getattr__(self, name):
            return getattr(TOKENIZERS[tokenizer], name)

        def decode(self, ids, **settings):
            lengths.append(len(ids))
            return TOKENIZERS[tokenizer].decode(ids, **settings)

    stream = TextStream(Counting())
    for _ in range(500):
        stream.add(token)
    assert max(lengths) <= 5


@pytest.mark.parametrize("policy", ["lru", "fiddler"])
def test_a_recording_can_be_replayed_on_any_engine(model, tmp_path, policy):
    budget = 9 * model.bank.expert_bytes
    config = OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE, max_num_seqs=3)
    call = {"max_new_tokens": 5, "record_plans": True}
    with Engine(model, config) as engine:
        cold = engine.generate(PROMPTS, **call)
        warm = engine.generate(PROMPTS, **call)
    assert cold.token_ids == warm.token_ids
    for recorded in (cold, warm):
        save_plans(recorded.plans, tmp_path / "plans.jsonl")
        replayed = replace(config, policy=Replay(load_plans(tmp_path / "plans.jsonl")))
        with Engine(model, replayed) as engine:
            replays = [engine.generate(PROMPTS, **call) for _ in range(3)]
        for replay in replays:
            assert replay.token_ids == recorded.token_ids
            assert [(p.device, p.host) for p in replay.plans] == [(p.device, p.host) for p in recorded.plans]
        if recorded is cold:
            assert replays[0].plans == cold.plans


def test_steps_are_counted_within_a_call(layers):
    for _ in range(2):
        plans = layers.generate(PROMPTS[:2], max_new_tokens=3, record_plans=True).plans
        assert [plan.step for plan in plans] == [step for step in range(3) for _ in range(2)]


SAMPLED = {"max_new_tokens": 8, "temperature": 1.2}


def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(layers):
    requests = [Request(prompt=prompt, seed=seed, **SAMPLED) for seed, prompt in enumerate(PROMPTS)]
    tokens = layers.generate(requests).token_ids
    assert layers.generate(requests).token_ids == tokens
    assert layers.generate(requests[::-1]).token_ids == tokens[::-1]
    for request, alone in zip(requests, tokens, strict=True):
        assert layers.generate([request]).token_ids == [alone]
    greedy = Request(prompt=PROMPTS[3], max_new_tokens=8)
    mixed = layers.generate([requests[2], greedy])
    assert mixed.token_ids == [tokens[2], layers.generate([greedy]).token_ids[0]]
    assert layers.generate([replace(requests[0], seed=77)]).token_ids != [tokens[0]]
    # Two samples of one prompt are two samples.
    assert (
        len({tuple(t) for t in layers.generate([replace(requests[0], seed=s) for s in range(4)]).token_ids})
        == 4
    )


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=str)
def test_sampling_with_one_choice_is_greedy(layers, settings):
    greedy = layers.generate(PROMPTS, max_new_tokens=6)
    result = layers.generate(PROMPTS, **{"max_new_tokens": 6, "temperature": 5.0, "seed": 1} | settings)
    assert result.token_ids == greedy.token_ids


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ("Call me", "list of prompts, got 'Call me'; put it in a list"),
        ([3, 4, 5], "ids of a single prompt in another list"),
        (np.array([3, 4]), "ids of a single prompt in another list"),
        (Request(prompt=[3]), "list of prompts, got 'Request"),
        (b"Call me", "list of prompts"),
        (5, "list of prompts, got '5'"),
        ((prompt for prompt in [[1]]), "list of prompts, got '<generator.*put it in a list"),
        ([None], "prompt 0 must be text, a list of token ids or a Request, got None"),
        ([[1], [1.5]], r"prompt 1 must be text, a list of token ids or a Request, got \[1.5\]"),
        ([b"ab"], "prompt 0 must be text, a list of token ids or a Request, got b'ab'"),
        (["a", "a\udcffb"], "prompt 1 holds half a surrogate pair.*a byte that is not UTF-8"),
        ([[]], "prompt 0 is empty"),
        ([[1], ""], "prompt 1 is empty"),
        ([[1], [0] * 96], "prompt 1 has 96 tokens; the model's context holds 96.*shorten it"),
        ([[1], [280, 4, -1]], r"prompt 1 has ids outside 0..279: \[280, -1\]"),
        ([[], [999]], "prompt 0 is empty.*prompt 1 has ids outside"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_bad_prompts_are_refused_at_once(layers, call, prompts, message):
    with pytest.raises(ValueError, match=message):
        getattr(layers, call)(prompts)


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens must be a whole number in 1..2\*\*31-1, got 0"),
        ({"max_new_tokens": 2**31}, "max_new_tokens must be"),
        ({"max_new_tokens": "4"}, "max_new_tokens must be.*, got '4'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be.*, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be.*, got True"),
        ({"temperature": -0.1}, "temperature must be a number from 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": 10**400}, "temperature must be.*, got 10{59}$"),
        ({"temperature": "1"}, "temperature must be"),
        ({"top_k": -2}, "top_k must be a whole number, 0"),
        ({"top_k": 1.0}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be a number in"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"top_p": None}, "top_p must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids or None, got 3"),
        ({"stop_token_ids": "3"}, "stop_token_ids must be"),
        pytest.param({"stop_token_ids": iter([3])}, "stop_token_ids must be", id="an iterator"),
        ({"stop_token_ids": [3.5]}, "stop_token_ids must be"),
        ({"top_k": -2, "top_p": 2.0}, "top_k must be.*; top_p must be"),
        ({"max_num_seqs": 8}, r"got 'max_num_seqs' \(an engine has it: OffloadConfig\(max_num_seqs=\)\)"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_once(layers, call, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(layers, call)([[1]], **settings)


@pytest.mark.parametrize(
    "policy", [None, 5, "best", pytest.param(object(), id="an object"), POLICIES["lru"]], ids=str
)
def test_what_is_no_policy_is_refused(model, policy):
    with pytest.raises(ValueError, match=r"policy must be one of .* or a Policy object") as refusal:
        Engine(model, OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy=policy))
    assert ("make an object of the class" in str(refusal.value)) == isinstance(policy, type)


def test_extreme_settings_that_are_allowed(layers):
    assert layers.generate([[1]], max_new_tokens=1, seed=2**32 - 1, temperature=1.0, top_k=10**12).token_ids


def test_text_needs_a_tokenizer(model, layers):
    with Engine(replace(model, tokenizer=None), layers.config) as engine:
        with pytest.raises(ValueError, match=r"prompt 1 is text, but the model has no tokenizer"):
            engine.generate([[1], "text"])
        result = engine.generate([[1]], max_new_tokens=2)
        assert result.texts == [""]
        assert [event.text for event in engine.stream([[1]], max_new_tokens=2)] == ["", ""]


def test_bucket_and_rows():
    assert [batch_rows(count) for count in (1, 2, 3, 4, 5, 32, 33)] == [2, 2, 4, 4, 8, 32, 64]
    for least in (16, 64):
        sizes = [bucket(size, least) for size in range(1, 500)]
        assert all(size <= found < 2 * max(size, least) for size, found in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
        assert len(set(sizes)) <= 11
