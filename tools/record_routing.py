"""Makes a file of recorded routing: a trace's held-out requests, and what predictors say of them.

From a small model trained on real text, its trace and a predictor trained on that trace. `Routing` of
`simulation.routing` reads what is written; `layerscope_jax/profiles/README.md` has the commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import track

from layerscope_jax.prediction.predictors import NextGate
from layerscope_jax.prediction.traces import Passage, Trace, positions
from layerscope_jax.simulation.routing import Routing, StoredForecast
from layerscope_jax.simulation.routing_files import FORMAT
from layerscope_jax.support.files import read_json
from predictor.baselines import Candidate, Gate, Learned, Popularity, PreviousToken, truth
from predictor.dataset import load_rows
from predictor.llapor import LLaPor
from predictor.metrics import ranked_recall
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.train import by_horizon
from tools.shipped_model.baselines import Bigram
from tools.shipped_model.data import PackedTokens
from tools.shipped_model.release import WINDOWS, measure, run_config


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How much is kept.

    Attributes:
        requests: R, of all domains in turns.
        steps: S, decode steps that follow each prompt.
        prompt: fewest and most tokens of a prompt; lengths are drawn evenly between them.
        kept: M, the likeliest experts of a forecast; 0 for two more than K.
        levels: steps that probabilities are rounded to, a divisor of 255: fewer make a smaller file.
        gate_look_ahead: W of the gate's forecast; at most the trained predictor's.
        seed: of the requests and the lengths.
    """

    requests: int = 64
    steps: int = 64
    prompt: tuple[int, int] = (16, 64)
    kept: int = 0
    levels: int = 15
    gate_look_ahead: int = 2
    seed: int = 0


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
    packing: Packing = Packing()


def pack(trace: Trace, llapor: LLaPor, packing: Packing, *, progress: bool = True) -> Routing:
    """Held-out routing of a trace with the forecasts of `llapor` and of the next layers' routers.

    Recall is of all tokens of the held-out passages that are long enough, but the first ones, which have no
    token before them.

    Raises:
        ValueError: if the trace has too few held-out passages that are long enough.
    """
    least, most = packing.prompt
    if not 1 <= least <= most:
        raise ValueError(f"prompt must be two lengths, the smaller one first, got {least} and {most}")
    if packing.levels < 1 or 255 % packing.levels:
        raise ValueError(f"levels must be a divisor of 255, such as 15, 51 or 255, got {packing.levels}")
    long = most + packing.steps
    what = f"held-out passages of {long} tokens or more"
    rows = load_rows(trace, lambda passage: passage.split == "heldout" and passage.tokens >= long, what=what)
    picked = choose(rows.passages, packing)
    starts = np.cumsum([0, *(passage.tokens for passage in rows.passages)])[picked]
    random = np.random.default_rng(packing.seed)
    lengths = random.integers(least, most, len(picked), endpoint=True)
    decoded = starts[None] + lengths[None] + np.arange(packing.steps)[:, None]  # [S, R]

    routers, basis = Routers.load(trace.folder), Basis.load(trace.folder)
    model = trace.header.model
    layers, experts, choices = model.num_layers, model.num_experts, model.experts_per_token
    horizons = tuple(range(1, llapor.look_ahead + 1))
    nothing = Popularity(np.zeros((layers, experts), np.float32), horizons)
    candidates: list[Candidate] = [
        Learned(llapor, routers, basis, horizons),
        Gate(routers, basis, nothing, choices),
        PreviousToken(nothing),
    ]
    kept = min(packing.kept or choices + 2, experts)
    looked = {"llapor": len(horizons), "gate": min(packing.gate_look_ahead, len(horizons))}
    stored: dict[str, list[StoredForecast]] = {name: [] for name in looked}
    recall: dict[str, list[np.ndarray]] = {candidate.name: [] for candidate in candidates}
    counted = positions(rows.passages) > 0
    for layer in track(range(layers), "packing", disable=not progress):
        true = truth(rows, layer, horizons)
        known = true.known & counted[:, None]
        for candidate in candidates:
            found = candidate.forecast(rows, layer)
            right = np.asarray(
                ranked_recall(jnp.asarray(found.ranking), jnp.asarray(true.experts.astype(np.int32)))
            )
            recall[candidate.name].append((right * known).sum(0) / known.sum(0))
            if candidate.name in looked:
                ahead = found.probabilities[decoded, : looked[candidate.name]]
                stored[candidate.name].append(likeliest(ahead, kept, packing.levels))
    chosen = [rows.passages[index] for index in picked]
    prompts = np.minimum(starts[:, None] + np.arange(most), len(rows) - 1)  # [R, P]
    real = np.arange(most)[None] < lengths[:, None]
    return Routing(
        header={
            "format": FORMAT,
            "geometry": model.counts(),
            "domains": [passage.domain for passage in chosen],
            "documents": [passage.document for passage in chosen],
            "heldout_domains": trace.header.settings.get("heldout_domains", []),
            "recall": {name: means_of(np.stack(layers), name) for name, layers in recall.items()},
            "recall_tokens": int(counted.sum()),
        },
        decode_experts=rows.experts[decoded],
        prefill_experts=np.where(real[:, :, None, None], rows.experts[prompts], 0).astype(np.uint8),
        prefill_lengths=lengths.astype(np.int32),
        forecasts={
            name: StoredForecast(*(np.stack(parts, 2) for parts in zip(*found, strict=True)))
            for name, found in stored.items()
        },
    )


def choose(passages: Sequence[Passage], packing: Packing) -> list[int]:
    """Indices of the requests' passages: domains in turns, within one as they come; different ones.

    Raises:
        ValueError: if there are too few.
    """
    if len(passages) < packing.requests:
        raise ValueError(
            f"expected {packing.requests} held-out passages of {packing.prompt[1] + packing.steps} tokens or "
            f"more, got {len(passages)}; record more text, or pack fewer requests"
        )
    of_domain: dict[str, list[int]] = {}
    for index in np.random.default_rng(packing.seed).permutation(len(passages)):
        of_domain.setdefault(passages[index].domain, []).append(int(index))
    turns = sorted(
        (turn, domain, index) for domain, indices in of_domain.items() for turn, index in enumerate(indices)
    )
    return [index for _, _, index in turns[: packing.requests]]


def likeliest(probabilities: np.ndarray, kept: int, levels: int = 255) -> StoredForecast:
    """The `kept` likeliest experts of [..., E], best first, and their probabilities in 255ths.

    >>> [part.tolist() for part in likeliest(np.array([0.1, 0.0, 1.0, 0.45]), 2, levels=15)]
    [[2, 3], [255, 119]]
    """
    order = np.argsort(-probabilities, -1, kind="stable")[..., :kept]
    found = np.rint(levels * np.take_along_axis(probabilities, order, -1)) * (255 // levels)
    return StoredForecast(order.astype(np.uint8), found.astype(np.uint8))


def means_of(recall: np.ndarray, name: str) -> dict[str, list[float]]:
    """Means over layers of a predictor's recall [L, W]; the gate knows nothing of the next step."""
    means = by_horizon(recall)
    return {"this_step": means["this_step"]} if name == NextGate.name else means


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
    options = tyro.cli(Options, description=__doc__)
    try:
        routing = pack(Trace.open(options.traces), LLaPor.load(options.predictor), options.packing)
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
