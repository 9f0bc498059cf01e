"""Completes a batch of prompts: text as it comes, rows as they are finished, statistics at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from layerscope_jax.engine import Engine
from layerscope_jax.generation.batch_files import Row
from layerscope_jax.generation.completions import Completions, Token
from layerscope_jax.runtime.statistics import RunStats


def complete(
    engine: Engine,
    rows: Sequence[Row],
    *,
    on_token: Callable[[Token], object] = lambda event: None,
    on_row: Callable[[Row, str, list[int], str, str | None], object] = lambda *completed: None,
    progress: bool = False,
    bound: bool = False,
) -> Completions:
    """Generates for every row.

    Args:
        engine: does it.
        rows: what is to be done.
        on_token: is given each token; its `request` is an index into `rows`.
        on_row: is given each row as soon as it is complete, as (row, text, tokens, finish, error): the last
            is None, or the sentence on what went wrong.
        progress: whether to show a bar on stderr.
        bound: as of `Engine.generate`.
    """
    tokens: list[list[int]] = [[] for _ in rows]
    pieces: list[list[str]] = [[] for _ in rows]

    def receive(event: Token) -> None:
        found = tokens[event.request]
        if event.error is None:
            found.append(event.token_id)
        pieces[event.request].append(event.text)
        on_token(event)
        if event.finish_reason is not None:
            text = "".join(pieces[event.request])
            on_row(rows[event.request], text, found, event.finish_reason, event.error)

    requests = [row.request for row in rows]
    return engine.generate(requests, progress=progress, on_token=receive, bound=bound)


class Live:
    """Prints texts in the order of the rows; that of the first unfinished one as it comes.

    On a terminal each prompt stands before its continuation, dimmed; elsewhere the continuation is all there
    is, with a line end after it.
    """

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows
        self._waiting = ["" for _ in rows]  # text that is not printed yet
        self._finished = [False for _ in rows]
        self._current = 0
        self._begin()

    def __call__(self, event: Token) -> None:
        self._waiting[event.request] += event.text
        self._finished[event.request] = event.finish_reason is not None
        while self._current < len(self._rows):
            print(self._waiting[self._current], end="")
            self._waiting[self._current] = ""
            if not self._finished[self._current]:
                break
            print()
            self._current += 1
            self._begin()
        sys.stdout.flush()

    def _begin(self) -> None:
        if self._current == len(self._rows) or not sys.stdout.isatty():
            return
        prompt = Text(("\n" if self._current else "") + str(self._rows[self._current].request.prompt), "dim")
        Console(highlight=False).print(prompt, end="", soft_wrap=True)


def summary(stats: RunStats, total_expert_bytes: int) -> str:
    """Two lines on what a run did."""
    budget, total = stats.budget_bytes / 1e6, total_expert_bytes / 1e6
    bound = f", {stats.share_of_bound:.0%} of the lower bound" if stats.share_of_bound else ""
    wasted = f" ({stats.bytes_wasted / 1e6:,.1f} in vain)" if stats.bytes_wasted else ""
    return (
        f"{stats.new_tokens:,} tokens for {stats.prompts:,} prompt{'s' * (stats.prompts != 1)} in "
        f"{stats.total_s:.1f} s, compilation included: {stats.tokens_per_s:.1f} tokens/s, first token after "
        f"{stats.ttft_s:.2f} s, then {1e3 * stats.tpot_s:.0f} ms each{bound}\n"
        f"{stats.policy}, {budget:,.1f} of {total:,.1f} MB of experts on the device: {stats.hit_rate:.0%} "
        f"hits, {stats.bytes_moved / 1e6:,.1f} MB moved{wasted}; busy: device {stats.device_share:.0%}, host "
        f"{stats.host_share:.0%}, link {stats.link_share:.0%}"
    )
