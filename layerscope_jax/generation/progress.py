"""Progress bar of a long generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from layerscope_jax.generation.completions import Token
from layerscope_jax.generation.requests import Request


@contextmanager
def progress_bar(requests: Sequence[Request]) -> Iterator[Callable[[Token], None]]:
    """Shows a bar over the tokens of `requests` on stderr, if that is a terminal; yields its `advance`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
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
