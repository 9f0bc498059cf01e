"""Checks of input: collects everything that is wrong and raises it as one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class Problems:
    """Collects what is wrong with some input, as sentences for one error.

    Attributes:
        found: the sentences, in the order in which they were added.

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
        """Adds sentences."""
        self.found += sentences

    def expect(self, fits: bool, name: str, expected: str, got: Any) -> None:
        """Adds that `name` must be `expected` but was `got`, unless `fits` is true."""
        if not fits:
            self.found.append(f"{name} must be {expected}, got {repr(got)[:60]}")

    def at_least(self, record: Any, **least: float) -> None:
        """Adds which attributes of `record` are below their minimum.

        >>> problems = Problems()
        >>> problems.at_least(slice(0, 5), start=1, stop=1)
        >>> problems.found
        ['start must be 1 or more, got 0']
        """
        for name, low in least.items():
            value = getattr(record, name)
            self.expect(value >= low, name, f"{low} or more", value)  # false for NaN too

    def check(self, call: Callable[..., Any], *arguments: Any, of: str = "") -> Any:
        """Calls a function and adds the message of the ValueError that it raises, preceded by `of`.

        Returns:
            The function's result; None if it raised.
        """
        try:
            return call(*arguments)
        except ValueError as error:
            self.found.append(f"{of}: {error}" if of else str(error))
            return None

    def same_names(self, given: Iterable[str], expected: Iterable[str]) -> None:
        """Adds which names are missing and which are not expected.

        >>> problems = Problems()
        >>> problems.same_names({"mean", "scale"}, {"mean", "variance"})
        >>> problems.found
        ['variance is missing', 'scale is not expected']
        """
        given, expected = set(given), set(expected)
        self.found += [f"{name} is missing" for name in sorted(expected - given)]
        self.found += [f"{name} is not expected" for name in sorted(given - expected)]

    def raise_any(self, where: str = "", remedy: str = "") -> None:
        """Raises one ValueError with all sentences, if there are any.

        Args:
            where: start of the message, such as the name of a file.
            remedy: end of the message: what to do about it.
        """
        if self.found:
            said = "; ".join([*self.found, remedy] if remedy else self.found)
            raise ValueError(f"{where}: {said}" if where else said)
