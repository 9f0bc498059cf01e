"""Weights of dense layers in fewer bits (`Int8Matrix`), which stay so in memory and in a product's reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def rounded(values: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns float32 values rounded to a dtype, in that dtype.

    XLA may leave out a conversion to bfloat16 that another one from it follows, and so the rounding. What is
    done by `reduce_precision` it keeps; that would lose the smallest numbers of float16.
    """
    if dtype == jnp.bfloat16:
        values = jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dtype"])
@dataclass(frozen=True)
class Int8Matrix:
    """A matrix [N, K] as integers with a scale for each row, in the place of a parameter's array.

    The weight that it stands for is a code times the scale of its row, rounded to the dtype of activations. A
    product with it is defined as the plain product with these weights.

    Attributes:
        codes: [N, K] int8, of -127..127.
        scale: [N] float32.
        dtype: of the activations, and of the weights that it stands for.

    >>> codes, scale = jnp.array([[2, -3], [4, 5]], jnp.int8), jnp.array([0.5, 1.0])
    >>> matrix = Int8Matrix(codes, scale, np.dtype(np.float32))
    >>> matrix.shape, matrix.values().tolist(), matrix[jnp.array([1])].tolist()
    ((2, 2), [[1.0, -1.5], [4.0, 5.0]], [[4.0, 5.0]])
    """

    codes: Any
    scale: Any
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Size (bytes) of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def values(self) -> jax.Array:
        """Returns the weights [N, K] that it stands for."""
        return self._values(self.codes, self.scale)

    def __getitem__(self, rows: EllipsisType | jax.Array) -> Any:
        """Returns some rows' weights [..., K]; or itself for `...`, by which modules read parameters."""
        return self if rows is Ellipsis else self._values(self.codes[rows], self.scale[rows])

    def _values(self, codes: Any, scale: Any) -> jax.Array:
        return rounded(codes.astype(jnp.float32) * scale[..., None], self.dtype)


def plain(matrix: jax.Array | Int8Matrix) -> jax.Array:
    """Returns the weights [N, K] of a matrix that may be packed."""
    return matrix.values() if isinstance(matrix, Int8Matrix) else matrix
