"""Progress of a long generation: a bar with tokens/s, hit rate, busy share of the link and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from layerscope_jax.generation.calls import Call
from layerscope_jax.generation.completions import Token
from layerscope_jax.generation.requests import Request
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.sampling import NO_TOKEN


class SoFar(NamedTuple):
    """What has been counted for a call until now.

    Attributes:
        hit_rate: fraction of active experts that were resident; None before any was counted.
        link_s: time (s) in which the link was busy.
    """

    hit_rate: float | None
    link_s: float


def so_far(call: Call, account: Account) -> SoFar:
    """Returns what has been counted for a running call until now; does not wait for its steps.

    Args:
        call: the call.
        account: counts of the run that it is part of.
    """
    joined = call.joined
    if joined is None:
        return SoFar(None, 0.0)
    meter, before = account.meter, joined.counts["meter"]
    experts = meter.experts - before.experts
    return SoFar(
        (meter.expert_hits - before.expert_hits) / experts if experts > 0 else None,
        max(0.0, account.link.busy_s - joined.counts["link"].busy_s),
    )


class Status(ProgressColumn):
    """Shows how a call is doing; computed when the bar is refreshed, so that tokens cost nothing.

    Args:
        so_far: returns what has been counted for the call.

    Attributes:
        tokens: new tokens so far.
    """

    def __init__(self, so_far: Callable[[], SoFar]):
        super().__init__()
        self._so_far, self._began = so_far, time.perf_counter()
        self.tokens = 0

    def render(self, task: Task) -> Text:
        return Text(status(self.tokens, time.perf_counter() - self._began, self._so_far()))


def status(tokens: int, elapsed_s: float, counted: SoFar) -> str:
    """Returns a line on a call that is running, short enough for a terminal of 80 columns.

    Args:
        tokens: new tokens so far.
        elapsed_s: time (s) since the call began.
        counted: what has been counted for it.

    >>> status(30, 2.0, SoFar(hit_rate=0.914, link_s=0.5))
    '15.0 tokens/s, 91% hits, link 25%'
    >>> status(0, 0.5, SoFar(hit_rate=None, link_s=0.0))
    ''
    """
    parts = []
    if tokens:
        parts.append(f"{tokens / elapsed_s:.1f} tokens/s")
    if counted.hit_rate is not None:
        parts.append(f"{counted.hit_rate:.0%} hits")
        parts.append(f"link {min(1.0, counted.link_s / elapsed_s):.0%}")
    return ", ".join(parts)


@contextmanager
def progress_bar(
    requests: Sequence[Request], so_far: Callable[[], SoFar]
) -> Iterator[Callable[[Token], None]]:
    """Shows a bar over the tokens of `requests` on stderr, if that is a terminal; yields its `advance`.

    Args:
        requests: the requests of a call.
        so_far: returns what has been counted for the call; called by another thread.
    """
    line = Status(so_far)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:.0f}%"),
        line,
        TimeRemainingColumn(),
    )
    left = {
        (index, sample): request.max_new_tokens
        for index, request in enumerate(requests)
        for sample in range(request.n)
    }
    finished = 0
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"0 of {len(left)} completions", total=sum(left.values()))

        def advance(event: Token) -> None:
            nonlocal finished
            own = (event.request, event.index)
            left[own] -= 1
            line.tokens += event.token_id != NO_TOKEN
            if event.finish_reason is None:
                progress.advance(task)
            else:  # it may have come sooner than it had to
                finished += 1
                progress.update(
                    task,
                    advance=1 + left[own],
                    description=f"{finished} of {len(left)} completions",
                )

        yield advance
