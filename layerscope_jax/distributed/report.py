"""What a job did, on the whole and on each worker, and a bar that shows how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from layerscope_jax.distributed.crew import Hired


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """What one worker did.

    Attributes:
        node: where it ran.
        rows: rows that it completed.
        new_tokens: tokens that it generated, those of rows that it did not complete included.
        tokens_per_s: of the time in which it had rows.
        hit_rate: fraction of the experts needed that were resident; None before its first shard ended.
        lost: what became of it; None if it lived until the end.
    """

    node: str
    rows: int
    new_tokens: int
    tokens_per_s: float
    hit_rate: float | None
    lost: str | None

    @classmethod
    def of(cls, worker: Hired) -> WorkerReport:
        """Returns what a worker did."""
        return cls(
            node=worker.place.node.name,
            rows=worker.rows,
            new_tokens=worker.tokens,
            tokens_per_s=worker.tokens / worker.busy_s if worker.busy_s else 0.0,
            hit_rate=worker.hits / worker.experts if worker.experts else None,
            lost=worker.lost,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a job did.

    Attributes:
        out: file of completions, in the order of the prompts.
        rows: rows of the job.
        done_before: rows that were complete already.
        failed: rows that ended with an error, or were refused.
        new_tokens: tokens generated.
        total_s: time (s) from the first worker's start to the last row's line.
        workers: what each worker did, lost ones included.
    """

    out: Path
    rows: int
    done_before: int
    failed: int
    new_tokens: int = 0
    total_s: float = 0.0
    workers: tuple[WorkerReport, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated per second of the whole job, loading included."""
        return self.new_tokens / self.total_s if self.total_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON has it."""
        return {**asdict(self), "out": str(self.out), "tokens_per_s": self.tokens_per_s}

    def summary(self) -> str:
        """Returns a line on the whole, and one on each node."""
        lost = sum(worker.lost is not None for worker in self.workers)
        count = f"{len(self.workers)} worker{'s' * (len(self.workers) != 1)}"
        first = (
            f"{self.new_tokens:,} tokens for {self.rows - self.done_before:,} prompts in {self.total_s:.1f} "
            f"s, loading and compilation included: {self.tokens_per_s:.1f} tokens/s by {count}"
            + (f", {lost} of them lost" if lost else "")
        )
        nodes: dict[str, list[WorkerReport]] = {}
        for worker in self.workers:
            nodes.setdefault(worker.node, []).append(worker)
        told = [
            f"{node}: {sum(worker.rows for worker in own):,} prompts, "
            f"{sum(worker.tokens_per_s for worker in own):.1f} tokens/s while busy"
            + "".join(f", {worker.hit_rate:.0%} hits" for worker in own[:1] if worker.hit_rate is not None)
            for node, own in nodes.items()
        ]
        return "\n".join([first, *told[:MOST_NODES], *["…"] * (len(told) > MOST_NODES)])


MOST_NODES = 20
"""Nodes that a summary names."""


@contextmanager
def progress_bar(total: int, done: int, shown: bool) -> Iterator[Callable[[int, int, int], None]]:
    """Shows a bar over the rows of a job on stderr, if that is a terminal; yields its `advance`.

    Args:
        total: rows of the job.
        done: rows that are complete already.
        shown: whether it is shown.
    """
    console, began, sum_of = Console(stderr=True), time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), TimeRemainingColumn())
    shown = shown and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(f"{done} of {total} prompts", total=total, completed=done)

        def advance(rows: int, tokens: int, workers: int) -> None:
            nonlocal done, sum_of
            done, sum_of = done + rows, sum_of + tokens
            pace = sum_of / max(1e-9, time.monotonic() - began)
            text = f"{done} of {total} prompts, {workers} workers, {pace:.1f} tokens/s"
            progress.update(task, advance=rows, description=text)

        yield advance
