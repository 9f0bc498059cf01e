"""Shows the doctests of docstrings as code in the API reference: an extension of Griffe (`mkdocs.yml`)."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^(?:>>> .*\n?(?:.+\n?)*)", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts each doctest between fences, with an empty line before it, which Markdown needs."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(fenced, obj.docstring.value)


def fenced(doctest: re.Match[str]) -> str:
    """Returns a doctest as a block of code."""
    return f"\n```pycon\n{doctest[0].rstrip()}\n```\n"
