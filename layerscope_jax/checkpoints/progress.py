"""The progress bar of loading and converting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

PROGRESS_FROM = 1_000_000_000
"""Bytes from which on loading shows a progress bar."""


@contextmanager
def loading(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar while many bytes are read; what it gives counts those that are done."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=total < PROGRESS_FROM) as progress:
        task = progress.add_task("loading", total=total)
        yield lambda size: progress.advance(task, size)
