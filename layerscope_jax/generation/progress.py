"""Progress of long work: a bar with tokens/s, hit rate, busy shares of link and disk, and the time left."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from layerscope_jax.generation.calls import Call
from layerscope_jax.generation.completions import Token
from layerscope_jax.generation.requests import Request
from layerscope_jax.offload.link import LinkStats
from layerscope_jax.offload.pool import DiskStats
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.sampling import NO_TOKEN
from layerscope_jax.runtime.statistics import Meter


class SoFar(NamedTuple):
    """What has been counted for some work until now.

    Attributes:
        experts, hits: active experts, and those of them that were resident.
        link_s, disk_s: time (s) in which the link and the disk were busy.
        reads: experts that were needed in host memory, if it is a cache of the disk; 0 without one.
    """

    experts: int = 0
    hits: int = 0
    link_s: float = 0.0
    disk_s: float = 0.0
    reads: int = 0

    def plus(self, other: SoFar) -> SoFar:
        """Returns the sums of both."""
        return SoFar(*map(operator.add, self, other))


def counted(meter: Meter, link: LinkStats, disk: DiskStats) -> SoFar:
    """Returns what some counts hold."""
    return SoFar(meter.experts, meter.expert_hits, link.busy_s, disk.busy_s, disk.hits + disk.misses)


def counted_by(account: Account) -> SoFar:
    """Returns what an account has counted; does not wait for the steps of its run."""
    return counted(account.meter, account.link, account.disk)


def so_far(call: Call, account: Account) -> SoFar:
    """Returns what has been counted for a running call until now; does not wait for its steps.

    Args:
        call: the call.
        account: counts of the run that it is part of.
    """
    joined = call.joined
    if joined is None:
        return SoFar()
    now, before = counted_by(account), counted(*(joined.counts[part] for part in ("meter", "link", "disk")))
    return SoFar(
        now.experts - before.experts,
        now.hits - before.hits,
        max(0.0, now.link_s - before.link_s),
        max(0.0, now.disk_s - before.disk_s),
        now.reads - before.reads,
    )


class Status(ProgressColumn):
    """Shows how some work is doing; computed when the bar is refreshed, so that tokens cost nothing.

    Args:
        so_far: returns what has been counted for it.

    Attributes:
        tokens: its tokens so far.
    """

    def __init__(self, so_far: Callable[[], SoFar]):
        super().__init__(Column(no_wrap=True))  # rather cut off than on two lines
        self._so_far, self._began = so_far, time.perf_counter()
        self.tokens = 0

    def render(self, task: Task) -> Text:
        return Text(status(self.tokens, time.perf_counter() - self._began, self._so_far()))


def status(tokens: int, elapsed_s: float, found: SoFar) -> str:
    """Returns a line on work that goes on, short enough for a terminal of 80 columns.

    Args:
        tokens: its tokens so far.
        elapsed_s: time (s) since it began.
        found: what has been counted for it.

    >>> status(30, 2.0, SoFar(experts=1000, hits=914, link_s=0.5))
    '15.0 tokens/s, 91% hits, link 25%'
    >>> status(480, 2.0, SoFar(experts=1000, hits=914, link_s=0.5, disk_s=1.5, reads=86))
    '240 tokens/s, 91% hits, link 25%, disk 75%'
    >>> status(0, 0.5, SoFar())
    ''
    """
    parts = []
    if tokens:
        pace = tokens / elapsed_s
        parts.append(f"{pace:.1f} tokens/s" if pace < 100 else f"{pace:,.0f} tokens/s")
    if found.experts:
        parts.append(f"{found.hits / found.experts:.0%} hits")
        parts.append(f"link {min(1.0, found.link_s / elapsed_s):.0%}")
    if found.reads:
        parts.append(f"disk {min(1.0, found.disk_s / elapsed_s):.0%}")
    return ", ".join(parts)


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, share: int, tokens: int, label: str | None = None) -> None:
        """Moves it by `share` of its total, and counts tokens; None keeps what stands before it."""


@contextmanager
def bar(label: str, total: int, so_far: Callable[[], SoFar], shown: bool = True) -> Iterator[Advance]:
    """Shows a bar on stderr, if that is a terminal.

    Args:
        label: what stands before it.
        total: what it is over.
        so_far: returns what has been counted for the work; called by another thread.
        shown: whether it is shown on a terminal.
    """
    line, console = Status(so_far), Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=4),
        TextColumn("{task.percentage:.0f}%"),
        line,
        TimeRemainingColumn(),
    )
    shown = shown and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(label, total=total)

        def advance(share: int, tokens: int, label: str | None = None) -> None:
            line.tokens += tokens
            told: dict[str, Any] = {} if label is None else {"description": label}
            progress.update(task, advance=share, **told)

        yield advance


@contextmanager
def progress_bar(
    requests: Sequence[Request], so_far: Callable[[], SoFar]
) -> Iterator[Callable[[Token], None]]:
    """Shows a bar over the tokens of `requests` on stderr, if that is a terminal; yields its `advance`.

    Args:
        requests: the requests of a call.
        so_far: returns what has been counted for the call; called by another thread.
    """
    left = {
        (index, sample): request.max_new_tokens
        for index, request in enumerate(requests)
        for sample in range(request.n)
    }
    finished = 0
    with bar(f"0 of {len(left)} done", sum(left.values()), so_far) as move:

        def advance(event: Token) -> None:
            nonlocal finished
            own, tokens = (event.request, event.index), int(event.token_id != NO_TOKEN)
            left[own] -= 1
            if event.finish_reason is None:
                move(1, tokens)
            else:  # it may have come sooner than it had to
                finished += 1
                move(1 + left[own], tokens, f"{finished} of {len(left)} done")

        yield advance
