"""Makes a shipped file of recorded routing: `layerscope predictor routing` with the origin of the model.

Of a small model trained on real text, its trace and a predictor trained on that trace;
`layerscope_jax/profiles/README.md` has the commands.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from layerscope_jax.prediction.traces import Trace
from layerscope_jax.support.files import read_json
from predictor.fitted import load_or_fit
from predictor.llapor import LLaPor
from predictor.routing import MOST_REQUESTS, Packing, pack
from tools.shipped_model.baselines import Bigram
from tools.shipped_model.data import PackedTokens
from tools.shipped_model.release import WINDOWS, measure, run_config


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is packed.

    Attributes:
        name: the published model whose routing geometry this is.
        run: folder of the training run (`tools.shipped_model.train`).
        tokens: the tokens it was trained on.
        model: the model made of it (`tools.shipped_model.release`).
        traces: recorded with that model (`layerscope trace`).
        predictor: trained on the trace (`predictor.train`).
        linear: folder for a linear map of LLaPor's inputs, which is fitted as LLaPor was trained if it is not
            there; its forecast is kept as well, for `bench_worth --recordings`.
        out: the .npz file.
        packing: how much is kept.
    """

    name: str
    run: Path
    tokens: Path
    model: Path
    traces: Path
    predictor: Path
    out: Path
    linear: Path | None = None
    packing: Packing = field(default_factory=lambda: Packing(requests=MOST_REQUESTS))


def origin(options: Options) -> dict[str, Any]:
    """What the model and the predictor were trained on, and held-out losses in nats per token.

    Of the model; of a unigram and a bigram model of all the training text; and of a bigram model of just what
    the model was shown of it.
    """
    config = run_config(options.run, options.tokens)
    steps = json.loads((options.run / "log.jsonl").read_text().splitlines()[-1])["step"]
    losses, _ = measure(config, options.model)
    train = PackedTokens.open(options.tokens / "train", without=config.without)
    heldout = PackedTokens.open(options.tokens / "heldout")
    shown = [
        train.batch(config.rows, config.length + 1, seed=config.seed, step=step) for step in range(steps)
    ]
    vocab_size = len(read_json(options.tokens / "tokenizer.json")["model"]["vocab"])
    bigram = Bigram([np.concatenate(shown).reshape(-1)], vocab_size)
    shape = config.model_config(vocab_size)
    for row in losses:
        windows = heldout.windows(row["domain"], config.length + 1, WINDOWS)
        row["bigram_shown"] = np.mean([bigram.loss(window)[1] for window in windows])
    models = ("unigram", "bigram", "bigram_shown", "model")
    trained = read_json(options.predictor / "run.json")
    return {
        "name": options.name,
        "trained_tokens": steps * config.rows * config.length,
        "family": shape.family,
        "hidden": shape.hidden_size,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "loss": {row["domain"]: {name: round(float(row[name]), 3) for name in models} for row in losses},
        "predictor": {name: trained[name] for name in ("tokens", "epochs", "look_ahead")},
    }


def main() -> None:
    """Runs the command line; exits with 2 and a message for what does not serve."""
    try:
        options = tyro.cli(Options, description=__doc__)
        trace, llapor, fitted = Trace.open(options.traces), LLaPor.load(options.predictor), None
        if options.linear is not None:
            tokens = read_json(options.predictor / "run.json")["tokens"]  # as many as LLaPor had
            options.linear.mkdir(parents=True, exist_ok=True)
            fitted = load_or_fit(options.linear, trace, tuple(range(1, llapor.look_ahead + 1)), tokens).linear
        routing = pack(trace, llapor, options.packing, linear=fitted)
        header = {**routing.header, **origin(options)}
        replace(routing, header=header).save(options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    shown = {name: header[name] for name in ("trained_tokens", "loss", "recall")}
    print(json.dumps(shown, indent=1))
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
