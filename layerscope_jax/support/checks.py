"""Checks of what came from outside: everything that is wrong is collected and raised once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class Problems:
    """What is wrong with some input, in sentences.

    Attributes:
        found: the sentences, in the order in which they were noted.

    >>> problems = Problems()
    >>> problems.expect(False, "budget", "a size", -1)
    >>> problems.check(int, "three")
    >>> problems.raise_any()
    Traceback (most recent call last):
    ValueError: budget must be a size, got -1; invalid literal for int() with base 10: 'three'
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, *sentences: str) -> None:
        """Notes sentences as they are."""
        self.found += sentences

    def expect(self, fits: bool, name: str, expected: str, got: Any) -> None:
        """Notes that `name` must be `expected`, unless it `fits`."""
        if not fits:
            self.found.append(f"{name} must be {expected}, got {repr(got)[:60]}")

    def at_least(self, record: Any, **least: float) -> None:
        """Notes which attributes of `record` are less than they may be.

        >>> problems = Problems()
        >>> problems.at_least(slice(0, 5), start=1, stop=1)
        >>> problems.found
        ['start must be 1 or more, got 0']
        """
        for name, low in least.items():
            value = getattr(record, name)
            self.expect(value >= low, name, f"{low} or more", value)  # NaN is not, either

    def check(self, call: Callable[..., Any], *arguments: Any, of: str = "") -> Any:
        """Calls what raises ValueError for a wrong value, and notes what it says, with `of` before it.

        Returns:
            What the call gave; None if it raised.
        """
        try:
            return call(*arguments)
        except ValueError as error:
            self.found.append(f"{of}: {error}" if of else str(error))
            return None

    def same_names(self, given: Iterable[str], expected: Iterable[str]) -> None:
        """Notes which names are missing and which are not expected.

        >>> problems = Problems()
        >>> problems.same_names({"mean", "scale"}, {"mean", "variance"})
        >>> problems.found
        ['variance is missing', 'scale is not expected']
        """
        given, expected = set(given), set(expected)
        self.found += [f"{name} is missing" for name in sorted(expected - given)]
        self.found += [f"{name} is not expected" for name in sorted(given - expected)]

    def raise_any(self, where: str = "", remedy: str = "") -> None:
        """Raises one ValueError with everything that was noted, if anything was.

        Args:
            where: put before it, such as the name of a file.
            remedy: what to do about it, put behind it.
        """
        if self.found:
            said = "; ".join([*self.found, remedy] if remedy else self.found)
            raise ValueError(f"{where}: {said}" if where else said)
