"""SentencePiece's `tokenizer.model` as a `tokenizers.Tokenizer`.

The file is a protocol buffer of few fields that matter (sentencepiece_model.proto), read directly: neither
the package `sentencepiece` nor `protobuf` is needed. How text is encoded is what these fields say:

1. characters are replaced by a compiled map, and runs of spaces become one space;
2. a space is put before the text, and spaces become "▁";
3. BPE joins the neighbours whose union has the best score, the leftmost first; Unigram takes the parts whose
   scores add up to most. Pieces that the user defined are never joined with others;
4. what is in no piece becomes bytes ("<0xE2>"), or the unknown piece.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

SPACE = "▁"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of pieces
UNIGRAM_MODEL, BPE_MODEL = 1, 2  # types of models


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says.

    Attributes:
        pieces: text, score and type of each, by id.
        is_bpe: else Unigram.
        byte_fallback: whether what is in no piece becomes bytes.
        unk, bos, eos: texts of these pieces; None where the model has none.
        charsmap: compiled replacements of characters; empty for none.
        adds_prefix: whether a space is put before the text.
        removes_spaces: whether spaces at the ends, and all but one of a run, are dropped.
        escapes_spaces: whether spaces become "▁".
    """

    pieces: tuple[tuple[str, float, int], ...]
    is_bpe: bool
    byte_fallback: bool
    unk: str | None
    bos: str | None
    eos: str | None
    charsmap: bytes
    adds_prefix: bool
    removes_spaces: bool
    escapes_spaces: bool

    @classmethod
    def read(cls, content: bytes) -> SentencePieceModel:
        """Reads the contents of a `tokenizer.model`.

        Raises:
            ValueError: if they are none, or of a kind that is not supported.
        """
        model = _fields(content)
        pieces = []
        for entry in model.get(1, ()):
            piece = _fields(_of_kind(entry, b"", 1))
            text, score = _last(piece, 1, b""), struct.unpack("<f", _last(piece, 2, bytes(4)))[0]
            pieces.append((text.decode(), score, _last(piece, 3, NORMAL)))
        trainer, normalizer = (_fields(_last(model, number, b"")) for number in (2, 3))
        kind = _last(trainer, 3, UNIGRAM_MODEL)
        if not pieces:
            raise ValueError("it has no pieces")
        if kind not in (UNIGRAM_MODEL, BPE_MODEL):
            raise ValueError(f"its model_type is {kind}, and only 1 (Unigram) and 2 (BPE) are supported")
        if _last(trainer, 24, 0):
            raise ValueError("its treat_whitespace_as_suffix is true, which is not supported")

        def named(id_field: int, default: int) -> str | None:
            number = _last(trainer, id_field, default)
            return pieces[number][0] if 0 <= number < len(pieces) else None

        return cls(
            pieces=tuple(pieces),
            is_bpe=kind == BPE_MODEL,
            byte_fallback=bool(_last(trainer, 35, 0)),
            unk=named(40, 0),
            bos=named(41, 1),
            eos=named(42, 2),
            charsmap=_last(normalizer, 2, b""),
            adds_prefix=bool(_last(normalizer, 3, 1)),
            removes_spaces=bool(_last(normalizer, 4, 1)),
            escapes_spaces=bool(_last(normalizer, 5, 1)),
        )

    def renamed(self, names: Mapping[int, str]) -> SentencePieceModel:
        """The same model, with other texts for the pieces of some ids, as placeholders are given later.

        A name that another piece has, and keeps, is not given.
        """
        kept = {text for number, (text, _, _) in enumerate(self.pieces) if number not in names}
        pieces = tuple(
            (names[number] if names.get(number, text) not in kept else text, score, kind)
            if number in names
            else (text, score, kind)
            for number, (text, score, kind) in enumerate(self.pieces)
        )
        return replace(self, pieces=pieces)

    def tokenizer(self, prefix_each: bool) -> Tokenizer:
        """Returns a tokenizer that encodes as this model does.

        Args:
            prefix_each: whether the space is put before each part of a text between added tokens, and not
                only before the text (transformers: `legacy`).
        """
        texts = [text for text, _, _ in self.pieces]
        defined = [text for text, _, kind in self.pieces if kind == USER_DEFINED]
        if self.is_bpe:
            model: Any = BPE(
                {text: number for number, text in enumerate(texts)},
                self._merges(),
                unk_token=self.unk,
                fuse_unk=True,
                byte_fallback=self.byte_fallback,
                ignore_merges=bool(defined),  # which would never make such a piece
            )
        else:
            scored = [(text, score) for text, score, _ in self.pieces]
            unk = None if self.unk is None else texts.index(self.unk)
            model = Unigram(scored, unk_id=unk, byte_fallback=self.byte_fallback)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(list(self._normalizers(prefix_each)))
        if splits := self._splits(prefix_each, defined):
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                *([decoders.ByteFallback()] if self.byte_fallback else []),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if self.adds_prefix else []),
            ]
        )
        return tokenizer

    def _merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces whose union is a piece, the best union first."""
        normal = {
            text: (-score, number) for number, (text, score, kind) in enumerate(self.pieces) if kind == NORMAL
        }
        ranked = []
        for text, rank in normal.items():
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in normal and right in normal:
                    ranked.append((rank, left, right))
        return [(left, right) for _, left, right in sorted(ranked)]

    def _normalizers(self, prefix_each: bool) -> Iterator[Any]:
        if self.charsmap:
            yield normalizers.Precompiled(self.charsmap)
        if self.removes_spaces:
            yield normalizers.Replace(Regex(r"\A +| +\z"), "")
            yield normalizers.Replace(Regex(" {2,}"), " ")
        if self.adds_prefix and prefix_each:
            yield normalizers.Prepend(SPACE)
        if self.escapes_spaces:
            yield normalizers.Replace(" ", SPACE)

    def _splits(self, prefix_each: bool, defined: list[str]) -> list[Any]:
        splits: list[Any] = []
        if self.adds_prefix and not prefix_each:
            splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
        if defined:
            longest_first = sorted(defined, key=len, reverse=True)
            splits.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated"))
        return splits


def _fields(content: bytes) -> dict[int, list[Any]]:
    """Fields of a protocol buffer's message, by number: whole numbers, or bytes.

    Raises:
        ValueError: if it is no such message.
    """
    fields: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(content) or shift > 63:
                raise ValueError("it is cut off, or no such file")
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value - (1 << 64) if value >> 63 else value

    while at < len(content):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value: Any = varint()
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind) or varint()
            value = content[at : at + size]
            at += size
            if size < 0 or at > len(content):
                raise ValueError("it is cut off, or no such file")
        else:
            raise ValueError("it is cut off, or no such file")
        fields.setdefault(number, []).append(value)
    return fields


def _last(fields: Mapping[int, list[Any]], number: int, default: Any) -> Any:
    """The last value of a field; of the kind that `default` is, which stands for a missing one."""
    return _of_kind(fields.get(number, [default])[-1], default, number)


def _of_kind(value: Any, like: Any, number: int) -> Any:
    if isinstance(value, bytes) != isinstance(like, bytes):
        raise ValueError(f"its field {number} is of another kind than expected")
    return value
