"""Reads Markdown pages: their code blocks, the commands in them, and the files and options that they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
        ROOT / "predictor" / "README.md",
        *(ROOT / "layerscope_jax").glob("*/README.md"),
    ]
)

NOT_RUN = "<!-- not run -->"
"""Stands before a Python block that is for reading."""

FENCE = re.compile(r"^(?:(<!-- not run -->)\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)?(#[^)\s]+)?\)")
NAMED_FILE = re.compile(r"(?<![\w/.@-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|sh|npz|json|jsonl|png))(?![\w/-])")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]")


SETTINGS = re.compile(r"^(?:[A-Z_]+=\S+ )+")
"""Environment variables before a command."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    run: bool


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    return [Block(language, text, not skip) for skip, language, text in FENCE.findall(page.read_text())]


def prose(page: Path) -> str:
    """Returns a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def commands(page: Path, languages: tuple[str, ...] = ("",)) -> Iterator[list[str]]:
    """Yields the words of each `layerscope` and `python` command in the blocks of some languages.

    By default of those without any: blocks of a shell need what a page cannot bring along, such as a server.
    """
    for block in blocks(page):
        if block.language not in languages:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            line = SETTINGS.sub("", line).removesuffix("&").rstrip()
            if not re.match(r"(.*&& )?(layerscope|python) ", line):
                continue
            for command in re.split(r"&&|\|", line):
                words = shlex.split(command, comments=True)
                words = words[: words.index(">")] if ">" in words else words
                if words[:1] in (["layerscope"], ["python"]):
                    yield words


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
