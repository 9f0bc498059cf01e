"""Cuts a small held-out trace: `python -m tools.shipped_model.excerpt --traces DIR --out DIR`.

It is what is shipped with a predictor to score it by: of each domain a few held-out passages, the beginning
of each.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("tools.shipped_model.excerpt")

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from layerscope_jax.prediction.traces import Trace, TraceWriter
from layerscope_jax.support import exits
from layerscope_jax.support.locks import locked_folder
from predictor import pca, routers


@dataclass(frozen=True, kw_only=True)
class ExcerptConfig:
    """One excerpt.

    Attributes:
        traces: folder made by `layerscope trace`.
        out: folder for the excerpt.
        passages: of each domain.
        tokens: of each passage; half of them are its prompt.
    """

    traces: Path
    out: Path
    passages: int = 16
    tokens: int = 32


def excerpt(config: ExcerptConfig) -> Trace:
    """Writes the excerpt and returns it.

    Raises:
        ValueError: if a domain has too few held-out passages of that length, or the folder holds a trace.
    """
    if config.passages < 1 or config.tokens < 2:
        raise ValueError(
            f"expected passages of 1 or more and tokens of 2 or more, got {config.passages}, {config.tokens}"
        )
    trace = Trace.open(config.traces)
    taken: Counter[str] = Counter()
    kept, parts = [], []
    for chunk, passage, rows in trace.passages():
        if passage.split != "heldout" or passage.tokens < config.tokens:
            continue
        taken.setdefault(passage.domain, 0)
        if taken[passage.domain] == config.passages:
            continue
        taken[passage.domain] += 1
        kept.append(passage._replace(tokens=config.tokens, prompt=config.tokens // 2))
        first = slice(rows.start, rows.start + config.tokens)
        parts.append({name: np.asarray(chunk.map(name)[first]) for name in chunk.files})
    short = [f"{domain} has {count}" for domain, count in taken.items() if count < config.passages]
    if short or not taken:
        raise ValueError(
            f"{config.traces}: expected {config.passages} held-out passages of {config.tokens} tokens or "
            f"more in each domain, got too few ({', '.join(short) or 'none at all'}); ask for fewer"
        )
    with locked_folder(config.out):
        writer = TraceWriter(
            config.out, replace(trace.header, settings=trace.header.settings | {"excerpt": config.tokens})
        )
        if writer.done:
            raise ValueError(f"{config.out} holds a trace already; choose another folder")
        for name in (pca.FILE, routers.FILE):
            if (trace.folder / name).exists():
                shutil.copyfile(trace.folder / name, config.out / name)
        writer.write(kept, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        writer.finish()
    return Trace.open(config.out)


def main() -> None:
    """Runs the command line; see `layerscope_jax.support.exits`."""

    def run(args: list[str]) -> None:
        exits.need_output()
        found = excerpt(tyro.cli(ExcerptConfig, description=__doc__, args=args))
        print(f"{found.folder} holds {found.rows:,} rows")

    exits.end(run)
