"""Which policy is fastest at which budget and link?

A trained model continues real prompts under every policy, in each cell of budgets (a part of all experts'
bytes) and links (copies paced to a rate; they are real copies). Within a cell the policies run in turns, once
each has run until nothing is compiled any more. Beside them runs the same engine with every expert resident,
whose tokens all the others must give.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

import layerscope_jax
from benchmarks import harness
from layerscope_jax import POLICIES, Engine, Model, OffloadConfig, load
from layerscope_jax.scheduling.registry import FORECASTING

SHIPPED = Path(layerscope_jax.__file__).parent / "shipped"
RESIDENT = "resident"


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    checkpoint: Path = SHIPPED
    prompts: Path | None = None
    """JSON lines with a "prompt" each; prompts.jsonl in the checkpoint's folder if left out."""
    policies: tuple[str, ...] = tuple(name for name in POLICIES if name != RESIDENT)
    budgets: tuple[int, ...] = (10, 25, 50)
    """Percent of the bytes of all experts."""
    links: tuple[str, ...] = ("20MB", "100MB", "500MB")
    """Bytes a second."""
    batch: int = 8
    new_tokens: int = 32
    warm: int = 6
    """Runs of each before the first round: "auto" tries its ways in them."""
    rounds: int = 5


def read_prompts(path: Path, model: Model, new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, cut where the model's context would not hold them and what follows.

    Raises:
        ValueError: if the file is missing or not what it should be.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.path}: expected a tokenizer.json to read real prompts with, found none")
    try:
        texts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected lines of JSON with a prompt, got {error!r}") from None
    room = model.config.max_position_embeddings - new_tokens
    return [model.tokenizer.encode(text).ids[:room] for text in texts]


def cell(
    model: Model,
    prompts: list[list[int]],
    options: Options,
    percent: int,
    link: str,
    resident: Engine,
) -> list[dict[str, Any]]:
    """All policies at one budget and link."""
    budget = model.bank.total_bytes * percent // 100
    tokens: dict[str, list[list[int]]] = {}
    refused: dict[str, str] = {}

    def run(name: str, engine: Engine) -> Callable[[], harness.Parts]:
        def call() -> harness.Parts:
            parts, tokens[name] = harness.run_engine(engine, prompts, options.new_tokens)
            return parts

        return call

    with contextlib.ExitStack() as stack:
        engines = {RESIDENT: resident}
        for policy in options.policies:
            config = OffloadConfig(
                device_budget=budget,
                policy=policy,
                emulated_link_bandwidth=link,
                numerics="auto",
                predictor="gate" if policy in FORECASTING else None,
                max_num_seqs=options.batch,
            )
            try:
                engines[policy] = stack.enter_context(Engine(model, config))
            except ValueError as error:
                refused[policy] = str(error)
        samples = harness.measure(
            {name: run(name, engine) for name, engine in engines.items()}, options.rounds, options.warm
        )
        # One more run for what the engine itself counts. Its caches are as warm as in the rounds.
        stats = {
            name: engine.generate(
                prompts, max_new_tokens=options.new_tokens, stop_token_ids=()
            ).stats.to_json()
            for name, engine in engines.items()
        }

    totals = {name: found.parts["total"] for name, found in samples.items()}
    raced = [name for name in totals if name != RESIDENT]
    best = min(raced, key=lambda name: float(np.median(totals[name])), default=RESIDENT)
    count = len(prompts) * options.new_tokens
    rows: list[dict[str, Any]] = [
        {"budget_percent": percent, "link": link, "policy": name, "refused": why}
        for name, why in refused.items()
    ]
    for name, found in samples.items():
        rows.append(
            {
                "budget_percent": percent,
                "budget_bytes": stats[name]["budget_bytes"],
                "link": link,
                "policy": name,
                "tokens_per_s": harness.spread(count / seconds for seconds in totals[name]),
                "ttft_ms": harness.spread(1e3 * s for s in found.parts["first"]),
                "tpot_ms": harness.spread(1e3 * s for s in found.parts["step"]),
                "time_to_best": harness.ratio(totals[name], totals[best]),
                "time_to_resident": harness.ratio(totals[name], totals[RESIDENT]),
                "same_tokens_as_resident": tokens[name] == tokens[RESIDENT],
                "link_bytes_per_busy_s": rate(stats[name]),
                "stats": stats[name],
                "warm_ups": found.warm_ups,
                "compiled_while_timed": found.compiled,
            }
        )
    return rows


def rate(stats: dict[str, Any]) -> float | None:
    """Bytes a second while the link was busy; where that is below the pace, the machine is the limit."""
    busy = stats["link_share"] * stats["total_s"]
    return stats["bytes_moved"] / busy if busy else None


def table(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        if row["policy"] == RESIDENT:
            continue
        start = (f"{row['budget_percent']}%", f"{row['link']}/s", row["policy"])
        if "refused" in row:
            lines.append((*start, "budget too small", *[""] * 9))
            continue
        stats = row["stats"]
        shares = (stats["device_share"], stats["host_share"], stats["link_share"])
        lines.append(
            (
                *start,
                f"{row['tokens_per_s']['median']:.0f}",
                f"{row['ttft_ms']['median']:.0f}",
                f"{row['tpot_ms']['median']:.1f} ({row['tpot_ms']['p90']:.1f})",
                f"{stats['hit_rate']:.2f}",
                f"{stats['bytes_moved'] / 1e6:.1f}",
                f"{row['link_bytes_per_busy_s'] / 1e6:.1f}" if row["link_bytes_per_busy_s"] else "-",
                " / ".join(f"{share:.2f}" for share in shares),
                f"{row['time_to_best']['median']:.2f}",
                f"{row['time_to_resident']['median']:.2f}",
                "yes" if row["same_tokens_as_resident"] else "NO",
            )
        )
    headings = ("budget", "link", "policy", "tokens/s", "TTFT ms", "TPOT ms (p90)", "hits", "MB moved")
    more = ("link MB/s", "busy: device / host / link", "to best", "to resident", "same tokens")
    harness.print_table("Policies, medians", (*headings, *more), lines)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {
            "budgets": options.budgets[-1:],
            "links": options.links[-1:],
            "new_tokens": 4,
            "warm": 1,
            "rounds": 1,
        }
        options = Options(**(vars(options) | changes))
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    try:
        model = load(options.checkpoint)
        prompts = read_prompts(
            options.prompts or options.checkpoint / "prompts.jsonl", model, options.new_tokens
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    record = harness.machine()
    progress = Console(stderr=True)
    rows = []
    with Engine(model, OffloadConfig(numerics="auto", max_num_seqs=options.batch)) as resident:
        for percent in options.budgets:
            for link in options.links:
                rows += cell(model, prompts, options, percent, link, resident)
                progress.print(f"measured {percent}% at {link}/s")
    result = {
        "benchmark": "policies",
        "quick": options.quick,
        "machine": record,
        "model": {
            "layers": model.config.num_layers,
            "experts": model.config.num_experts,
            "experts_per_token": model.config.experts_per_token,
            "expert_bytes": model.bank.expert_bytes,
            "all_experts_bytes": model.bank.total_bytes,
            "dtype": str(model.bank.dtype),
        },
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "batch": options.batch,
        "new_tokens": options.new_tokens,
        "warm": options.warm,
        "rounds": options.rounds,
        "rows": rows,
    }
    table(rows)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
