"""NVFP4: 4-bit floating point numbers, 16 of which share an 8-bit scale, and a matrix a float32 one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerscope_jax.formats.base import Buffer
from layerscope_jax.formats.encoding import (
    FLOAT32,
    UINT8,
    Encoding,
    check_divides,
    nibbles,
    pack_groups,
    pieces,
    scaled,
)
from layerscope_jax.formats.small_floats import (
    LARGEST_E2M1,
    LARGEST_E4M3,
    e2m1,
    e2m1_codes,
    e4m3,
    e4m3_codes,
)

GROUP = 16


@dataclass(frozen=True)
class Nvfp4(Encoding):
    """E2M1 numbers times the scale of their group, which is an E4M3 number times the matrix's scale.

    Arrays: q [N, K / 2] uint8, two codes a byte, the first in the low half; scale [N, K / 16] uint8, E4M3;
    global [1] float32. The product of the two scales is rounded to float32 before it scales a number.
    """

    name: str = "nvfp4"
    fields: tuple[str, ...] = ("q", "scale", "global")

    @classmethod
    def named(cls, name: str) -> Nvfp4 | None:
        """Returns the encoding of a name; None if it is not one of these."""
        return cls() if name == "nvfp4" else None

    def arrays(self, rows: int, columns: int) -> tuple[Buffer, ...]:
        check_divides(self.name, GROUP, columns)
        codes, scales = Buffer((rows, columns // 2), UINT8), Buffer((rows, columns // GROUP), UINT8)
        return codes, scales, Buffer((1,), FLOAT32)

    def shape(self, arrays: Sequence[Any]) -> tuple[int, int]:
        rows, half = arrays[0].shape
        return rows, 2 * half

    def pack(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        largest = np.float32(max(np.abs(values).max() for _, values in pieces(matrix)))
        whole = largest / np.float32(LARGEST_E2M1 * LARGEST_E4M3) or np.float32(1)

        def pack(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scales = e4m3_codes(np.abs(groups).max(0) / np.float32(LARGEST_E2M1) / whole)
            factors = e4m3(scales) * whole
            factors[factors == 0] = np.inf  # of numbers too small for any scale, which become zero
            return e2m1_codes(groups / factors), scales

        *buffers, _ = self.arrays(*matrix.shape)
        return *pack_groups(matrix, GROUP, buffers, pack), np.array([whole], np.float32)

    def take(self, arrays: Sequence[Any], part: slice) -> tuple[Any, ...]:
        *of_rows, whole = arrays
        return *super().take(of_rows, part), whole

    def values(self, arrays: Sequence[Any]) -> Any:
        packed, scales, whole = arrays
        return scaled(e2m1(nibbles(packed)), e4m3(scales) * whole[:, None])
