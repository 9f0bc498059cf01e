"""Sizes and rates as people write them, and whole numbers."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import numpy as np

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def next_power(number: int) -> int:
    """Returns the smallest power of two that is at least `number`.

    >>> [next_power(number) for number in (1, 2, 3, 17)]
    [1, 2, 4, 32]
    """
    return 1 << (number - 1).bit_length()


def gib(size: int) -> str:
    """Returns a number of bytes as text.

    >>> gib(3 * 2**29), gib(5 * 2**20), gib(3000)
    ('1.50 GiB', '5.0 MiB', '2.9 KiB')
    """
    if size >= 2**29:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**19 or not size else f"{size / 2**10:.1f} KiB"


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def parse_bytes(size: str | int, what: str = "size") -> int:
    """Returns the bytes of a size such as `"8GiB"`, `"1.5 GB"`, `"4096"` or an int.

    Args:
        size: a number of bytes, or a number with one of the units B, KB, MB, GB, TB (powers of 1000),
            KiB, MiB, GiB, TiB (powers of 1024).
        what: the setting's name, for the error message.

    Raises:
        ValueError: if `size` is negative, not a size, or 2**63 or more.

    >>> parse_bytes("1.5GiB"), parse_bytes("2 MB"), parse_bytes(4096)
    (1610612736, 2000000, 4096)
    """
    count = -1
    if is_integer(size):
        count = int(size)
    elif isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", size)
        if match is not None and match[2] in _UNITS:
            count = int(Decimal(match[1]) * _UNITS[match[2]])
    if count < 0:
        raise ValueError(f"{what} must be a size such as '8GiB', '500 MB' or a number of bytes, got {size!r}")
    if count >= 2**63:
        raise ValueError(f"{what} must be less than 2**63 bytes, got {str(size)[:40]}")
    return count


def parse_pace(emulated_link_bandwidth: str | int) -> int:
    """Returns the bytes a second of an emulated link.

    Raises:
        ValueError: if it is not a size above 0.
    """
    count = parse_bytes(emulated_link_bandwidth, "emulated_link_bandwidth")
    if count == 0:
        raise ValueError(
            "emulated_link_bandwidth must be more than 0 bytes a second; leave it out for no limit"
        )
    return count
