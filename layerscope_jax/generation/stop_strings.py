"""Stop strings: looked for in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes a text on until it holds a stop string, and holds back what may be the beginning of one.

    Of several stop strings it is the one that is complete first, and the longest of those that end together:
    how the text is cut into pieces does not matter.

    Args:
        stops: the stop strings, none of them empty.
        include: whether the text that is passed on includes the stop string.

    Attributes:
        found: the stop string that the text holds; None so far.

    >>> stops = StopStrings(["\\n\\n", "END"])
    >>> [stops.add(piece) for piece in ("a", "b\\n", "cE", "ND!")], stops.found
    (['a', 'b', '\\nc', ''], 'END')
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        self._stops, self._include = stops, include
        self._held = ""
        self._passed = 0  # characters of the held text at which no stop string may end
        self.found: str | None = None

    def add(self, piece: str, may_end: bool = True) -> str:
        """Adds a piece of text and returns the text that is now certain.

        Args:
            piece: the piece.
            may_end: whether a stop string may end in it.
        """
        if self.found is not None:
            return ""
        self._held += piece
        if not may_end:
            self._passed = len(self._held)
        ends = []
        for stop in self._stops:
            at = self._held.find(stop, max(0, self._passed - len(stop) + 1))
            if at >= 0:
                ends.append((at + len(stop), at, stop))
        if ends:
            end, at, self.found = min(ends)
            certain, self._held = self._held[: end if self._include else at], ""
            return certain
        held = max(_beginning(self._held, stop) for stop in self._stops)
        return self._pass(len(self._held) - held)

    def end(self) -> str:
        """Returns what was held back, after which no text comes."""
        return self._pass(len(self._held))

    def _pass(self, length: int) -> str:
        certain, self._held = self._held[:length], self._held[length:]
        self._passed = max(0, self._passed - length)
        return certain


def _beginning(text: str, stop: str) -> int:
    """Returns the length of the longest end of a text that a stop string begins with but does not end in."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
