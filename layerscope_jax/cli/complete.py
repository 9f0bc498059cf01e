"""Completes a batch of prompts: text as it comes, rows as they are finished, statistics at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from rich.text import Text

from layerscope_jax.engine import Engine
from layerscope_jax.generation.completions import Completions, Gathering, Output, Token
from layerscope_jax.generation.prompt_files import Row
from layerscope_jax.generation.requests import Request, with_seed
from layerscope_jax.runtime.statistics import RunStats


def complete(
    engine: Engine,
    rows: Sequence[Row],
    requests: Sequence[Request] | None = None,
    *,
    on_token: Callable[[Token], object] = lambda event: None,
    on_row: Callable[[Row, list[Output]], object] = lambda row, outputs: None,
    progress: bool = False,
    bound: bool = False,
    timeline: Path | None = None,
) -> Completions:
    """Generates for every row.

    Args:
        engine: does it.
        rows: what is to be done.
        requests: the requests of the rows, with token ids for prompts; None for the rows' own.
        on_token: is given each token; its `request` is an index into `rows`.
        on_row: is given each row with all its samples as soon as they are complete.
        progress: whether to show a bar on stderr.
        bound, timeline: as of `Engine.generate`.
    """
    requests = [with_seed(request) for request in requests or [row.request for row in rows]]
    gathering = Gathering(requests)

    def receive(event: Token) -> None:
        outputs = gathering.add(event)
        on_token(event)
        if outputs is not None:
            on_row(rows[event.request], outputs)

    return engine.generate(requests, progress=progress, on_token=receive, bound=bound, timeline=timeline)


class Live:
    """Prints texts in the order of the rows; that of the first unfinished one as it comes.

    On a terminal each prompt stands before its continuation, dimmed; elsewhere the continuation is all there
    is, with a line end after it.
    """

    def __init__(self, rows: Sequence[Row]):
        self._texts = [row for row in rows for _ in range(row.request.n)]
        self._first = [0, *accumulate(row.request.n for row in rows)]  # row -> its first text
        self._waiting = ["" for _ in self._texts]  # text that is not printed yet
        self._finished = [False for _ in self._texts]
        self._current = 0
        self._begin()

    def __call__(self, event: Token) -> None:
        number = self._first[event.request] + event.index
        self._waiting[number] += event.text
        self._finished[number] = event.finish_reason is not None
        while self._current < len(self._texts):
            print(self._waiting[self._current], end="")
            self._waiting[self._current] = ""
            if not self._finished[self._current]:
                break
            print()
            self._current += 1
            self._begin()
        sys.stdout.flush()

    def _begin(self) -> None:
        if self._current == len(self._texts) or not sys.stdout.isatty():
            return
        request = self._texts[self._current].request
        before = request.prompt if request.messages is None else f"{request.messages[-1].get('content')}\n"
        prompt = Text(("\n" if self._current else "") + str(before), "dim")
        Console(highlight=False).print(prompt, end="", soft_wrap=True)


def summary(stats: RunStats, total_expert_bytes: int) -> str:
    """Two lines on what a run did, and one on the disk if experts were read from it."""
    budget, total = stats.budget_bytes / 1e6, total_expert_bytes / 1e6
    bound = f", {stats.share_of_bound:.0%} of the lower bound" if stats.share_of_bound else ""
    disk = ""
    if stats.host_hit_rate is not None:
        disk = (
            f"\nexperts from the disk: {stats.host_hit_rate:.0%} of those needed were in host memory, "
            f"{stats.bytes_read / 1e6:,.1f} MB read, {stats.bytes_read_ahead / 1e6:,.1f} of it ahead "
            f"({stats.bytes_read_wasted / 1e6:,.1f} in vain); {stats.disk_wait_s:.1f} s waited, disk busy "
            f"{stats.disk_share:.0%}"
        )
    wasted = f" ({stats.bytes_wasted / 1e6:,.1f} in vain)" if stats.bytes_wasted else ""
    return (
        f"{stats.new_tokens:,} tokens for {stats.prompts:,} prompt{'s' * (stats.prompts != 1)} in "
        f"{stats.total_s:.1f} s, compilation included: {stats.tokens_per_s:.1f} tokens/s, first token after "
        f"{stats.ttft_s:.2f} s, then {1e3 * stats.tpot_s:.0f} ms each{bound}\n"
        f"{stats.policy}, {budget:,.1f} of {total:,.1f} MB of experts on the device: {stats.hit_rate:.0%} "
        f"hits, {stats.bytes_moved / 1e6:,.1f} MB moved{wasted}; busy: device {stats.device_share:.0%}, host "
        f"{stats.host_share:.0%}, link {stats.link_share:.0%}{disk}"
    )
