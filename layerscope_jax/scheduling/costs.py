"""Costs of computing and copying an expert on a machine, as measured tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from layerscope_jax.support.njit import njit

MOST_MS = 1e9
"""Longest time (ms) that is accepted, eleven days: a larger one is an overflow."""

MOST_TOKENS = 2**20
"""Largest token count in a table, and so the length of a curve."""

KNOWN = 1024
"""Times up to this many tokens are kept in a list: policies ask for thousands within a step."""


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
        """Returns a faster function with the same values, for counts up to `most`."""
        return self.known.__getitem__ if most <= KNOWN else self

    def total(self, counts: Collection[int]) -> float:
        """Returns the total time (ms) of several experts, one after the other, by their token counts."""
        time = self.upto(max(counts, default=0))
        return sum(map(time, counts), 0.0)

    @cached_property
    def known(self) -> list[float]:
        """Times (ms) of 0 to `KNOWN` tokens; 0 for no tokens."""
        return [0.0] + [self._interpolated(tokens) for tokens in range(1, KNOWN + 1)]

    @cached_property
    def curve(self) -> np.ndarray:
        """Times (ms) [N + 1] of 0 to N tokens, for `ms_of`: twice the largest measured count, or `KNOWN`."""
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
    """Whether a value is a number of milliseconds between 0 and `MOST_MS`."""
    return isinstance(value, Real) and type(value) is not bool and bool(0 <= value <= MOST_MS)  # type: ignore


NOTHING = TimeTable((1,), (0.0,))


class Curves(NamedTuple):
    """`TimeTable.curve` of an expert on the host and on the device, for compiled functions."""

    host: np.ndarray
    device: np.ndarray


@njit(cache=True, nogil=True)
def ms_of(tokens: float, curve: np.ndarray) -> float:
    """Returns the time (ms) of a number of tokens, which may be an expectation, from a curve.

    Beyond its end the curve is extended linearly. Below one token the time is that of one token times the
    expectation; for NaN and numbers up to 0 it is 0.

    >>> curve = TimeTable((1, 4), (1.0, 2.5)).curve
    >>> ms_of(0.3, curve), ms_of(2.0, curve), ms_of(3.5, curve)
    (0.3, 1.5, 2.25)
    """
    if not tokens > 0:  # or NaN
        return 0.0
    whole = int(min(tokens, len(curve) - 2.0))
    return curve[whole] + (tokens - whole) * (curve[whole + 1] - curve[whole])


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Costs of one layer of a model on one machine, in milliseconds.

    Attributes:
        host_ms: time to compute an expert on the host, by its tokens.
        device_ms: time to compute a resident expert on the device, by its tokens.
        transfer_ms: time to copy one expert to the device.
        layer_ms: time of everything else in a layer (attention, router, shared experts, the sum), by tokens
            of the step.
        forecast_ms: additional time of a layer that computes a forecast, by tokens of the step.
        host_start_ms: time to hand a layer's experts to the host and to take over its results, however many.
        read_ms: time between the ends of two reads of experts from the disk that follow each other; 0 if it
            is not known.
        read_start_ms: time by which a read lasts longer than that, and by which reads overlap.
        source: where the figures come from.
        alone: the same costs with the other parts idle, if the parts slow each other down; otherwise None.
    """

    host_ms: TimeTable
    device_ms: TimeTable
    transfer_ms: float
    layer_ms: TimeTable = NOTHING
    forecast_ms: TimeTable = NOTHING
    host_start_ms: float = 0.0
    read_ms: float = 0.0
    read_start_ms: float = 0.0
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
            for name in ("transfer_ms", "host_start_ms", "read_ms", "read_start_ms")
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


def sharing_host(costs: HardwareProfile, devices: int) -> HardwareProfile:
    """Returns a machine's costs as each of several devices has them: their plans share the host.

    >>> table = TimeTable((1,), (2.0,))
    >>> costs = HardwareProfile(host_ms=table, device_ms=table, transfer_ms=1.0, source="made up")
    >>> sharing_host(costs, 4).host_ms(1)
    8.0
    """

    def slower(table: TimeTable) -> TimeTable:
        return TimeTable(table.tokens, tuple(devices * ms for ms in table.ms))

    alone = None if costs.alone is None else sharing_host(costs.alone, devices)
    return replace(costs, host_ms=slower(costs.host_ms), alone=alone)
