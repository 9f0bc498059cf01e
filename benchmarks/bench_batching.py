"""What does continuous batching gain?

A trained model continues real prompts by as many tokens each as an exponential distribution says: most are
short, some are long. "Continuous" is one call of `generate`. "Batch by batch" calls it for as many requests
as there are slots, and for the next ones when all have ended. "Even" is the ideal, and is measured too: the
same prompts and as many tokens in all, but as many for each, so that nobody waits for anybody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.bench_policies import SHIPPED, read_prompts
from layerscope_jax import Engine, Model, OffloadConfig, Request, load

RESIDENT = "resident"
CONTINUOUS, PARTED, EVEN = "continuous", "batch by batch", "even"


@dataclass(frozen=True, kw_only=True)
class Setting(harness.Common):
    """A checkpoint, and how it is run."""

    checkpoint: Path = SHIPPED
    prompts: Path | None = None
    """JSON lines with a "prompt" each, taken in turns; the checkpoint's prompts.jsonl if left out."""
    policies: tuple[str, ...] = (RESIDENT, "host-only", "auto")
    budget: int = 25
    """Percent of the bytes of all experts, for policies other than resident."""
    link: str = "100MB"
    """Bytes a second."""


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure."""

    slots: tuple[int, ...] = (4, 16)
    requests: int = 48
    mean_tokens: int = 16
    most_tokens: int = 96
    rounds: int = 3
    seed: int = 0


def lengths(options: Options) -> list[int]:
    """New tokens of each request."""
    drawn = np.random.default_rng(options.seed).exponential(options.mean_tokens, options.requests)
    return np.clip(np.ceil(drawn), 1, options.most_tokens).astype(int).tolist()


def evenly(total: int, requests: int) -> list[int]:
    """`total` in parts that differ by one at most, the larger ones first.

    >>> evenly(7, 3)
    [3, 2, 2]
    """
    return [total // requests + (index < total % requests) for index in range(requests)]


class Steps:
    """Stands before an engine's runner and counts its steps."""

    def __init__(self, engine: Engine):
        self.prefill = self.decode = 0
        self._step = engine.runner.step
        engine.runner.step = self.step  # type: ignore[method-assign]

    def step(self, tokens: np.ndarray, *rest: Any) -> Any:
        if tokens.shape[1] == 1:
            self.decode += 1
        else:
            self.prefill += 1
        return self._step(tokens, *rest)


def race(
    engine: Engine, prompts: Sequence[Sequence[int]], counts: Sequence[int], slots: int, rounds: int
) -> dict[str, Any]:
    """One engine with so many slots."""
    steps = Steps(engine)
    tokens: dict[str, list[list[int]]] = {}
    taken: dict[str, dict[str, int]] = {}

    def run(name: str, counts: Sequence[int], together: int) -> Callable[[], None]:
        requests = [
            Request(prompt=prompt, max_new_tokens=count, stop_token_ids=())
            for prompt, count in zip(prompts, counts, strict=True)
        ]

        def call() -> None:
            steps.prefill = steps.decode = 0
            tokens[name] = []
            for start in range(0, len(requests), together):
                part = requests[start : start + together]
                tokens[name] += engine.generate(part).token_ids
            taken[name] = {"prefill": steps.prefill, "decode": steps.decode}

        return call

    samples = harness.measure(
        {
            CONTINUOUS: run(CONTINUOUS, counts, len(prompts)),
            PARTED: run(PARTED, counts, slots),
            EVEN: run(EVEN, evenly(sum(counts), len(counts)), len(prompts)),
        },
        rounds,
    )
    seconds = {name: found.parts["seconds"] for name, found in samples.items()}
    same = [here == there for here, there in zip(tokens[CONTINUOUS], tokens[PARTED], strict=True)]
    return {
        "slots": slots,
        "tokens_per_s": {
            name: harness.spread(sum(counts) / one for one in found) for name, found in seconds.items()
        },
        "steps": taken,
        "continuous_to_batch_by_batch": harness.ratio(seconds[PARTED], seconds[CONTINUOUS]),
        "continuous_to_even": harness.ratio(seconds[EVEN], seconds[CONTINUOUS]),
        "same_tokens": float(np.mean(same)),
        "compiled_while_timed": sum(found.compiled for found in samples.values()),
    }


def config_of(policy: str, model: Model, options: Setting, slots: int) -> OffloadConfig:
    if policy == RESIDENT:
        return OffloadConfig(numerics="fast", max_num_seqs=slots)
    return OffloadConfig(
        device_budget=model.bank.total_bytes * options.budget // 100,
        policy=policy,
        emulated_link_bandwidth=options.link,
        max_num_seqs=slots,
    )


def table(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        rates, steps = row["tokens_per_s"], row["steps"]
        names = (CONTINUOUS, PARTED, EVEN)
        lines.append(
            (
                row["policy"],
                row["slots"],
                *(f"{rates[name]['median']:.0f}" for name in names),
                *(f"{steps[name]['prefill']} + {steps[name]['decode']}" for name in names),
                f"{row['continuous_to_batch_by_batch']['median']:.2f}",
                f"{row['continuous_to_even']['median']:.2f}",
                f"{row['same_tokens']:.0%}",
            )
        )
    headings = ("policy", "slots", CONTINUOUS, PARTED, EVEN, "steps", "steps", "steps")
    more = ("to batch by batch", "to even", "same texts")
    harness.print_table("Tokens/s, and steps (prefill + decode), medians", (*headings, *more), lines)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {"slots": (2,), "requests": 6, "mean_tokens": 3, "most_tokens": 8, "rounds": 1}
        options = Options(**(vars(options) | changes))
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    try:
        model = load(options.checkpoint)
        file = options.prompts or options.checkpoint / "prompts.jsonl"
        known = read_prompts(file, model, options.most_tokens)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    counts = lengths(options)
    prompts = [known[index % len(known)] for index in range(len(counts))]
    record, progress, rows = harness.machine(), Console(stderr=True), []
    for policy in options.policies:
        for slots in options.slots:
            with Engine(model, config_of(policy, model, options, slots)) as engine:
                rows.append({"policy": policy} | race(engine, prompts, counts, slots, options.rounds))
            progress.print(f"measured {policy} with {slots} slots")
    table(rows)
    return harness.finish(
        options,
        {
            "benchmark": "batching",
            "quick": options.quick,
            "machine": record,
            "budget_percent": options.budget,
            "link": options.link,
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "new_tokens": counts,
            "rounds": options.rounds,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
