"""Tokenizers without a `tokenizer.json` encode as transformers does, whichever files they come in."""

import hashlib
import json
import shutil
import struct
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from odd_texts import odd_texts

from layerscope_jax.checkpoints.sentencepiece_files import SentencePieceModel
from layerscope_jax.checkpoints.tokenizer_files import read_tokenizer
from layerscope_jax.generation.detokenize import TextStream, continuation

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))
# As tools/make_tokenizer_goldens.py has them.
COUNT, SEED = 1000, 11
NAMES = (
    *("<s>", "</s>", "<|im_end|>", "<|user|>", "<think>", "<sep>", "ISH", "<ctrl>", "[BOS]", "<|endoftext|>"),
    "<tool>",
)
VOCABULARY = 5000


@lru_cache
def tokenizer(case):
    config = json.loads((GOLDEN / case / "config.json").read_text())
    return read_tokenizer(GOLDEN / case, VOCABULARY, config["model_type"])


def digest(ids):
    return hashlib.blake2b(np.array(ids, "<i4").tobytes(), digest_size=8).digest()


def copy(case, folder, **settings):
    """A tokenizer in a folder of its own, with other settings."""
    target = shutil.copytree(GOLDEN / case, folder / case)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


@pytest.mark.parametrize("case", CASES)
def test_odd_texts_have_the_ids_of_transformers(case):
    with np.load(GOLDEN / case / "golden.npz") as golden:
        lengths, digests = golden["lengths"], golden["digests"].astype("<u8")
    texts = odd_texts(COUNT, SEED, NAMES)
    ids = [encoding.ids for encoding in tokenizer(case).encode_batch(texts)]
    wrong = [
        (text, each)
        for text, each, length, expected in zip(texts, ids, lengths, digests, strict=True)
        if len(each) != length or digest(each) != expected.tobytes()
    ]
    assert not wrong


@pytest.mark.parametrize("case", CASES)
def test_texts_are_decoded_whole_and_in_pieces(case):
    kind = tokenizer(case)
    for text in odd_texts(150, 5):
        ids = kind.encode(text, add_special_tokens=False).ids
        if case in ("mixtral", "kimi", "gpt2"):  # the others change characters
            assert kind.decode(ids) == (text.replace("\u2581", " ") if case == "mixtral" else text)
        stream = TextStream(kind, ids[:3])
        pieces = "".join(stream.add(token) for token in ids[3:])
        assert pieces + stream.end(ids[3:], "length") == continuation(kind, ids[3:], "length", ids[:3])


@pytest.mark.parametrize(
    ("settings", "begins", "ends"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": None}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_eos_token": True, "eos_token": "<|end|>"}, [1], [700]),  # a new token
        ({"bos_token": {"content": "</s>", "lstrip": False}}, [2], []),
        ({"bos_token": None}, [1], []),  # the model's own
    ],
)
def test_a_text_begins_and_ends_as_the_settings_say(tmp_path, settings, begins, ends):
    folder = copy("mixtral", tmp_path, **settings)
    kind = read_tokenizer(folder, VOCABULARY)
    plain = kind.encode("Call me Ishmael.", add_special_tokens=False).ids
    assert kind.get_vocab_size() == 700 + (ends == [700])
    assert kind.encode("Call me Ishmael.").ids == [*begins, *plain, *ends]
    assert kind.decode(kind.encode("Call me Ishmael.").ids) == "Call me Ishmael."


def test_tokenizer_json_wins(tmp_path):
    folder = copy("mixtral", tmp_path)
    tokenizer("gpt2").save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "added_tokens.json").write_text("of the other files")
    ids = read_tokenizer(folder, VOCABULARY).encode("Call me Ishmael.").ids
    assert ids == tokenizer("gpt2").encode("Call me Ishmael.").ids


def test_the_class_is_known_by_the_model_if_nothing_names_it(tmp_path):
    folder = copy("qwen2", tmp_path, tokenizer_class=None)
    for text in odd_texts(100, 3, NAMES):
        assert (
            read_tokenizer(folder, VOCABULARY, "qwen3_moe").encode(text).ids
            == tokenizer("qwen2").encode(text).ids
        )


