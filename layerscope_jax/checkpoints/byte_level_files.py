"""Byte-level BPE without a `tokenizer.json`: `vocab.json` with `merges.txt`, and `tiktoken.model`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from layerscope_jax.support.files import read_json

ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN = ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
KIMI = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}&&[^\p{{Han}}]]*[{LOWER}&&[^\p{{Han}}]]+{ENDING}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}&&[^\p{{Han}}]]+[{LOWER}&&[^\p{{Han}}]]*{ENDING}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How Moonlight's and Kimi's own code splits a text (tokenization_moonshot.py)."""

RESERVED = 258
"""Tokens after those of a `tiktoken.model`; the same code names those that have no name."""


class ByteLevel(NamedTuple):
    """How a tokenizer class of transformers splits a text before byte pairs are merged.

    Attributes:
        pattern: regular expression by which it splits; None for GPT-2's.
        composes: whether letters are composed with their accents first (NFC).
        roles: role -> special token, where `tokenizer_config.json` names no other.
    """

    pattern: str | None
    composes: bool
    roles: Mapping[str, str]


END = "<|endoftext|>"
CLASSES = {
    "GPT2Tokenizer": ByteLevel(None, False, {"bos_token": END, "eos_token": END, "unk_token": END}),
    "GPTNeoXTokenizer": ByteLevel(
        None, True, {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": "<|padding|>"}
    ),
    "Qwen2Tokenizer": ByteLevel(QWEN, True, {"eos_token": END, "unk_token": END, "pad_token": END}),
}
"""By the `tokenizer_class` of `tokenizer_config.json`, without "Fast"."""


def read_merges(folder: Path, kind: ByteLevel, add_prefix_space: bool) -> Tokenizer:
    """Returns the tokenizer of a folder's `vocab.json` and `merges.txt`.

    Raises:
        ValueError: if a file is damaged, or the two do not fit together.
    """
    file = folder / "vocab.json"
    vocabulary = read_json(file)
    if not vocabulary or not all(
        type(number) is int and 0 <= number < 2**31 for number in vocabulary.values()
    ):
        raise ValueError(f"{file}: expected an id for each token; download it again")
    file = folder / "merges.txt"
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, got {error}; download it again") from None
    if lines[0].startswith("#version"):
        del lines[0]
    merges: list[tuple[str, str]] = []
    for line in filter(None, lines):
        left, _, right = line.partition(" ")
        if not vocabulary.keys() >= {left, right, left + right}:
            raise ValueError(
                f"{file}: expected pairs whose joined token is in vocab.json too, got {line[:60]!r}; take "
                "both files from one model"
            )
        merges.append((left, right))
    return _byte_level(BPE(vocabulary, merges), kind, add_prefix_space)


def read_tiktoken(file: Path) -> Tokenizer:
    """Returns the tokenizer of a `tiktoken.model` of Moonlight or Kimi, without its special tokens.

    Raises:
        ValueError: if the file is damaged.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, place = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(place)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{file}: expected a token in base64 and its rank on each line, got {line[:40]!r} on line "
                f"{number}; download it again"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(f"{file}: expected the ranks 0 to {len(ranks) - 1}, each once; download it again")
    letters = _letters()
    names = {token: "".join(letters[number] for number in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], names[left], names[right]))
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    # A part of a text that is a token is never put together from others.
    model = BPE(vocabulary, [(left, right) for *_, left, right in sorted(merges)], ignore_merges=True)
    return _byte_level(model, ByteLevel(KIMI, False, {}), add_prefix_space=False)


def _byte_level(model: BPE, kind: ByteLevel, add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if kind.composes:
        tokenizer.normalizer = normalizers.NFC()
    byte_level: Any = pre_tokenizers.ByteLevel(
        add_prefix_space=add_prefix_space, use_regex=kind.pattern is None
    )
    if kind.pattern is not None:
        byte_level = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(kind.pattern), "isolated"), byte_level]
        )
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> list[str]:
    """The letter that stands for each byte: itself where it can be seen, else one from 256 on (GPT-2)."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    letters = {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]
