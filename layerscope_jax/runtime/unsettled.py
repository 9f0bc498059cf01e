"""Runners that ended while programs of an interrupted step might run, and with them what these read."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol


class Unsettled(Protocol):
    def finish_programs(self) -> None:
        """Waits for programs that read memory of its own."""


_kept: list[Unsettled] = []


def keep(runner: Unsettled) -> None:
    """Keeps a runner, which cannot wait now: the garbage collector may have ended it, within JAX."""
    _kept.append(runner)


def let_go() -> None:
    """Waits for the programs of runners that are kept, and lets go of them."""
    for runner in tuple(_kept):
        runner.finish_programs()
        with suppress(ValueError):  # another thread has let go of it
            _kept.remove(runner)
