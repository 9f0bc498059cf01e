"""MXFP4 (OCP Microscaling Formats 1.0): 4-bit floating point numbers, 32 of which share a power of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerscope_jax.formats.base import Buffer
from layerscope_jax.formats.encoding import UINT8, Encoding, check_divides, nibbles, pack_groups, scaled
from layerscope_jax.formats.small_floats import E8M0_BIAS, LARGEST_E2M1, e2m1, e2m1_codes, e8m0

GROUP = 32


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
        """Returns the arrays of a matrix: the power by which the largest number is at most 6, or half of it
        where the error is less with that number clipped."""
        return pack_groups(matrix, GROUP, self.arrays(*matrix.shape), _pack)

    def values(self, arrays: Sequence[Any]) -> Any:
        packed, scales = arrays
        return scaled(e2m1(nibbles(packed)), e8m0(scales))


def _pack(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packs float32 groups [32, M]: codes [32, M], scales [M]."""
    largest = np.abs(groups).max(0)
    # The fraction is in 0.5..1, so that 2 ** exponent is at most twice what is needed, and never less.
    _, exponents = np.frexp(largest / np.float32(LARGEST_E2M1))
    high = np.clip(np.where(largest > 0, exponents, 0), 1 - E8M0_BIAS, E8M0_BIAS - 3)
    results = []
    for exponent in (high, np.maximum(high - 1, 1 - E8M0_BIAS)):
        scale = np.ldexp(np.float32(1), exponent)
        codes = e2m1_codes(groups * (1 / scale))
        error = e2m1(codes) * scale - groups
        error *= error
        results.append((error.sum(0), codes, exponent))
    (errors, codes, exponent), (others, finer, less) = results
    better = others < errors
    return np.where(better, finer, codes), np.where(better, less, exponent) + E8M0_BIAS
