"""A prompt's tokens are all of the user's text and nothing else, each under the id that the model knows."""

import json

import pytest
from helpers import VOCABULARY, byte_tokenizer
from tokenizers import AddedToken, Tokenizer

from layerscope_jax.checkpoints.tokenizer_files import read_tokenizer

TEXT = "a prompt of forty-one letters, no more..."
SPECIAL = {"content": "<think>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def read(folder, tokenizer, added=None, vocab_size=VOCABULARY + 100):
    tokenizer.save(str(folder / "tokenizer.json"))
    if added is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return read_tokenizer(folder, vocab_size)


def test_a_prompt_is_not_cut_to_the_length_of_an_earlier_one(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(8)
    assert len(Tokenizer.from_str(tokenizer.to_str()).encode(TEXT).ids) == 8
    assert len(read(tmp_path, tokenizer).encode(TEXT).ids) == len(TEXT) == 41


def test_a_prompt_is_not_filled_to_the_length_of_an_earlier_one(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_padding(length=64, pad_id=279, pad_token="<pad>")
    assert len(Tokenizer.from_str(tokenizer.to_str()).encode(TEXT).ids) == 64
    assert len(read(tmp_path, tokenizer).encode(TEXT).ids) == 41


def test_tokens_that_the_config_adds_are_tokens(tmp_path):
    added = {"280": SPECIAL, "281": SPECIAL | {"content": "</think>", "special": True}}
    tokenizer = read(tmp_path, byte_tokenizer(), added)
    assert tokenizer.encode("<think>a</think>").ids == [280, *byte_tokenizer().encode("a").ids, 281]
    assert tokenizer.decode([280, 281]) == "<think>"  # one is special, one is not
    assert tokenizer.get_vocab_size() == 282


def test_a_word_of_the_vocabulary_becomes_a_token_of_its_own(tmp_path):
    """Which the plain tokenizer takes to pieces."""
    plain = byte_tokenizer().encode("idle3").ids
    assert len(plain) == 5
    tokenizer = read(tmp_path, byte_tokenizer(), {"259": SPECIAL | {"content": "idle3"}})
    assert tokenizer.encode("idle3").ids == [259]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_flags_of_the_config_count(tmp_path, flag):
    letters = byte_tokenizer().encode("a ").ids
    added = {"278": {"content": "<eos>", "special": True, flag: True}}
    tokenizer = read(tmp_path, byte_tokenizer(), added)
    text = "a <eos>" if flag == "lstrip" else "<eos> a"
    assert tokenizer.encode(text).ids == ([letters[0], 278] if flag == "lstrip" else [278, letters[0]])
    assert tokenizer.get_added_tokens_decoder()[279].content == "<pad>"


def test_a_gap_between_ids_is_filled(tmp_path):
    tokenizer = read(tmp_path, byte_tokenizer(), {"290": SPECIAL, "285": SPECIAL | {"content": "<b>"}})
    assert tokenizer.encode("<think><b>").ids == [290, 285]


def test_what_the_tokenizer_has_already_is_left_as_it_is(tmp_path):
    same = {"278": {"content": "<eos>", "special": True}, "279": {"content": "<pad>", "special": True}}
    assert read(tmp_path, byte_tokenizer(), same).to_str() == byte_tokenizer().to_str()
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<x>", normalized=False)])
    (tmp_path / "tokenizer_config.json").unlink()
    assert read(tmp_path, tokenizer).to_str() == tokenizer.to_str()


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"277": SPECIAL | {"content": "<eos>"}}, "'<eos>' to have the id 277, got 278 from tokenizer.json"),
        ({"270": SPECIAL}, "'<think>' to have the id 270, got 280"),
        ({"400": SPECIAL}, "below the model's vocab_size of 380, got 400 for '<think>'"),
        ({"999999999": SPECIAL}, "below the model's vocab_size of 380"),
        ({"1" * 5000: SPECIAL}, "expected ids of tokens, got '1111"),
        ({"-1": SPECIAL}, "expected ids of tokens, got '-1'"),
        ({"280": "x"}, "expected the content of token 280"),
        ({"280": {"content": 3}}, "expected the content of token 280"),
        ({"280": {"content": ""}}, "expected the content of token 280"),
        ({"280": SPECIAL | {"lstrip": "yes"}}, "expected true or false for lstrip"),
        ([1], "expected an object, got list"),
    ],
)
def test_tokens_that_cannot_have_their_ids_are_refused(tmp_path, added, words):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: added_tokens_decoder: ") as raised:
        read(tmp_path, byte_tokenizer(), added)
    assert words in str(raised.value)


@pytest.mark.parametrize("content", [b"[]", b'{"a": NaN}', "{}".encode("utf-16"), b"[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected ") as raised:
        read(tmp_path, byte_tokenizer())
    assert str(raised.value).count("tokenizer_config.json") == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer, got "):
        read_tokenizer(tmp_path, 10)
