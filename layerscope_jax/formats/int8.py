"""8-bit integers with a scale for each output channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerscope_jax.formats.base import Buffer
from layerscope_jax.formats.encoding import FLOAT32, INT8, Encoding, pieces

LARGEST = 127


@dataclass(frozen=True)
class Int8(Encoding):
    """Integers of -127..127 times a float32 scale for each row: q [N, K] int8, scale [N] float32.

    >>> Int8().values(Int8().pack(np.array([[127, -50.2, 3]])))
    array([[127., -50.,   3.]], dtype=float32)
    """

    name: str = "int8"
    fields: tuple[str, ...] = ("q", "scale")

    @classmethod
    def named(cls, name: str) -> Int8 | None:
        """Returns the encoding of a name; None if it is not one of these."""
        return cls() if name == "int8" else None

    def arrays(self, rows: int, columns: int) -> tuple[Buffer, ...]:
        return Buffer((rows, columns), INT8), Buffer((rows,), FLOAT32)

    def shape(self, arrays: Sequence[Any]) -> tuple[int, int]:
        rows, columns = arrays[0].shape
        return rows, columns

    def pack(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        codes, scales = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
        for part, values in pieces(matrix):
            scale = np.abs(values).max(1) / np.float32(LARGEST)
            scale[scale == 0] = 1
            codes[part] = np.clip(np.rint(values / scale[:, None]), -LARGEST, LARGEST)
            scales[part] = scale
        return codes, scales

    def values(self, arrays: Sequence[Any]) -> Any:
        codes, scales = arrays
        return codes.astype(np.float32) * scales[:, None]
