"""How long does a job take on a thousand nodes?

Simulated: the crew, the ledger and the shards are those of a real job (`layerscope_jax.distributed`), the
nodes and the clock are not. Each row of the table changes one thing of the third: the order in which rows are
given out, how well lengths are guessed, slow nodes, nodes that fail, shards that hang, and the storage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import tyro
from rich.console import Console

from benchmarks import harness
from layerscope_jax.distributed.job import RETRIES, TIMEOUT_S
from layerscope_jax.distributed.simulated import Fleet, Outcome, simulate
from layerscope_jax.distributed.simulated_rows import as_they_come, by_length, drawn_tokens, expected
from layerscope_jax.distributed.worker import BEAT_S

HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """A job, and the nodes that it runs on."""

    nodes: int = 1000
    rows_per_node: int = 256
    mean_tokens: int = 2000
    """New tokens of a row."""
    spread: float = 1.0
    """Standard deviation of the logarithms of lengths."""
    most_tokens: int = 8192
    slots: int = 32
    step_ms: float = 60.0
    """Of a step in which all slots get a token."""
    checkpoint_gb: float = 61.0
    """As Qwen3-30B-A3B has in bfloat16."""
    node_gb_per_s: float = 2.0
    storage_gb_per_s: float = 100.0
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is different.
        fleet: the nodes.
        error: of the guessed lengths, as the standard deviation of a logarithm; None for rows as they come.
        timeout_s: as of a job.
    """

    name: str
    fleet: Fleet
    error: float | None
    timeout_s: float = TIMEOUT_S


def fleet_of(options: Options) -> Fleet:
    """Returns nodes that are alike and never fail."""
    return Fleet(
        nodes=options.nodes,
        checkpoint_bytes=round(options.checkpoint_gb * 1e9),
        node_bytes_per_s=options.node_gb_per_s * 1e9,
        storage_bytes_per_s=options.storage_gb_per_s * 1e9,
        slots=options.slots,
        step_s=options.step_ms / 1e3,
        beat_s=BEAT_S,
    )


def cases(plain: Fleet) -> list[Case]:
    """Returns what is compared."""
    hours = replace(plain, mean_life_s=24 * HOUR_S)
    often = replace(plain, mean_life_s=2 * HOUR_S)
    slow = replace(plain, slow_share=0.05, slow_factor=2.0)
    hangs = replace(plain, hang_rate=0.001)
    ten = replace(plain, storage_bytes_per_s=plain.storage_bytes_per_s / 10)
    worst = replace(often, slow_share=0.05, slow_factor=2.0, hang_rate=0.001)
    return [
        Case("one shard a node, as rows come", plain, None),
        Case("by length, known", plain, 0.0),
        Case("by length, guessed", plain, 0.5),
        Case("by length, anybody's guess", plain, 2.0),
        Case("5% of the nodes half as fast", slow, 0.5),
        Case("such nodes, one shard a node", slow, None),
        Case("a node fails every 24 hours", hours, 0.5),
        Case("a node fails every 2 hours", often, 0.5),
        Case("so often, one shard a node", often, None),
        Case("a shard of 1,000 hangs", hangs, 0.5),
        Case("so many, timeout of 120 s", hangs, 0.5, 120.0),
        Case("storage with a tenth of the bandwidth", ten, 0.5),
        Case("slow, failing and hanging nodes", worst, 0.5),
    ]


def outcome_of(case: Case, tokens: Sequence[int], seed: int) -> Outcome:
    """Returns what becomes of a case."""
    if case.error is None:
        shards = as_they_come(len(tokens), case.fleet.nodes)
    else:
        shards = by_length(case.fleet, expected(tokens, case.error, seed))
    return simulate(case.fleet, tokens, shards, timeout_s=case.timeout_s, retries=RETRIES, seed=seed)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        options = replace(options, nodes=8, rows_per_node=64)
    count = options.nodes * options.rows_per_node
    tokens = drawn_tokens(count, options.mean_tokens, options.spread, options.most_tokens, options.seed)
    progress, rows = Console(stderr=True), []
    for case in cases(fleet_of(options)):
        outcome = outcome_of(case, tokens, options.seed)
        fleet = {name: None if value == math.inf else value for name, value in asdict(case.fleet).items()}
        result = {name: value for name, value in asdict(outcome).items() if name != "ideal"}
        rows.append(
            {"case": case.name, "fleet": fleet, "error": case.error, "timeout_s": case.timeout_s}
            | {"efficiency": outcome.efficiency, "ideal": outcome.ideal._asdict()}
            | result
        )
        progress.print(f"simulated: {case.name}")
    harness.print_table(
        f"{options.nodes:,} nodes, {count:,} rows, {sum(tokens):,} tokens; simulated",
        ("", "hours", "of the ideal", "loading, h", "tail, h", "lost workers", "in vain", "read, TB"),
        [
            (
                row["case"],
                f"{row['makespan_s'] / HOUR_S:.2f}",
                f"{row['efficiency']:.0%}",
                f"{row['ideal']['load_s'] / HOUR_S:.2f}",
                f"{(row['makespan_s'] - row['last_give_s']) / HOUR_S:.2f}",
                row["lost"],
                f"{row['lost_tokens'] / sum(tokens):.1%}",
                f"{row['read_bytes'] / 1e12:.1f}",
            )
            for row in rows
        ],
    )
    return harness.finish(
        options,
        {
            "benchmark": "thousand_nodes",
            "quick": options.quick,
            "machine": harness.machine(),
            "rows_of_the_job": count,
            "tokens": sum(tokens),
            "longest": max(tokens),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
