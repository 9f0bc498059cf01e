"""What computing and moving an expert costs on a machine: tables, not formulas."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from layerscope_jax.njit import njit

KNOWN = 1024
"""Token counts up to here are looked up; policies ask for thousands of times within a step."""


@dataclass(frozen=True)
class TimeTable:
    """Time by token count, interpolated linearly between measured points and beyond the last one.

    Attributes:
        tokens: measured counts, rising.
        ms: milliseconds at each.

    >>> TimeTable((1, 4), (1.0, 2.5))(2)
    1.5
    """

    tokens: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            len(self.tokens) != len(self.ms)
            or not self.tokens
            or list(self.tokens) != sorted(set(self.tokens))
        ):
            raise ValueError(
                f"a time table takes rising token counts with one time each, got {self.tokens}, {self.ms}"
            )

    def __call__(self, tokens: int) -> float:
        return self.known[tokens] if 0 < tokens <= KNOWN else self._interpolated(tokens)

    def upto(self, most: int) -> Callable[[int], float]:
        """The same, for whoever asks often for counts of at most so many tokens."""
        return self.known.__getitem__ if most <= KNOWN else self

    def total(self, counts: Collection[int]) -> float:
        """Of computing all of them, one after the other."""
        time = self.upto(max(counts, default=0))
        return sum(map(time, counts), 0.0)

    @cached_property
    def known(self) -> list[float]:
        """Times of 0 to `KNOWN` tokens; nothing is done for none."""
        return [0.0] + [self._interpolated(tokens) for tokens in range(1, KNOWN + 1)]

    @cached_property
    def curve(self) -> np.ndarray:
        """[N + 1] ms of 0 to N tokens, for `ms_of`: twice as many as were measured, and `KNOWN` at least."""
        more = range(KNOWN + 1, 2 * self.tokens[-1] + 1)
        return np.array(self.known + [self._interpolated(tokens) for tokens in more])

    def _interpolated(self, tokens: int) -> float:
        if len(self.tokens) == 1 or tokens <= self.tokens[0]:
            return self.ms[0]
        right = min(bisect_right(self.tokens, tokens), len(self.tokens) - 1)
        low, high = self.tokens[right - 1], self.tokens[right]
        share = (tokens - low) / (high - low)
        return max(0.0, self.ms[right - 1] + share * (self.ms[right] - self.ms[right - 1]))

    def to_json(self) -> dict[str, Any]:
        return {"tokens": list(self.tokens), "ms": list(self.ms)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TimeTable:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            tokens, ms = record["tokens"], record["ms"]
            if not all(type(count) is int for count in tokens):
                raise TypeError
            return cls(tuple(tokens), tuple(float(time) for time in ms))
        except (KeyError, TypeError):
            raise ValueError(
                'expected a time table such as {"tokens": [1, 4], "ms": [0.2, 0.5]}, '
                f"got {str(record)[:80]}"
            ) from None


NOTHING = TimeTable((1,), (0.0,))


class Curves(NamedTuple):
    """`TimeTable.curve` of an expert on the host and on the device, for compiled functions."""

    host: np.ndarray
    device: np.ndarray


@njit(cache=True, nogil=True)
def ms_of(tokens: float, curve: np.ndarray) -> float:
    """The time of so many tokens, which may be expected ones, on a curve that goes straight on at its end.

    Below one token it is one's time by the chance that it comes.

    >>> curve = TimeTable((1, 4), (1.0, 2.5)).curve
    >>> ms_of(0.3, curve), ms_of(2.0, curve), ms_of(3.5, curve)
    (0.3, 1.5, 2.25)
    """
    whole = min(int(tokens), len(curve) - 2)
    return curve[whole] + (tokens - whole) * (curve[whole + 1] - curve[whole])


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Costs of one layer of a model on one machine, in milliseconds.

    Attributes:
        host_ms: of computing an expert on the host, by its tokens.
        device_ms: of computing a resident expert on the device, by its tokens.
        transfer_ms: of copying one expert to the device.
        layer_ms: of everything else in a layer (attention, router, shared experts, the sum), by tokens of the
            step.
        forecast_ms: more of it in a layer that looks ahead, by tokens of the step.
        host_start_ms: of giving a layer's experts to the host and taking its results over, however many.
        source: where the figures come from.
        alone: the same where host, device and link do not work at once, if they hinder each other; else None.
    """

    host_ms: TimeTable
    device_ms: TimeTable
    transfer_ms: float
    layer_ms: TimeTable = NOTHING
    forecast_ms: TimeTable = NOTHING
    host_start_ms: float = 0.0
    source: str
    alone: HardwareProfile | None = None

    @cached_property
    def curves(self) -> Curves:
        return Curves(self.host_ms.curve, self.device_ms.curve)
