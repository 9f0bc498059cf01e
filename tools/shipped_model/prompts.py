"""Cut the demo's prompts out of held-out documents: `python -m tools.shipped_model.prompts --help`.

The model that ships has seen none of these texts. Each prompt is named by the document it comes from and by
its first and last words, so that a corpus fetched again gives the same file or says what has changed.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("tools.shipped_model.prompts")

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from layerscope_jax.support import exits
from layerscope_jax.support.files import write_file
from tools.shipped_model.tokenizer import read_splits


class Cut(NamedTuple):
    """A passage of a held-out document, from its first words to its last words."""

    domain: str
    document: str
    first: str
    last: str


CUTS = (
    Cut("novels", "austen/emma/002", "Mr. Woodhouse was fond of society", "his fortune,"),
    Cut("novels", "moby-dick/chapter_109.txt", "According to usage", "sprung a bad leak."),
    Cut("verse", "milton/paradise_lost/002", "HAil holy light", "since God is light,\n"),
    Cut("verse", "shakespeare/henry_v/009", "KING HENRY.\nOnce more", "so becomes a man\n"),
    Cut("speeches", "sotu/1904_theodore_roosevelt_r.txt", "The Nation continues", "great natural resources;"),
    Cut("python-source", "netrc.py", "class NetrcParseError", "self.filename = filename\n"),
    Cut("python-source", "colorsys.py", "def rgb_to_yiq", "0.11*b\n"),
    Cut(
        "python-docs", "python/howto/logging.rst.txt", "Logging is a means", "certain\nevents have occurred."
    ),
)


def cut(text: str, first: str, last: str) -> str:
    """The passage of `text` from `first` to `last`, both included.

    Raises:
        ValueError: if it is not there.

    >>> cut("It was dark. Call me Ishmael. Some years ago", "Call", "Some")
    'Call me Ishmael. Some'
    """
    start = text.find(first)
    end = text.find(last, start)
    if start < 0 or end < 0:
        raise ValueError(f"expected a passage from {first!r} to {last!r}, found none")
    return text[start : end + len(last)]


def prompts(corpus: Path, cuts: Sequence[Cut] = CUTS) -> list[dict[str, str]]:
    """One row `{"id", "domain", "prompt"}` a cut.

    Raises:
        ValueError: if the corpus is not complete, or a passage is no longer in a held-out document.
    """
    heldout = {
        domain: {document.id: document.text for document in documents}
        for domain, documents in read_splits(corpus)["heldout"].items()
    }
    rows = []
    for domain, document, first, last in cuts:
        try:
            text = cut(heldout[domain].get(document, ""), first, last)
        except ValueError as error:
            raise ValueError(
                f"{domain}, held-out document {document}: {error}; the corpus has changed: choose another"
            ) from None
        rows.append({"id": document, "domain": domain, "prompt": text})
    return rows


@dataclass(frozen=True, kw_only=True)
class Options:
    """Cut the demo's prompts out of held-out documents."""

    corpus: Path
    """Folder that tools.shipped_model.corpus wrote."""
    out: Path = Path("layerscope_jax/shipped/prompts.jsonl")
    """The file to write."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and a message if the corpus is missing or has changed."""

    def run(args: list[str]) -> None:
        options = tyro.cli(Options, args=args)
        rows = prompts(options.corpus)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    exits.end(run, args)
