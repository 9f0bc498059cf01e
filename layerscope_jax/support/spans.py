"""Spans of time in lanes, recorded by several threads in bounded memory; what a timeline is drawn from."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

MOST_BYTES = 128 * 2**20
"""Memory (bytes) for the spans of one recording, as estimated by `SPAN_BYTES` and `ITEM_BYTES`."""

SPAN_BYTES, ITEM_BYTES = 320, 100
"""Upper estimates (bytes) of a span, and of an expert that its details name."""

NO_LAYER = -1
"""Layer of a span that belongs to no single layer."""


class Moved(NamedTuple):
    """Details of a span of link or disk: an expert of the span's layer, or a part of it, that arrived.

    Attributes:
        expert: number of the expert.
        bytes: bytes that arrived.
        part, parts: which part of the expert's copy, from 1, and of how many.
    """

    expert: int
    bytes: int
    part: int = 1
    parts: int = 1


class Span(NamedTuple):
    """What one part of the machine did from one time to another.

    Attributes:
        lane: which part: "scheduler", "device", "host", "link" or "disk".
        kind: what it did, such as "attention", "experts", "demand" or "prefetch".
        begin, end: times (s) of one clock.
        step, layer: which step and layer it was for; the layer may be `NO_LAYER`.
        what: details, by kind; see `layerscope_jax.runtime.timeline`.
        items: number of experts that the details name.
    """

    lane: str
    kind: str
    begin: float
    end: float
    step: int
    layer: int
    what: Any
    items: int

    @property
    def bytes(self) -> int:
        """Estimated memory (bytes)."""
        return SPAN_BYTES + ITEM_BYTES * self.items


class Spans:
    """The latest spans, as many as fit into a bound of memory; any thread may add some.

    Args:
        most_bytes: bound on the memory (bytes), by estimates.

    Attributes:
        step: index of the step that is running, entered into every span.
        left_out: number of spans that made way for later ones.

    >>> spans = Spans(most_bytes=2 * SPAN_BYTES)
    >>> for begin in range(3):
    ...     spans.add("device", "attention", begin, begin + 1, layer=0)
    >>> [span.begin for span in spans], spans.left_out
    ([1, 2], 1)
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self.step = self.left_out = 0
        self._spans: deque[Span] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(
        self,
        lane: str,
        kind: str,
        begin: float,
        end: float,
        layer: int = NO_LAYER,
        what: Any = None,
        items: int = 0,
    ) -> None:
        """Adds a span of the running step; see `Span`. The oldest spans make way if memory is full."""
        span = Span(lane, kind, begin, end, self.step, layer, what, items)
        with self._lock:
            self._spans.append(span)
            self._bytes += span.bytes
            while self._bytes > self.most_bytes and len(self._spans) > 1:
                self._bytes -= self._spans.popleft().bytes
                self.left_out += 1

    def since(self, begin: float) -> list[Span]:
        """Returns the spans that began at a time or later, in the order in which they were added."""
        with self._lock:
            return [span for span in self._spans if span.begin >= begin]

    def __iter__(self) -> Iterator[Span]:
        with self._lock:
            return iter(list(self._spans))
