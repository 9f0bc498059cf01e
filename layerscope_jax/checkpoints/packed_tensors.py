"""Matrices of a checkpoint that are stored quantised: several tensors each, which stand for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from layerscope_jax.checkpoints.safetensors_io import StoredTensor
from layerscope_jax.formats.encoding import Encoding

Convert = Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]
"""From the tensors of a matrix, by their short names, to the arrays of its encoding."""


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [N, K] as the arrays of an encoding. Rows can be taken of it, as of an array.

    Attributes:
        encoding: how it is stored.
        arrays: of the encoding.
    """

    encoding: Encoding
    arrays: tuple[np.ndarray, ...]

    def __getitem__(self, rows: slice) -> PackedMatrix:
        return PackedMatrix(self.encoding, self.encoding.take(self.arrays, rows))

    def values(self) -> np.ndarray:
        """Returns the float32 matrix that it stands for."""
        return self.encoding.values(self.arrays)


@dataclass(frozen=True)
class PackedTensor:
    """Where the tensors of a matrix, or of a stack of matrices, lie; like a `StoredTensor` of its numbers.

    Attributes:
        name: for messages: of the matrix.
        encoding: how each matrix is stored.
        shape: of the numbers: [N, K], or [E, N, K] of a stack.
        parts: the tensors, by their short names ("weight_scale").
        convert: makes the arrays of the encoding from them.
    """

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    convert: Convert

    @property
    def dtype(self) -> str:
        """Name of the format, in the place of a dtype."""
        return self.encoding.name

    @property
    def size(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.size for tensor in self.parts.values())

    @property
    def file(self) -> Path:
        """The file of its codes."""
        return next(iter(self.parts.values())).file

    def part(self, index: int) -> PackedTensor:
        """Returns where one matrix of a stack lies."""
        parts = {name: tensor.part(index) for name, tensor in self.parts.items()}
        return replace(self, shape=self.shape[1:], parts=parts)

    def read(self) -> PackedMatrix:
        """Reads a matrix, as its packed arrays.

        Raises:
            ValueError: if a file cannot be read, or holds what the encoding cannot express.
        """
        arrays = {name: tensor.read() for name, tensor in self.parts.items()}
        try:
            return PackedMatrix(self.encoding, self.convert(arrays))
        except ValueError as error:
            raise ValueError(f"{self.file}: {self.name}: {error}") from None
