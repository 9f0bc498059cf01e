"""A predictor training run: record routing, train, and use the predictor to prefetch.

    pip install '.[train]'
    python examples/train_predictor.py [checkpoint] [folder]

The texts are this package's own source, and far too few for a good predictor: the run takes seconds. The
commands for a real one are in docs/traces.md. Run it again with the same folder, and it continues.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import layerscope_jax as ls
from layerscope_jax.cli.options import folder_of
from predictor.record import RecordConfig, record
from predictor.train import TrainConfig, train

PACKAGE = Path(ls.__file__).parent


def main(checkpoint: str = "shipped", folder: str | None = None) -> None:
    """Trains a predictor of two layers ahead, and prints what its forecasts were worth."""
    work = Path(folder or tempfile.mkdtemp())
    model = ls.load(folder_of(checkpoint))
    recording = RecordConfig(
        text=(*sorted(PACKAGE.glob("scheduling/*.py")), *sorted(PACKAGE.glob("formats/*.py"))),
        out=work / "trace",
        heldout_domains=("formats",),  # a domain is a folder: this one is for measuring alone
        train_tokens=1024,
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
