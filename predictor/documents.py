"""Documents of a corpus: cleaning, cutting long texts, reading and writing, and the held-out split."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerscope_jax.support.files import parse_json, write_file

MIN_CHARS = 500
HELDOUT_SHARE = 0.05
MIN_HELDOUT = 2


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a domain; `id` is unique within the domain."""

    id: str
    text: str


def clean(text: str) -> str:
    """Return `text` with plain newlines, without byte-order mark, trailing spaces, blank first or last lines.

    >>> clean("a  \\r\\n  b\\r\\n\\n")
    'a\\n  b'
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def cut_at(text: str, heading: re.Pattern[str], *, min_chars: int = MIN_CHARS) -> list[str]:
    """Cut `text` in front of every match of `heading`.

    A piece shorter than `min_chars` (a title page, "ACT II" in front of "SCENE I") joins the piece after it;
    the last piece, if short, joins the one before it. Nothing of the text is lost.
    """
    starts = sorted({0, *(match.start() for match in heading.finditer(text))})
    return _join_short((text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)), min_chars)


def cut_blocks(text: str, *, chars: int) -> list[str]:
    """Cut `text` at blank lines into pieces of at least `chars` characters (a run of sonnets, of stanzas)."""
    return _join_short(re.split(r"(?<=\n\n)(?=\S)", text), chars)


def _join_short(pieces: Iterable[str], min_chars: int) -> list[str]:
    joined: list[str] = []
    waiting = ""
    for piece in pieces:
        waiting += piece
        if len(waiting) >= min_chars:
            joined.append(waiting)
            waiting = ""
    if waiting and joined:
        joined[-1] += waiting
    elif waiting:
        joined.append(waiting)
    return joined


def numbered(work: str, pieces: Iterable[str]) -> list[Document]:
    """Return one cleaned document per piece, named `work/000`, `work/001`, ... in order."""
    return [Document(id=f"{work}/{index:03d}", text=clean(piece)) for index, piece in enumerate(pieces)]


def heldout_ids(ids: Sequence[str]) -> set[str]:
    """Choose the held-out documents of a domain: about 5% of `ids`, and never fewer than two.

    The choice depends only on a hash of each id, so it is the same on every machine, and a document that is
    added later does not change the choice of others (except in domains so small that two are held out).

    Raises:
        ValueError: `ids` repeat, or there are too few to leave one for training.
    """
    if len(set(ids)) != len(ids):
        raise ValueError("document ids must be unique within a domain, got repeated ids; rename them")
    if len(ids) <= MIN_HELDOUT:
        raise ValueError(
            f"expected more than {MIN_HELDOUT} documents to split, got {len(ids)}; add documents"
        )
    ranked = sorted(ids, key=stable_hash)
    return {name for i, name in enumerate(ranked) if i < MIN_HELDOUT or stable_hash(name) < HELDOUT_SHARE}


def stable_hash(name: str) -> float:
    """Return a number in [0, 1) that depends only on `name` (Python's `hash` changes with every run)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / 2**48


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write one JSON object `{"id": ..., "text": ...}` per line."""
    lines = (json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) + "\n" for d in documents)
    write_file(path, "".join(lines))


def read_documents(path: Path) -> list[Document]:
    """Read what `write_documents` wrote.

    Raises:
        ValueError: a line is not such an object.
    """
    documents = []
    # not splitlines(), which also splits at U+2028 and similar characters within texts
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            fields = parse_json(line.encode())
            documents.append(Document(id=fields["id"], text=fields["text"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"id": ..., "text": ...}}, got {line[:60]!r}; '
                "every line must be one such JSON object"
            ) from error
    return documents
