"""How few tokens does a predictor need, from nothing and from another model's predictor?

For each number of tokens one training from nothing and one from each start; recall is of the trace's held-out
passages, mean over 1, 2, 4 and 8 layers ahead. A predictor's own recall is the best one from nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import harness
from layerscope_jax.prediction.traces import Trace
from predictor.recipe import BATCH, epochs_of
from predictor.train import TrainConfig, train
from predictor.verdict import judge

NOTHING = "nothing"
SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    traces: Path
    """Folder made by `layerscope trace`, of the model that the predictor is for."""
    start_from: tuple[Path, ...] = ()
    """Predictors of other models."""
    tokens: tuple[int, ...] = (1024, 4096, 16_384, 65_536)
    look_ahead: int = 8
    folder: Path | None = None
    """Where trainings are kept, so that an interrupted benchmark goes on; by default nowhere."""


def enough(recalls: Mapping[int, float], least: float) -> int | None:
    """The fewest tokens with such a recall; None where there is none.

    >>> enough({1024: 0.7, 4096: 0.86, 16384: 0.9}, 0.85), enough({1024: 0.7}, 0.85)
    (4096, None)
    """
    return next((tokens for tokens, recall in sorted(recalls.items()) if recall >= least), None)


def main(options: Options) -> dict[str, Any]:
    trace = Trace.open(options.traces)
    kept = options.folder or Path(tempfile.mkdtemp(prefix="transfer-"))
    recalls: dict[str, dict[int, float]] = {}
    gate = 0.0
    for name, start in ((NOTHING, None), *((str(path), path) for path in options.start_from)):
        recalls[name] = {}
        for tokens in options.tokens[:1] if options.quick else options.tokens:
            config = TrainConfig(
                traces=options.traces,
                out=kept / f"{len(recalls)}-{tokens}",
                look_ahead=min(options.look_ahead, trace.header.model.num_layers),
                tokens=tokens,
                epochs=1 if options.quick else epochs_of(tokens),
                batch=min(BATCH, tokens // 16),
                start_from=start,
            )
            verdict = judge(trace, train(config), tokens)
            recalls[name][tokens] = float(np.mean(verdict.recall["llapor"]))
            gate = float(np.mean(verdict.recall["gate"]))
    if options.folder is None:
        shutil.rmtree(kept)
    own = max(recalls[NOTHING].values())
    # With no tokens at all a predictor is about what the gate is: the second aim leaves that out.
    aims = {"own": SHARE * own, "lead": gate + SHARE * (own - gate)}
    rows = [
        {"start": name, "recall": found} | {aim: enough(found, least) for aim, least in aims.items()}
        for name, found in recalls.items()
    ]
    every = list(recalls[NOTHING])
    harness.print_table(
        f"Recall in %, mean over horizons, by tokens trained on (gate: {100 * gate:.1f}), and the tokens "
        f"that {SHARE:.0%} of its own recall, and of its lead over the gate, take",
        ("start", *map(str, every), "recall", "lead"),
        [
            (
                row["start"],
                *(f"{100 * row['recall'][tokens]:.1f}" for tokens in every),
                *(row[aim] or "more" for aim in aims),
            )
            for row in rows
        ],
    )
    result = {
        "benchmark": "transfer",
        "quick": options.quick,
        "machine": harness.machine(),
        "traces": str(options.traces),
        "gate": gate,
        "own": own,
        "rows": rows,
    }
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
