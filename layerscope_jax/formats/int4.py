"""4-bit integers with a scale for each group of a row, and optionally a zero point."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from layerscope_jax.formats.base import Buffer
from layerscope_jax.formats.encoding import (
    BFLOAT16,
    FLOAT16,
    UINT8,
    Encoding,
    check_divides,
    nibbles,
    pack_groups,
    scaled,
)

MIDDLE = 8
"""What is added to an integer of -8..7 to store it, and what stands for zero without zero points."""

ENDS = (8.0, 7.5, 7.0, 8.6, -7.0, -7.6)
"""Where the number that is furthest from zero may come to lie, as candidates for a group's scale: past the
ends of -8..7 it is clipped, to store the others more finely. The scale's sign decides which end is its."""

SCALES = {"float16": FLOAT16, "bfloat16": BFLOAT16}

NAME = re.compile(r"int4-g(\d+)-(float16|bfloat16)(-zeros)?")


@dataclass(frozen=True)
class Int4(Encoding):
    """4-bit integers less a zero point, times a scale for each group of G numbers of a row.

    Arrays: q [N, K / 2] uint8, two codes a byte, the first in the low half; scale [N, K / G]; with zero
    points: zeros [N, K / G] uint8, 0..16. Without, the zero point is 8.

    Attributes:
        group: G, a multiple of 32.
        scale: dtype of the scales.
        zeros: whether groups have zero points.

    >>> Int4().name, Int4(128, "bfloat16", zeros=True).name
    ('int4', 'int4-g128-bfloat16-zeros')
    """

    group: int = 32
    scale: Literal["float16", "bfloat16"] = "float16"
    zeros: bool = False

    def __post_init__(self) -> None:
        if self.group < 32 or self.group % 32:
            raise ValueError(f"expected int4 groups of a multiple of 32 numbers, got {self.group}")

    @classmethod
    def named(cls, name: str) -> Int4 | None:
        """Returns the encoding of a name; None if it is not one of these.

        Raises:
            ValueError: if the groups are of no possible size.
        """
        if name == "int4":
            return cls()
        match = NAME.fullmatch(name)
        return None if match is None else cls(int(match[1]), match[2], match[3] is not None)  # type: ignore[arg-type]

    @property
    def name(self) -> str:  # type: ignore[override]
        default = (self.group, self.scale, self.zeros) == (32, "float16", False)
        return "int4" if default else f"int4-g{self.group}-{self.scale}" + "-zeros" * self.zeros

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("q", "scale", "zeros") if self.zeros else ("q", "scale")

    def arrays(self, rows: int, columns: int) -> tuple[Buffer, ...]:
        check_divides(self.name, self.group, columns)
        groups = (rows, columns // self.group)
        zeros = (Buffer(groups, UINT8),) if self.zeros else ()
        return Buffer((rows, columns // 2), UINT8), Buffer(groups, SCALES[self.scale]), *zeros

    def shape(self, arrays: Sequence[Any]) -> tuple[int, int]:
        rows, half = arrays[0].shape
        return rows, 2 * half

    def pack(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the arrays of a matrix; of the candidates for a scale, that of least squared error."""
        pack = self._with_zeros if self.zeros else self._symmetric
        return pack_groups(matrix, self.group, self.arrays(*matrix.shape), pack)

    def _with_zeros(self, groups: np.ndarray) -> tuple[np.ndarray, ...]:
        low, high = np.minimum(groups.min(0), 0), np.maximum(groups.max(0), 0)
        scales = self._rounded((high - low) / np.float32(15))
        zeros = np.clip(np.rint(-low / scales), 0, 15)
        return np.clip(np.rint(groups / scales) + zeros, 0, 15), scales, zeros

    def _symmetric(self, groups: np.ndarray) -> tuple[np.ndarray, ...]:
        low, high = groups.min(0), groups.max(0)
        furthest = np.where(-low > high, low, high)
        best, least = np.ones_like(furthest), np.full_like(furthest, np.inf)
        codes, error = np.empty_like(groups), np.empty_like(groups)
        for end in ENDS:
            scales = self._rounded(furthest / np.float32(-end))
            self._codes(groups, scales, codes)
            np.multiply(codes, scales, out=error)
            error -= groups
            error *= error
            errors = error.sum(0)
            best, least = np.where(errors < least, scales, best), np.minimum(errors, least)
        return self._codes(groups, best, codes) + np.float32(MIDDLE), best

    def _rounded(self, scales: np.ndarray) -> np.ndarray:
        """Returns scales as they are stored, in float32; 1 where one would be zero or no number."""
        with np.errstate(over="ignore"):
            stored = scales.astype(SCALES[self.scale]).astype(np.float32)
        return np.where((stored == 0) | ~np.isfinite(stored), np.float32(1), stored)

    @staticmethod
    def _codes(groups: np.ndarray, scales: np.ndarray, out: np.ndarray) -> np.ndarray:
        np.multiply(groups, 1 / scales, out=out)
        np.rint(out, out=out)
        return np.clip(out, -MIDDLE, MIDDLE - 1, out=out)

    def values(self, arrays: Sequence[Any]) -> Any:
        packed, scales, *zeros = arrays
        codes = nibbles(packed).astype(np.int8)
        if zeros:
            groups = codes.reshape(*scales.shape, -1) - zeros[0].astype(np.int8)[:, :, None]
            codes = groups.reshape(codes.shape)
        else:
            codes = codes - np.int8(MIDDLE)
        return scaled(codes.astype(np.float32), scales.astype(np.float32))
