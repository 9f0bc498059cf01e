"""The command `layerscope trace`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction

from layerscope_jax.cli.args import arg
from layerscope_jax.cli.options import (
    Checkpoint,
    DenseFormat,
    DeviceBudget,
    Dtype,
    ExpertFormat,
    HostBudget,
    Json,
    PolicyName,
    Revision,
    files,
    open_model,
)
from layerscope_jax.config import AUTO, OffloadConfig
from layerscope_jax.engine import make_policy
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.exits import say

Text = Annotated[
    UseAppendAction[tuple[tuple[Path, ...], ...]],
    arg(
        metavar="FILE ...",
        help='JSON lines {"id", "text"}, whose domain is the name of the file, or plain texts, each a '
        "document whose domain is the name of its folder.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record which experts a model chooses on real text, and the hidden states they are chosen by.

    `python -m predictor.train` trains a predictor on the trace; `layerscope predictor train` does both.

    Examples:
        layerscope trace path/to/checkpoint --text prose.jsonl code.jsonl --out build/trace
    """

    checkpoint: Checkpoint
    text: Text
    out: Annotated[Path, arg(metavar="FOLDER", help="Folder for the trace; an interrupted one is continued.")]
    heldout_domains: Annotated[
        tuple[str, ...],
        arg(metavar="DOMAIN ...", help="Domains that predictors are only measured on, never trained on."),
    ] = ()
    train_tokens: Annotated[int, arg(help="Most tokens of each domain to train on.")] = 100_000
    heldout_tokens: Annotated[int, arg(help="Most tokens of each domain to measure on.")] = 10_000
    length: Annotated[int, arg(help="Tokens of a passage; no more than the model's context.")] = 256
    prefill_share: Annotated[
        float, arg(help="Share of a passage that is prefilled; the rest is decoded.")
    ] = 0.5
    hidden: Annotated[int, arg(help="Components that hidden states are reduced to; 0 for none.")] = 512
    batch_size: Annotated[int, arg(help="Passages that run at once.")] = 16
    device_budget: DeviceBudget = AUTO
    host_budget: HostBudget = None
    policy: PolicyName = "lru"
    dtype: Dtype = None
    expert_format: ExpertFormat = None
    dense_format: DenseFormat = None
    revision: Revision = None
    seed: Annotated[int, arg(help="Seed of the choice and order of passages.")] = 0
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        from predictor.record import RecordConfig, record

        exits.need_output()
        make_policy(self.policy)
        config = RecordConfig(
            text=files(self.text),
            out=self.out,
            heldout_domains=self.heldout_domains,
            train_tokens=self.train_tokens,
            heldout_tokens=self.heldout_tokens,
            length=self.length,
            prompt=self.prefill_share,
            hidden=self.hidden,
            batch_size=self.batch_size,
            offload=OffloadConfig(
                device_budget=self.device_budget, host_budget=self.host_budget, policy=self.policy
            ),
            seed=self.seed,
        )
        model = open_model(
            self.checkpoint,
            self.dtype,
            self.revision,
            self.expert_format,
            self.dense_format,
            self.host_budget,
        )
        interrupts.promise(f"interrupted; the same command continues {self.out}")
        trace = record(model, config)
        passages = sum(len(chunk.passages) for chunk in trace.chunks)
        if self.json:
            print(json.dumps({"trace": str(trace.folder), "tokens": trace.rows, "passages": passages}))
        else:
            say(f"{trace.folder} holds {trace.rows:,} tokens of {passages:,} passages")
        return 0
