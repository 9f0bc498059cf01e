"""Where a thread's time goes: calls that are timed, each without the timed calls inside it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

CALLS = 2000


class Stretch(NamedTuple):
    """A while in which the thread was in one part, from or to the beginning or end of a timed call."""

    part: str
    began: float
    ended: float
    entered: bool  # it begins with the call; if not, with the return from another one


class Stopwatch:
    """Times calls on the thread that made it; on other threads only what is said to be arithmetic.

    What a timed call costs by being timed is measured when the stopwatch is made, and taken off: `within` of
    its own time, `around` of that of the call around it.

    Attributes:
        turns: of each call of the outermost part, in order: what `parts` makes a table of.
        elsewhere: when other threads were at arithmetic.
    """

    def __init__(self) -> None:
        self.turns: list[list[Stretch]] = []
        self.elsewhere: list[tuple[float, float]] = []
        self._thread = threading.get_ident()
        self._open: list[str] = []
        self._since, self._entered = 0.0, True  # of the stretch under way
        self._stretches: list[Stretch] = []
        self.within = self.around = 0.0
        self.within, self.around = self._own_costs()
        self.turns.clear()

    def outermost(self, call: Callable, part: str) -> Callable:
        """`call`, of which each is a turn."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self._enter(part)
            try:
                return call(*arguments, **named)
            finally:
                self._leave()
                self.turns.append(self._stretches)
                self._stretches = []

        return timed

    def timed(self, call: Callable, part: str, arithmetic: bool = False) -> Callable:
        """`call`, timed where it is called within a turn."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != self._thread:
                began = time.perf_counter()
                try:
                    return call(*arguments, **named)
                finally:
                    if arithmetic:
                        self.elsewhere.append((began, time.perf_counter()))
            if not self._open:
                return call(*arguments, **named)
            self._enter(part)
            try:
                return call(*arguments, **named)
            finally:
                self._leave()

        return timed

    def parts(self, hidden: str) -> list[dict[str, float]]:
        """Seconds of each part of each turn, without what timing cost.

        Args:
            hidden: the part to which all time goes in which another thread was at arithmetic.
        """
        busy = merged(self.elsewhere)
        found = []
        for stretches in self.turns:
            times: Counter[str] = Counter()
            spans = np.array([(stretch.began, stretch.ended) for stretch in stretches])
            behind = np.minimum(overlap(spans, busy), spans[:, 1] - spans[:, 0])
            for stretch, elsewhere in zip(stretches, behind.tolist(), strict=True):
                own = self.within if stretch.entered else self.around
                seconds = stretch.ended - stretch.began - elsewhere - own
                times[stretch.part] += seconds if elsewhere == 0 else max(0.0, seconds)
                times[hidden] += elsewhere
            found.append(dict(times))
        return found

    def _enter(self, part: str) -> None:
        now = time.perf_counter()
        if self._open:
            self._stretches.append(Stretch(self._open[-1], self._since, now, self._entered))
        self._open.append(part)
        self._entered = True
        self._since = now

    def _leave(self) -> None:
        now = time.perf_counter()
        self._stretches.append(Stretch(self._open.pop(), self._since, now, self._entered))
        self._entered = False
        self._since = now

    def _own_costs(self) -> tuple[float, float]:
        """Seconds that timing adds to a timed call, and to the call around it."""

        def nothing() -> None:
            pass

        def many(call: Callable) -> None:
            for _ in range(CALLS):
                call()

        untimed = []
        for _ in range(5):
            began = time.perf_counter()
            many(nothing)
            untimed.append(time.perf_counter() - began)
        within, around = [], []
        for _ in range(5):
            self.outermost(many, "around")(self.timed(nothing, "within"))
            times = {"within": 0.0, "around": 0.0}
            for stretch in self.turns[-1]:
                times[stretch.part] += stretch.ended - stretch.began
            within.append(times["within"] / CALLS)
            around.append((times["around"] - min(untimed)) / CALLS)
        return float(np.median(within)), float(np.median(around))


def merged(spans: Sequence[tuple[float, float]]) -> np.ndarray:
    """[n, 2] the same time, in spans that do not overlap, in order.

    >>> merged([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0)]).tolist()
    [[0.0, 3.0], [4.0, 5.0]]
    """
    found: list[list[float]] = []
    for began, ended in sorted(spans):
        if found and began <= found[-1][1]:
            found[-1][1] = max(found[-1][1], ended)
        else:
            found.append([began, ended])
    return np.array(found).reshape(-1, 2)


def overlap(spans: np.ndarray, busy: np.ndarray) -> np.ndarray:
    """Seconds of each of `spans` [m, 2] that lie in `busy` [n, 2], as `merged` gives it.

    >>> overlap(np.array([[0.0, 2.0], [2.5, 4.5]]), np.array([[1.0, 3.0], [4.0, 5.0]])).tolist()
    [1.0, 1.0]
    """
    if not len(busy):
        return np.zeros(len(spans))
    lengths = np.concatenate([[0.0], np.cumsum(busy[:, 1] - busy[:, 0])])

    def before(times: np.ndarray) -> np.ndarray:
        """Busy seconds up to each time."""
        index = np.searchsorted(busy[:, 0], times, side="right")
        last = np.maximum(index - 1, 0)
        inside = np.minimum(times, busy[last, 1]) - busy[last, 0]
        return np.where(index > 0, lengths[last] + inside, 0.0)

    return before(spans[:, 1]) - before(spans[:, 0])
