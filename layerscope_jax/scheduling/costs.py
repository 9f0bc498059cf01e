"""What computing and moving an expert costs on a machine: tables, not formulas."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


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
        if len(self.tokens) == 1 or tokens <= self.tokens[0]:
            return self.ms[0]
        right = min(bisect_right(self.tokens, tokens), len(self.tokens) - 1)
        low, high = self.tokens[right - 1], self.tokens[right]
        share = (tokens - low) / (high - low)
        return max(0.0, self.ms[right - 1] + share * (self.ms[right] - self.ms[right - 1]))


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Costs of one expert on one machine, in milliseconds.

    Attributes:
        host_ms: of computing an expert on the host, by its tokens.
        device_ms: of computing a resident expert on the device, by its tokens.
        transfer_ms: of copying one expert to the device.
        source: where the figures come from.
    """

    host_ms: TimeTable
    device_ms: TimeTable
    transfer_ms: float
    source: str
