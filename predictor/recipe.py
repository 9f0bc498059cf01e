"""All that a model's own predictor takes: records text, trains, and measures whether it beats the gate."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.config import OffloadConfig
from layerscope_jax.prediction.traces import Trace
from layerscope_jax.support.checks import Problems
from predictor.dataset import for_training, for_validation
from predictor.llapor import LLaPor
from predictor.record import RecordConfig, passages_of, read_domains, record
from predictor.train import TrainConfig, train
from predictor.verdict import FILE, Verdict, judge, more_tokens

FEWEST = 8192
"""Tokens to train on below which training is not begun."""
LOOK_AHEAD = 8
WORTH = 1 / (0.8 * 0.95)
"""Tokens recorded for each that is trained on: a fifth validates, and one document in twenty is held out."""
HELDOUT_TOKENS = 8192
"""Most tokens of a domain to measure on."""
BATCH = 512
SHOWN = 131_072
"""Tokens that a training sees at least, some of them several times; at most `MOST_EPOCHS` times."""
MOST_EPOCHS = 8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a predictor is made of.

    Attributes:
        text: files, as in `predictor.record.RecordConfig`.
        out: folder for the predictor and its verdict, with the trace in `trace`; an interrupted run is
            continued.
        heldout_domains: domains that are only measured on.
        tokens: maximum number of tokens to train on, over all domains.
        look_ahead: W; None for 8, or as many layers as there are.
        start_from: folder of another predictor to begin with.
        seed: of the choice of passages and of the training.
        offload: how the model is run for the recording.
    """

    text: tuple[Path, ...]
    out: Path
    heldout_domains: tuple[str, ...] = ()
    tokens: int = 65_536
    look_ahead: int | None = None
    start_from: Path | None = None
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least(self, tokens=FEWEST)
        problems.raise_any()


def make(model: Model, recipe: Recipe, *, progress: bool = True) -> Verdict:
    """Records, trains and measures; the folder then holds the predictor and its verdict.

    Raises:
        ValueError: if the text is not suitable or too short; says how much more is needed.
    """
    trace = record(model, recording(model, recipe))
    look_ahead = recipe.look_ahead or min(LOOK_AHEAD, trace.header.model.num_layers)
    (recipe.out / FILE).unlink(missing_ok=True)  # of another training
    settings = training(trace, recipe, look_ahead)
    llapor = train(settings, progress=progress)
    verdict = judge(trace, llapor, settings.tokens)
    if verdict.forecast != LLaPor.name:
        verdict = replace(verdict, more_tokens=needed(trace, settings, verdict, progress))
    verdict.save(recipe.out)
    return verdict


def recording(model: Model, recipe: Recipe) -> RecordConfig:
    """Settings of the recording, whose text is long enough.

    Raises:
        ValueError: if it is not.
    """
    domains = len(read_domains(recipe.text).keys() - set(recipe.heldout_domains))
    config = RecordConfig(
        text=recipe.text,
        out=recipe.out / "trace",
        heldout_domains=recipe.heldout_domains,
        train_tokens=-(-round(WORTH * recipe.tokens) // max(1, domains)),
        heldout_tokens=HELDOUT_TOKENS,
        offload=recipe.offload,
        seed=recipe.seed,
    )
    passages = [passage for passage, _ in passages_of(model, config)]
    there = sum(passage.tokens for passage in passages if for_training(passage))
    if there < FEWEST:
        more = round((FEWEST - there) * WORTH)
        raise ValueError(
            f"text: expected {FEWEST:,} tokens or more to train on, got {there:,} (about one in four is kept "
            f"for measuring); give about {more:,} tokens more, some {4 * more / 1e3:,.0f} kB of English text"
        )
    heldout = sum(passage.split == "heldout" for passage in passages)
    if heldout < 2 or not any(map(for_validation, passages)):
        raise ValueError(
            f"text: expected two passages to measure on and one to validate with, of documents that are not "
            f"trained on, got {heldout} and {sum(map(for_validation, passages))}; give more documents"
        )
    return config


def training(trace: Trace, recipe: Recipe, look_ahead: int) -> TrainConfig:
    """Settings of the training on a trace, with more passes over few tokens."""
    there = sum(passage.tokens for _, passage, _ in trace.passages() if for_training(passage))
    tokens = min(recipe.tokens, there)
    return TrainConfig(
        traces=trace.folder,
        out=recipe.out,
        look_ahead=look_ahead,
        tokens=tokens,
        epochs=epochs_of(tokens),
        batch=min(BATCH, tokens // 32),
        start_from=recipe.start_from,
        seed=recipe.seed,
    )


def epochs_of(tokens: int) -> int:
    """Returns how many times a training passes over this many tokens: more often over few.

    >>> [epochs_of(tokens) for tokens in (8_192, 32_768, 640_000)]
    [8, 4, 2]
    """
    return min(MOST_EPOCHS, max(2, SHOWN // tokens))


def needed(trace: Trace, settings: TrainConfig, verdict: Verdict, progress: bool) -> int | None:
    """How many more tokens are likely to put LLaPor ahead (`predictor.verdict.more_tokens`).

    A second training, on a quarter of the tokens, tells how fast it learns.
    """
    quarter = settings.tokens // 4
    folder = settings.out / "quarter"
    fewer = replace(settings, out=folder, tokens=quarter, batch=min(BATCH, quarter // 32))
    short = judge(trace, train(fewer, progress=progress), quarter)
    shutil.rmtree(folder)

    def wrong(of: Verdict, name: str) -> float:
        return 1 - sum(of.recall[name]) / len(of.horizons)

    return more_tokens(
        settings.tokens, wrong(verdict, "llapor"), wrong(short, "llapor"), wrong(verdict, "gate")
    )
