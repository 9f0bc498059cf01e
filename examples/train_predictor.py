"""A predictor training run: record routing, train, and use the predictor to prefetch.

    pip install '.[train]'
    python examples/train_predictor.py [checkpoint] [folder]

The texts are this package's own docstrings, far too few for a good predictor: the run takes seconds. The
commands for a real one are in docs/traces.md. Run it again with the same folder, and it continues.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
from pathlib import Path

import layerscope_jax as ls
from predictor.record import RecordConfig, record
from predictor.train import TrainConfig, train

DOMAINS = ("scheduling", "formats")
"""Folders of the package whose docstrings are read; the second one is for measuring alone."""


def write_docstrings(domain: str, file: Path) -> Path:
    """Writes the docstrings of a folder of the package, a document a line, and returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lines:
        for source in sorted((Path(ls.__file__).parent / domain).glob("*.py")):
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    place = f"{source.stem}.{node.name}.{node.lineno}"
                    lines.write(json.dumps({"id": place, "text": text}) + "\n")
    return file


def main(checkpoint: str = "shipped", folder: str | None = None) -> None:
    """Trains a predictor of two layers ahead, and prints what its forecasts were worth."""
    work = Path(folder or tempfile.mkdtemp())
    model = ls.load(checkpoint)
    recording = RecordConfig(
        text=tuple(write_docstrings(name, work / "texts" / f"{name}.jsonl") for name in DOMAINS),
        out=work / "trace",
        heldout_domains=DOMAINS[1:],
        train_tokens=2048,
        heldout_tokens=64,
        length=32,
        hidden=32,
    )
    trace = record(model, recording)
    print(f"recorded {trace.rows:,} tokens")

    settings = TrainConfig(traces=work / "trace", out=work / "predictor", look_ahead=2, epochs=1, batch=64)
    trained = train(settings, progress=False)
    config = ls.OffloadConfig(device_budget=model.bank.total_bytes // 2, policy="fate", predictor=trained)
    with ls.Engine(model, config) as engine:
        stats = engine.generate(["Call me Ishmael."], max_new_tokens=8).stats
    assert stats.forecast_recall is not None
    print(f"{stats.forecast_recall:.0%} of the experts were forecast, {stats.hit_rate:.0%} of them resident")


if __name__ == "__main__":
    main(*sys.argv[1:])
