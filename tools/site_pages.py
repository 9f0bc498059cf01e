"""Gathers the pages of the site into `build/pages`, from which `mkdocs.yml` makes it.

    python tools/site_pages.py && zensical build --strict

The README is the site's first page, and the benchmarks, the predictor's page, the guide for contributors and
the changelog are part of it. Links between pages work in a checkout; here they become links of the site.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"

PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.txt",
    "benchmarks/README.md": "benchmarks/index.md",
    "predictor/README.md": "predictor.md",
}
"""File of the repository -> its place in the site; further ones keep theirs (`place_of`)."""

WHOLE = ("docs/**/*.*", "benchmarks/answers/*.md", "benchmarks/results/**/*.*")

LINK = re.compile(r"(\]\()([^)#\s]+)([#)])")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def gather(pages: Path = PAGES) -> None:
    """Writes the pages of the site, and the files that they link to, into a folder; what was there goes."""
    shutil.rmtree(pages, ignore_errors=True)
    names = [
        *PLACES,
        *(path.relative_to(ROOT).as_posix() for pattern in WHOLE for path in ROOT.glob(pattern)),
    ]
    for name in names:
        place = pages / place_of(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".md":
            place.write_text(relinked((ROOT / name).read_text(encoding="utf-8"), name), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / name, place)


def relinked(text: str, page: str) -> str:
    """Returns the text of a page with links of the site, outside of its blocks of code.

    >>> relinked("[wanted](../benchmarks/answers/load.md#notes)", "docs/convert.md")
    '[wanted](benchmarks/answers/load.md#notes)'
    """
    blocks = FENCE.findall(text)
    between = [
        LINK.sub(lambda link: link[1] + target(link[2], page) + link[3], part) for part in FENCE.split(text)
    ]
    return "".join(part for pair in zip(between, [*blocks, ""], strict=True) for part in pair)


def target(link: str, page: str) -> str:
    """Returns a link of a page of the repository as the site has it."""
    if ":" in link:
        return link
    name = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return posixpath.relpath(place_of(name), posixpath.dirname(place_of(page)) or ".")


def place_of(name: str) -> str:
    """Returns where a file of the repository is in the site."""
    return PLACES.get(name, name.removeprefix("docs/"))


if __name__ == "__main__":
    gather()
