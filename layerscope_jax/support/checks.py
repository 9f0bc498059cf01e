"""Checks of what came from outside: everything that is wrong is collected and raised once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Problems:
    """What is wrong with some input, in sentences.

    >>> problems = Problems()
    >>> problems.expect(False, "budget", "a size", -1)
    >>> problems.check(int, "three")
    >>> problems.raise_any()
    Traceback (most recent call last):
    ValueError: budget must be a size, got -1; invalid literal for int() with base 10: 'three'
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def expect(self, fits: bool, name: str, expected: str, got: Any) -> None:
        """Notes that `name` must be `expected`, unless it `fits`."""
        if not fits:
            self.found.append(f"{name} must be {expected}, got {repr(got)[:60]}")

    def check(self, call: Callable[..., object], *arguments: Any) -> None:
        """Calls what raises ValueError for a wrong value, and notes what it says."""
        try:
            call(*arguments)
        except ValueError as error:
            self.found.append(str(error))

    def raise_any(self) -> None:
        """Raises one ValueError with everything that was noted, if anything was."""
        if self.found:
            raise ValueError("; ".join(self.found))
