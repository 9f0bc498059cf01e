"""Compact storage of parameters: matrices in 8 bits with a scale for each column, the rest in float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SCALE = ".scale"
LARGEST = 127


class Matrix(NamedTuple):
    """A matrix in 8 bits, or a stack of them; a pytree.

    Attributes:
        values: [..., rows, columns] int8.
        scale: [..., 1, columns] float32 factor of each column.
    """

    values: Any
    scale: Any

    @classmethod
    def of(cls, exact: np.ndarray) -> Matrix:
        """Quantises float32 matrices [..., rows, columns] to 127 steps on either side of zero."""
        exact = np.asarray(exact, np.float32)
        scale = np.abs(exact).max(-2, keepdims=True) / LARGEST
        return cls(np.round(exact / np.where(scale > 0, scale, 1)).astype(np.int8), scale)

    def wide(self) -> jax.Array:
        """Returns the matrix in float32; jittable."""
        return self.values.astype(jnp.float32) * self.scale


def widened(tree: Any) -> Any:
    """Returns a pytree with its `Matrix` nodes converted to float32 arrays; jittable."""
    is_matrix = lambda node: isinstance(node, Matrix)  # noqa: E731
    return jax.tree.map(lambda node: node.wide() if is_matrix(node) else node, tree, is_leaf=is_matrix)


def packed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Packs arrays for storage: matrices as int8 with float32 scales, the rest as float16.

    Args:
        arrays: name -> [L, ...] float32; those of three dimensions, [L, rows, columns], are matrices.

    Raises:
        ValueError: naming the arrays with a value that is not finite in float16.

    >>> kept = packed({"m": np.array([[[0.5, -8.0], [1.0, 0.0]]]), "bias": np.array([[0.5]])})
    >>> {name: (array.dtype.name, array.shape) for name, array in kept.items()}
    {'m': ('int8', (1, 2, 2)), 'm.scale': ('float32', (1, 1, 2)), 'bias': ('float16', (1, 1))}
    >>> unpacked(kept)["m"].round(2).tolist()
    [[[0.5, -8.0], [1.0, 0.0]]]
    """
    with np.errstate(over="ignore"):
        half = {name: np.asarray(array).astype(np.float16) for name, array in arrays.items()}
    broken = [name for name, array in half.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"parameters are not finite in float16: {', '.join(broken)}; train it again")
    kept: dict[str, np.ndarray] = {}
    for name, array in half.items():
        if array.ndim == 3:  # from the float32 array, because float16 has few digits for small scales
            kept[name], kept[name + SCALE] = Matrix.of(arrays[name])
        else:
            kept[name] = array
    return kept


def unpacked(kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays that `packed` stored: name -> [L, ...] float32.

    Raises:
        ValueError: for a matrix without its scales.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, array in kept.items():
        if name.endswith(SCALE):
            continue
        arrays[name] = array.astype(np.float32)
        if array.ndim == 3:
            scale = kept.get(name + SCALE)
            if scale is None or scale.shape != (array.shape[0], 1, array.shape[2]):
                raise ValueError(f"{name} without a scale for each of its columns")
            with np.errstate(over="ignore", invalid="ignore"):  # the reader reports such values
                arrays[name] *= scale
    return arrays