@pytest.mark.parametrize(
    ("case", "name", "words"),
    [
        ("qwen2", "FutureTokenizer", "the class FutureTokenizer, none of GPT2Tokenizer, GPTNeoXTokenizer"),
        ("qwen2", None, "the class None, none of GPT2Tokenizer"),
        ("kimi", "QWenTokenizer", "the class QWenTokenizer, not TikTokenTokenizer"),
    ],
)
def test_a_tokenizer_of_an_unknown_class_is_not_guessed(tmp_path, case, name, words):
    folder = copy(case, tmp_path, tokenizer_class=name)
    with pytest.warns(UserWarning, match="prompts must be token ids, unless you add tokenizer") as warned:
        assert read_tokenizer(folder, VOCABULARY) is None
    assert words in str(warned[0].message)


@pytest.mark.parametrize(
    ("case", "file", "content", "words"),
    [
        ("mixtral", "tokenizer.model", b"", "expected a model of SentencePiece, got it has no pieces"),
        ("mixtral", "tokenizer.model", b"\x0a\xff\xff", "it is cut off, or no such file"),
        ("mixtral", "tokenizer.model", b"version https://git-lfs", "it is cut off, or no such file"),
        ("kimi", "tiktoken.model", b"", "expected the ranks 0 to -1"),
        ("kimi", "tiktoken.model", b"YQ== 0\nYg== 2\n", "expected the ranks 0 to 1, each once"),
        ("kimi", "tiktoken.model", b"YQ== 0\n!! 1\n", "got b'!! 1' on line 2; download it again"),
        ("qwen2", "vocab.json", b"{}", "expected an id for each token"),
        ("qwen2", "vocab.json", b'{"a": "b"}', "expected an id for each token"),
        ("qwen2", "vocab.json", b"[", "expected JSON, got"),
        ("qwen2", "merges.txt", b"#version: 0.2\na b c\n", "got 'a b c'; take both files from one model"),
        ("qwen2", "merges.txt", "\u4e00 \u4e01".encode(), "expected pairs whose joined token is"),
        ("qwen2", "merges.txt", b"\xff", "expected UTF-8, got"),
        ("unigram", "added_tokens.json", b'{"<x>": "1"}', "expected ids of tokens, got '1' for '<x>'"),
        ("unigram", "added_tokens.json", b'{"ISH": 9}', "expected 'ISH' to have the id 9, got 5 from tok"),
        (
            "unigram",
            "added_tokens.json",
            b'{"<x>": 5000}',
            "expected ids below the model's vocab_size of 5000",
        ),
        ("unigram", "special_tokens_map.json", b"[]", "expected a JSON object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, case, file, content, words):
    folder = copy(case, tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: expected ") as raised:
        read_tokenizer(folder, VOCABULARY)
    assert words in str(raised.value)


@pytest.mark.parametrize("case", ["mixtral", "unigram"])
def test_a_model_that_is_cut_off_is_no_crash(case):
    content = (GOLDEN / case / "tokenizer.model").read_bytes()
    whole = SentencePieceModel.read(content)
    for end in range(0, len(content), 97):
        with suppress(ValueError):
            assert SentencePieceModel.read(content[:end]) != whole


def test_kinds_of_models_that_are_not_supported(tmp_path):
    content = (GOLDEN / "mixtral" / "tokenizer.model").read_bytes()

    def trainer(*fields):  # a later message of the same field counts
        message = b"".join(fields)
        return content + b"\x12" + struct.pack("B", len(message)) + message

    for model, words in (
        (trainer(b"\x18\x03"), "its model_type is 3, and only 1 (Unigram) and 2 (BPE) are supported"),
        (trainer(b"\x18\x02", b"\xc0\x01\x01"), "its treat_whitespace_as_suffix is true"),
        (trainer(b"\x1a\x00"), "its field 3 is of another kind than expected"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(model)
        with pytest.raises(ValueError, match="expected a model of SentencePiece") as raised:
            read_tokenizer(tmp_path, VOCABULARY)
        assert words in str(raised.value)


def test_placeholders_are_renamed(tmp_path):
    """By ids of the vocabulary itself, which `added_tokens_decoder` gives other names."""
    added = {"300": {"content": "<|assistant|>", "special": True, "normalized": False}}
    folder = copy("mixtral", tmp_path, added_tokens_decoder=added)
    kind = read_tokenizer(folder, VOCABULARY)
    assert kind.encode("a<|assistant|>", add_special_tokens=False).ids[-1] == 300
    assert kind.get_vocab_size() == 700
