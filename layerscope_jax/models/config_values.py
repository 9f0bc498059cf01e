"""What values of a `config.json` may be, and how they are shown in messages."""

from __future__ import annotations

from typing import Any

UNKNOWN = "unknown key, which may change what the model computes"

MOST = 2**31 - 1
"""Largest size in a config: sizes are 32-bit integers."""

MOST_LISTED = 2**16
"""Largest number of layers for which the dense layers are listed one by one."""

MOST_POSITIONS = 2**30
"""Longest context: `PAD_POSITION` is larger than any of its positions."""

LARGEST = 3e38
"""Approximate largest number of float32, the dtype in which a config's numbers are used."""


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    return (is_whole(value) or isinstance(value, float)) and 0 < value < LARGEST  # which NaN is not


def shown(value: Any) -> str:
    """Returns a value as text for a message, shortened if it is long.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    if is_whole(value) and abs(value) >= 10**60:
        return f"a whole number of more than 60 digits{' below 0' * (value < 0)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
