"""8-bit floating point numbers (E4M3) with a scale for each block of a matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerscope_jax.formats.base import Buffer
from layerscope_jax.formats.encoding import FLOAT32, UINT8, Encoding, namespace
from layerscope_jax.formats.small_floats import LARGEST_E4M3, e4m3, e4m3_codes

NAME = re.compile(r"fp8-(\d+)x(\d+)")
WHOLE = 0
"""As the size of a block: that of the matrix."""

NAMES = {(128, 128): "fp8", (1, WHOLE): "fp8-channel", (WHOLE, WHOLE): "fp8-tensor"}


@dataclass(frozen=True)
class Fp8(Encoding):
    """E4M3 numbers times a float32 scale for each block of a matrix.

    Arrays: q [N, K] uint8, the bits of E4M3 (as bytes, which every backend and NumPy copy and view alike);
    scale [ceil(N / rows), ceil(K / columns)] float32.

    Attributes:
        rows, columns: of a block; 0 for all of the matrix.

    >>> Fp8().name, Fp8(1, 0).name, Fp8(0, 0).name, Fp8(64, 32).name
    ('fp8', 'fp8-channel', 'fp8-tensor', 'fp8-64x32')
    """

    rows: int = 128
    columns: int = 128

    fields = ("q", "scale")

    @classmethod
    def named(cls, name: str) -> Fp8 | None:
        """Returns the encoding of a name; None if it is not one of these."""
        for block, known in NAMES.items():
            if name == known:
                return cls(*block)
        match = NAME.fullmatch(name)
        return None if match is None or "0" in match.groups() else cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:  # type: ignore[override]
        return NAMES.get((self.rows, self.columns), f"fp8-{self.rows}x{self.columns}")

    def block(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the size of a block of a matrix [rows, columns]."""
        return self.rows or rows, self.columns or columns

    def arrays(self, rows: int, columns: int) -> tuple[Buffer, ...]:
        high, wide = self.block(rows, columns)
        return Buffer((rows, columns), UINT8), Buffer((-(-rows // high), -(-columns // wide)), FLOAT32)

    def shape(self, arrays: Sequence[Any]) -> tuple[int, int]:
        rows, columns = arrays[0].shape
        return rows, columns

    def pack(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        rows, columns = matrix.shape
        codes, scales = (np.empty(*buffer) for buffer in self.arrays(rows, columns))
        high, wide = self.block(rows, columns)
        for block in range(len(scales)):
            part = slice(block * high, min(rows, (block + 1) * high))
            values = np.asarray(matrix[part], np.float32)
            largest = np.maximum.reduceat(np.abs(values).max(0), np.arange(0, columns, wide))
            scale = largest / np.float32(LARGEST_E4M3)
            scales[block] = np.where(scale == 0, np.float32(1), scale)
            codes[part] = e4m3_codes(values / np.repeat(scales[block], wide)[:columns])
        return codes, scales

    def take(self, arrays: Sequence[Any], part: slice) -> tuple[Any, ...]:
        codes, scales = arrays
        high, _ = self.block(*codes.shape)
        start, stop, step = part.indices(len(codes))
        if len(scales) == 1:
            return codes[part], scales
        if high == 1:
            return codes[part], scales[part]
        if step != 1 or start % high or (stop % high and stop != len(codes)):
            raise ValueError(f"rows {start} to {stop} share blocks of {high} rows with others")
        return codes[part], scales[start // high : -(-stop // high)]

    def values(self, arrays: Sequence[Any]) -> Any:
        codes, scales = arrays
        (rows, columns), (high, wide) = codes.shape, self.block(*codes.shape)
        down, along = scales.shape
        spread = namespace(codes).broadcast_to(scales[:, None, :, None], (down, high, along, wide))
        return e4m3(codes) * spread.reshape(down * high, along * wide)[:rows, :columns]
