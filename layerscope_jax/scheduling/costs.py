"""What computing and moving an expert costs on a machine: tables, not formulas."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from layerscope_jax.support.njit import njit

MOST_MS = 1e9
"""Longest time that is one, eleven days: beyond it, and sums of it, there is no machine, but an overflow."""

MOST_TOKENS = 2**20
"""Largest count in a table; curves are as long."""

KNOWN = 1024
"""Token counts up to here are looked up; policies ask for thousands of times within a step."""


@dataclass(frozen=True)
class TimeTable:
    """Time by token count, interpolated linearly between measured points and beyond the last one.

    Attributes:
        tokens: measured counts, rising, 1 or more.
        ms: milliseconds at each.

    >>> TimeTable((1, 4), (1.0, 2.5))(2)
    1.5
    """

    tokens: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        tokens, ms = self.tokens, self.ms
        if not (
            all(isinstance(part, Sequence) and not isinstance(part, str | bytes) for part in (tokens, ms))
            and len(tokens) == len(ms) > 0
            and all(isinstance(n, Integral) and type(n) is not bool and 1 <= n <= MOST_TOKENS for n in tokens)
            and list(tokens) == sorted(set(tokens))
        ):
            raise ValueError(
                "a time table takes rising token counts with one time each, whole numbers in "
                f"1..{MOST_TOKENS}, got {str(tokens)[:80]}, {str(ms)[:80]}"
            )
        wrong = [time for time in ms if not is_time(time)]
        if wrong:
            raise ValueError(f"a time table takes times in 0..{MOST_MS:g} ms, got {str(wrong)[:80]}")
        object.__setattr__(self, "tokens", tuple(int(count) for count in tokens))
        object.__setattr__(self, "ms", tuple(float(time) for time in ms))

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
        if not isinstance(record, Mapping) or record.keys() != {"tokens", "ms"}:
            raise ValueError(
                'expected a time table such as {"tokens": [1, 4], "ms": [0.2, 0.5]}, '
                f"got {str(record)[:80]}"
            )
        return cls(record["tokens"], record["ms"])


def is_time(value: Any) -> bool:
    """Whether it is a number of milliseconds that something could take."""
    return isinstance(value, Real) and type(value) is not bool and bool(0 <= value <= MOST_MS)  # type: ignore


NOTHING = TimeTable((1,), (0.0,))


class Curves(NamedTuple):
    """`TimeTable.curve` of an expert on the host and on the device, for compiled functions."""

    host: np.ndarray
    device: np.ndarray


@njit(cache=True, nogil=True)
def ms_of(tokens: float, curve: np.ndarray) -> float:
    """The time of so many tokens, which may be expected ones, on a curve that goes straight on at its end.

    Below one token it is one's time by the chance that it comes; of what is no number of tokens it is 0.

    >>> curve = TimeTable((1, 4), (1.0, 2.5)).curve
    >>> ms_of(0.3, curve), ms_of(2.0, curve), ms_of(3.5, curve)
    (0.3, 1.5, 2.25)
    """
    if not tokens > 0:  # nor a number
        return 0.0
    whole = int(min(tokens, len(curve) - 2.0))
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

    def __post_init__(self) -> None:
        tables = ("host_ms", "device_ms", "layer_ms", "forecast_ms")
        wrong = [
            f"{name} must be a TimeTable, got {str(getattr(self, name))[:40]!r}"
            for name in tables
            if not isinstance(getattr(self, name), TimeTable)
        ]
        wrong += [
            f"{name} must be a time in 0..{MOST_MS:g} ms, got {str(getattr(self, name))[:40]!r}"
            for name in ("transfer_ms", "host_start_ms")
            if not is_time(getattr(self, name))
        ]
        if not isinstance(self.source, str):
            wrong.append(f"source must be text, got {str(self.source)[:40]!r}")
        if self.alone is not None and not isinstance(self.alone, HardwareProfile):
            wrong.append(f"alone must be a HardwareProfile or None, got {str(self.alone)[:40]!r}")
        if wrong:
            raise ValueError(f"a HardwareProfile's {'; '.join(wrong)}")

    @cached_property
    def curves(self) -> Curves:
        return Curves(self.host_ms.curve, self.device_ms.curve)
