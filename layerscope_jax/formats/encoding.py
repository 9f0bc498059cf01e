"""Encodings: how one float matrix is stored as a few arrays of fewer bits, and what these stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.formats.base import Buffer
from layerscope_jax.models.matrices import rounded
from layerscope_jax.support.machine import cores

FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16)
UINT8, INT8 = np.dtype(np.uint8), np.dtype(np.int8)

PIECE = 1 << 16
"""Numbers that are packed at a time: what is computed of them stays in a core's cache."""


THREADS_FROM = 8 * PIECE
"""Numbers of a matrix from which on several threads pack it."""


class Encoding(ABC):
    """A way to store a matrix [N, K], N outputs and K inputs, in a few arrays that are contiguous along K.

    The weight that a matrix stands for is defined in float32, as one integer or small float (less its zero
    point, where there is one) times one scale. For activations of another dtype it is rounded to that dtype,
    and the product is then the plain product of that dtype. So a kernel can be compared bit for bit with a
    plain one.

    Attributes:
        name: name of the format of experts whose matrices are stored so.
        fields: names of a matrix's arrays, in order; the first holds the codes.
    """

    name: str
    fields: tuple[str, ...]

    @abstractmethod
    def arrays(self, rows: int, columns: int) -> tuple[Buffer, ...]:
        """Returns shape and dtype of each array of a matrix [rows, columns].

        Raises:
            ValueError: if no matrix of these sizes can be stored so; says what to choose instead.
        """

    @abstractmethod
    def shape(self, arrays: Sequence[Any]) -> tuple[int, int]:
        """Returns N and K of the matrix that some arrays hold."""

    @abstractmethod
    def pack(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the arrays of a float matrix [N, K]."""

    @abstractmethod
    def values(self, arrays: Sequence[Any]) -> Any:
        """Returns the float32 matrix [N, K] that some arrays stand for: of NumPy's arrays, or of JAX's."""

    def take(self, arrays: Sequence[Any], part: slice) -> tuple[Any, ...]:
        """Returns the arrays of some rows of the matrix that some arrays hold.

        Raises:
            ValueError: if these rows share a scale with others.
        """
        return tuple(array[part] for array in arrays)

    def dequantised(self, arrays: Sequence[jax.Array], dtype: np.dtype) -> jax.Array:
        """Returns the matrix [N, K] that some arrays of JAX stand for, rounded to a dtype."""
        return jax.lax.optimization_barrier(rounded(self.values(arrays), dtype))


def namespace(array: Any) -> Any:
    """Returns the module whose functions take an array: `jax.numpy`, or `numpy`."""
    return jnp if isinstance(array, jax.Array) else np


def nibbles(packed: Any) -> Any:
    """Returns the 4-bit codes [N, K] of bytes [N, K / 2], whose low halves come first.

    >>> nibbles(np.array([[0x21, 0x43]], np.uint8))
    array([[1, 2, 3, 4]], dtype=uint8)
    """
    shifts = namespace(packed).asarray([[[0, 4]]], np.uint8)
    return ((packed[:, :, None] >> shifts) & np.uint8(15)).reshape(packed.shape[0], -1)


def joined(codes: np.ndarray) -> np.ndarray:
    """Returns the bytes of 4-bit codes [..., K]: the reverse of `nibbles`."""
    return codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))


def scaled(values: Any, scales: Any) -> Any:
    """Returns values [N, K] times scales [N, K / G], one for each G numbers of a row, both float32."""
    groups = values.reshape(*scales.shape, -1) * scales[:, :, None]
    return groups.reshape(values.shape)


def parts_of(matrix: np.ndarray) -> list[slice]:
    """Returns which rows of a matrix are packed together."""
    rows, columns = matrix.shape
    step = max(1, PIECE // columns)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def pieces(matrix: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields a few rows of a matrix at a time in float32, and which rows they are."""
    for part in parts_of(matrix):
        yield part, np.asarray(matrix[part], np.float32)


def pack_groups(
    matrix: np.ndarray,
    group: int,
    buffers: Sequence[Buffer],
    pack: Callable[[np.ndarray], tuple[np.ndarray, ...]],
) -> tuple[np.ndarray, ...]:
    """Returns the arrays of a matrix [N, K] whose groups of G numbers of a row have scales of their own.

    Args:
        matrix: to be packed.
        group: G.
        buffers: of 4-bit codes [N, K / 2], and of what each group has one of, [N, K / G].
        pack: float32 groups [G, M], one a column, -> their codes [G, M], and what each has one of [M].
            NumPy is several times faster so than with short rows.
    """
    packed = tuple(np.empty(*buffer) for buffer in buffers)

    def do(part: slice) -> None:
        values = np.asarray(matrix[part], np.float32)
        codes, *rest = pack(np.ascontiguousarray(values.reshape(-1, group).T))
        packed[0][part] = joined(codes.astype(np.uint8).T.reshape(values.shape))
        for array, result in zip(packed[1:], rest, strict=True):
            array[part] = result.reshape(len(values), -1)

    if matrix.size < THREADS_FROM or cores() == 1:
        for part in parts_of(matrix):
            do(part)
        return packed
    with ThreadPoolExecutor(cores(), "layerscope-pack") as pool:  # NumPy gives up the lock while it computes
        for _ in pool.map(do, parts_of(matrix)):
            pass
    return packed


def check_divides(name: str, group: int, columns: int) -> None:
    """Refuses rows that cannot be cut into groups.

    Raises:
        ValueError: says what to choose instead.
    """
    if columns % group:
        raise ValueError(
            f"the format {name!r} stores groups of {group} numbers of a row, and this model's experts have "
            f"rows of {columns} (hidden_size, and moe_intermediate_size for down); choose a format whose "
            "groups divide that, or 'int8' or 'fp8', which store rows of any length"
        )
