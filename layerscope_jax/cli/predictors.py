"""The command `layerscope predictor`: makes a model's own predictor, step by step or all at once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitSubcommandPrefixes, subcommand

from layerscope_jax.cli.args import arg
from layerscope_jax.cli.commands import told as help_of
from layerscope_jax.cli.options import (
    Checkpoint,
    DenseFormat,
    DeviceBudget,
    Dtype,
    ExpertFormat,
    HostBudget,
    Json,
    Revision,
    files,
    folder_of,
    open_model,
    own_predictor,
)
from layerscope_jax.cli.routing import PackRouting
from layerscope_jax.cli.trace import Record, Text
from layerscope_jax.config import AUTO, OffloadConfig
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.exits import say

if TYPE_CHECKING:
    from predictor.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Train:
    """Make a model's own predictor: record text, train, and measure whether it beats the routers' forecast.

    The folder also records which of the two is better. If the predictor lies in the model's folder, commands
    that run the model with policy 'auto' and no --predictor use the better one.

    Examples:
        layerscope predictor train path/to/checkpoint --text prose.jsonl code.jsonl
        layerscope predictor train path/to/checkpoint --text notes/ --start-from other/predictor
    """

    checkpoint: Checkpoint
    text: Text
    out: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="Folder for the predictor; an interrupted run is continued. By default `predictor` in the "
            "model's folder.",
        ),
    ] = None
    heldout_domains: Annotated[
        tuple[str, ...],
        arg(metavar="DOMAIN ...", help="Domains that the predictor is only measured on, never trained on."),
    ] = ()
    tokens: Annotated[int, arg(help="Most tokens to train on.")] = 65_536
    start_from: Annotated[
        Path | None,
        arg(metavar="FOLDER", help="A predictor to begin with, of this model or another."),
    ] = None
    device_budget: DeviceBudget = AUTO
    host_budget: HostBudget = None
    dtype: Dtype = None
    expert_format: ExpertFormat = None
    dense_format: DenseFormat = None
    revision: Revision = None
    seed: Annotated[int, arg(help="Seed of the choice of passages and of the training.")] = 0
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        from predictor.recipe import Recipe, make

        exits.need_output()
        folder = folder_of(self.checkpoint, self.revision)
        out = own_predictor(folder) if self.out is None else self.out
        recipe = Recipe(
            text=files(self.text),
            out=out,
            heldout_domains=self.heldout_domains,
            tokens=self.tokens,
            start_from=self.start_from,
            offload=OffloadConfig(
                device_budget=self.device_budget, host_budget=self.host_budget, policy="lru"
            ),
            seed=self.seed,
        )
        model = open_model(
            str(folder), self.dtype, None, self.expert_format, self.dense_format, self.host_budget
        )
        interrupts.promise(f"interrupted; the same command continues {out}")
        verdict = make(model, recipe)
        if self.json:
            print(json.dumps({"predictor": str(out), **asdict(verdict)}))
        else:
            for line in told(verdict, out, used=out == own_predictor(folder)):
                say(line)
        return 0


def told(verdict: Verdict, out: Path, used: bool) -> list[str]:
    """Sentences on a verdict: what was measured, what will be used, and what would help.

    Args:
        verdict: of the predictor.
        out: its folder.
        used: whether commands find it by themselves.
    """
    lines = [
        f"{name}: recall {', '.join(f'{100 * value:.1f}' for value in recall)} % "
        f"{', '.join(map(str, verdict.horizons))} layers ahead"
        for name, recall in verdict.recall.items()
    ]
    difference = f"{100 * verdict.lead:+.1f} points (less than {2 * 100 * verdict.error:.1f} may be chance)"
    lines.append(
        f"trained on {verdict.trained_tokens:,} tokens, measured on {verdict.heldout_tokens:,} held-out: "
        f"llapor leads gate by {difference}"
    )
    if verdict.forecast == "llapor":
        way = "policy 'auto' uses it" if used else f"use it with --predictor {out}"
        return [*lines, f"{out} holds the predictor; {way}"]
    if verdict.more_tokens:
        more = f"about {verdict.more_tokens:,} tokens more to train on would put it ahead"
    else:
        more = "more text is not seen to help"
    return [*lines, f"it does not beat the routers' forecast, 'gate', which 'auto' keeps to; {more}"]


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """Score predictors and everything they are compared with on a trace's held-out passages.

    Examples:
        layerscope predictor scorecard --traces build/trace --predictor build/predictor
        layerscope predictor scorecard --traces build/trace --predictor seeds/0 seeds/1 --out card.json
    """

    traces: Annotated[Path, arg(metavar="FOLDER", help="Trace; its held-out passages are scored.")]
    predictor: Annotated[
        tuple[Path, ...],
        arg(metavar="FOLDER ...", help="Predictors; several, trained from other seeds, give the spread."),
    ]
    out: Annotated[Path | None, arg(metavar="FILE", help="Also write all figures there.")] = None
    plots: Annotated[Path | None, arg(metavar="FOLDER", help="Also draw them there.")] = None
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        from predictor.scorecard import ScoreConfig, score_and_show

        exits.need_output()
        score_and_show(
            ScoreConfig(
                traces=self.traces,
                predictor=self.predictor,
                out=self.out,
                json=self.json,
                plots=self.plots,
            )
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Trace(Record):
    """Record a model's choices of experts on real text, which predictors are trained on.

    Examples:
        layerscope predictor trace path/to/checkpoint --text prose.jsonl code.jsonl --out build/trace
    """


@dataclass(frozen=True, kw_only=True)
class Predictors:
    """Make and score predictors of the experts of coming layers (predictor/README.md)."""

    command: OmitSubcommandPrefixes[
        Annotated[Train, subcommand("train", description=help_of(Train))]
        | Annotated[Trace, subcommand("trace", description=help_of(Trace))]
        | Annotated[PackRouting, subcommand("routing", description=help_of(PackRouting))]
        | Annotated[Scorecard, subcommand("scorecard", description=help_of(Scorecard))]
    ]

    def run(self) -> int:
        """Returns the exit code."""
        return self.command.run()
