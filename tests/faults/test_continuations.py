"""The text of new tokens is what follows the prompt's: no space lost between them, no character torn."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import PAD, byte_tokenizer, fallback_tokenizer, spelling_model
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.cli.complete import complete
from layerscope_jax.generation.detokenize import TextStream, continuation
from layerscope_jax.generation.prompt_files import Row
from layerscope_jax.generation.requests import Request

TOKENIZERS = {"bytes": byte_tokenizer(), "fallback": fallback_tokenizer()}


def metaspace_tokenizer():
    """As sentencepiece's: a space belongs to the word after it, and a text's first one is not said."""
    words = ["▁Hello", "▁hommes", "▁femmes", "s", "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.add_special_tokens(["<s>", "<end>"]) == 2
    return tokenizer


def streamed(tokenizer, prompt, new, finish="length"):
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in (new[:-1] if finish == "stop" else new)]
    return "".join(pieces) + stream.end(new, finish)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([0], " hommes"),
        ([5, 0], " hommes"),
        ([0, 5], " hommes"),
        ([0] + [5, 6] * 50, " hommes"),  # a template's end is special tokens alone
        ([], "hommes"),
        ([5], "hommes"),
        ([0] * 1000, " hommes"),
    ],
)
def test_the_space_between_prompt_and_continuation_stays(prompt, text):
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode([0, 1]) == "Hello hommes"
    assert continuation(tokenizer, [1], "length", prompt) == text
    assert streamed(tokenizer, prompt, [1]) == text
    assert streamed(tokenizer, prompt, [1, 3, 2, 6], "stop") == text + "s femmes"


def ids(name, text):
    found = TOKENIZERS[name].encode(text).ids
    return found[1:] if name == "fallback" else found


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("letter", ["é", "☃", "😀"])
def test_a_character_that_begins_in_the_prompt_is_whole(name, letter):
    tokenizer, tokens = TOKENIZERS[name], ids(name, "ab" + letter + "c")
    for cut in range(3, len(tokens) - 1):
        prompt, new = tokens[:cut], tokens[cut:]
        if not tokenizer.decode(prompt).endswith("\ufffd"):
            continue
        assert continuation(tokenizer, new, "length", prompt) == letter + "c"
        assert streamed(tokenizer, prompt, new) == letter + "c"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_that_is_never_finished_is_the_prompts(name):
    tokenizer = TOKENIZERS[name]
    letter, snowman = ids(name, "a"), ids(name, "☃")
    for cut in (1, 2):
        assert streamed(tokenizer, letter + snowman[:cut], letter) == "a"
        assert streamed(tokenizer, letter + snowman, letter) == "a"


def test_a_long_run_of_bytes_is_the_prompts():
    """Decoded in part it would be no text, and spoil what follows."""
    prompt = ids("fallback", "☃" * 50)
    new = ids("fallback", "☃a")
    assert streamed(TOKENIZERS["fallback"], prompt, new) == "☃a"
    assert continuation(TOKENIZERS["fallback"], new, "length", prompt) == "☃a"


tokens = st.lists(st.integers(0, 279), max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(tokens, tokens, st.sampled_from(["stop", "length"]))
@example([0xE2], [0x98, 0x83, 260], "length")
@example([0xE2, 0x98], [0xFF, 260], "length")
@example([260, 0xF0, 0x9F], [PAD, PAD, 0x98, 0x80, 260, 261], "length")
@example([256, 257], [258, 256, 260], "length")
def test_pieces_join_to_what_follows_the_prompt(name, prompt, new, finish):
    tokenizer = TOKENIZERS[name]
    final = [*new, 278] if finish == "stop" else new
    expected = continuation(tokenizer, final, finish, prompt)
    assert streamed(tokenizer, prompt, final, finish) == expected
    whole, before = tokenizer.decode([*prompt, *new]), tokenizer.decode(prompt)
    if whole.startswith(before) and not before.endswith("\ufffd"):
        assert before + expected == whole


def test_a_long_prompt_is_not_decoded_with_every_token():
    lengths = []

    class Counting:
        def __getattr__(self, name):
            return getattr(TOKENIZERS["fallback"], name)

        def decode(self, ids, **settings):
            lengths.append(len(ids))
            return TOKENIZERS["fallback"].decode(ids, **settings)

    stream = TextStream(Counting(), ids("fallback", "a" * 5000))
    for token in [260] * 50 + [PAD] * 50 + [258] * 50 + ids("fallback", "é"):
        stream.add(token)
    assert max(lengths) <= 9


class Dictation:
    """Stands for a runner that says given tokens, one row each."""

    def __init__(self, rows):
        self.rows, self.said = rows, -1

    def step(self, tokens, positions, last, caches, sampling):
        self.said += 1
        found = [row[min(self.said, len(row) - 1)] for row in self.rows]
        return np.array(found + [0] * (len(tokens) - len(found)), np.int32), None, caches


@pytest.mark.usefixtures("quick_compiles")
def test_texts_streams_and_rows_have_it(monkeypatch):
    """Whoever asks an engine for text: `generate`, `stream`, and rows as they are finished."""
    tokenizer = metaspace_tokenizer()
    model = replace(spelling_model(), tokenizer=tokenizer)
    prompts, new = ["Hello", [5, 0], [5]], [[1, 3, 6], [2, 3, 6], [1, 3, 6]]
    expected = [" hommess", " femmess", "hommess"]
    with Engine(model, OffloadConfig(policy="host-only")) as engine:
        monkeypatch.setattr(engine.runner, "step", lambda *inputs: spoken.step(*inputs))
        monkeypatch.setattr(
            "layerscope_jax.generation.slots.put_rows", lambda caches, rows, newcomers: caches
        )
        call = {"max_new_tokens": 3, "stop_token_ids": [6]}
        spoken = Dictation(new)
        result = engine.generate(prompts, **call)
        assert result.token_ids == new
        assert result.texts == expected
        spoken = Dictation(new)
        texts = [""] * 3
        for event in engine.stream(prompts, **call):
            texts[event.request] += event.text
        assert texts == expected
        spoken, rows = Dictation(new), {}
        requests = [Row(index, Request(prompt=p, **call), "") for index, p in enumerate(prompts)]
        complete(engine, requests, on_row=lambda row, outputs: rows.update({row.id: outputs[0].text}))
        assert rows == dict(enumerate(expected))
        assert engine.text(new[0], "stop", [5, 0]) == expected[0]
