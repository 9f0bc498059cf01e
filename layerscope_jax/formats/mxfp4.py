"""MXFP4 (OCP Microscaling Formats 1.0): 4-bit floating point numbers, 32 of which share a power of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerscope_jax.formats.base import Buffer
from layerscope_jax.formats.encoding import UINT8, Encoding, check_divides, nibbles, pack_groups, scaled
from layerscope_jax.formats.small_floats import E8M0_BIAS, e2m1, e2m1_codes, e8m0

GROUP = 32

LARGEST = 7.25
"""What the largest number of a group is at most, in multiples of its scale. More than 6 is clipped: up to
this limit that costs less than storing the others half as finely. Of normal numbers, the squared error is
0.1% more than with the better of the two in each group."""


@dataclass(frozen=True)
class Mxfp4(Encoding):
    """E2M1 numbers times a power of two for each 32 of a row.

    Arrays: q [N, K / 2] uint8, two codes a byte, the first in the low half; scale [N, K / 32] uint8, E8M0.

    >>> Mxfp4().values((np.array([[0x21] + [0] * 15], np.uint8), np.array([[128]], np.uint8)))[0, :3]
    array([1., 2., 0.], dtype=float32)
    """

    name: str = "mxfp4"
    fields: tuple[str, ...] = ("q", "scale")

    @classmethod
    def named(cls, name: str) -> Mxfp4 | None:
        """Returns the encoding of a name; None if it is not one of these."""
        return cls() if name == "mxfp4" else None

    def arrays(self, rows: int, columns: int) -> tuple[Buffer, ...]:
        check_divides(self.name, GROUP, columns)
        return Buffer((rows, columns // 2), UINT8), Buffer((rows, columns // GROUP), UINT8)

    def shape(self, arrays: Sequence[Any]) -> tuple[int, int]:
        rows, half = arrays[0].shape
        return rows, 2 * half

    def pack(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the arrays of a matrix, with the largest number of a group at most 7.25 of its scale."""
        return pack_groups(matrix, GROUP, self.arrays(*matrix.shape), _pack)

    def values(self, arrays: Sequence[Any]) -> Any:
        packed, scales = arrays
        return scaled(e2m1(nibbles(packed)), e8m0(scales))


def _pack(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packs float32 groups [32, M]: codes [32, M], scales [M]."""
    largest = np.abs(groups).max(0)
    _, exponents = np.frexp(largest / np.float32(LARGEST))  # a fraction of 0.5..1 times 2 ** exponent
    exponents = np.clip(np.where(largest > 0, exponents, 0), 1 - E8M0_BIAS, E8M0_BIAS - 3)
    codes = e2m1_codes(groups * np.ldexp(np.float32(1), -exponents))
    return codes, exponents + E8M0_BIAS
