"""Dense parameters: in which format they can be packed, and how they are put on the device and named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from layerscope_jax.formats.int8 import Int8
from layerscope_jax.models.matrices import Int8Matrix

DENSE_FORMATS = ("int8",)
"""Formats that the matrices of dense layers can be packed in: an integer of 8 bits a weight, and a scale for
each output."""


def check_dense_format(name: Any, of: str = "dense_format") -> None:
    """Checks the name of a format of dense weights, or None.

    Args:
        name: the name.
        of: what has it, for the message.

    Raises:
        ValueError: if there is no such format.

    >>> check_dense_format("int4")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: dense_format must be 'int8' or None, got 'int4'; weights that every token reads lose too ...
    """
    if name is not None and name not in DENSE_FORMATS:
        raise ValueError(
            f"{of} must be 'int8' or None, got {name!r}; weights that every token reads lose too much in "
            "fewer bits, and experts have formats of their own (expert_format)"
        )


def packed(matrix: np.ndarray, dtype: np.dtype) -> Int8Matrix:
    """Returns a float matrix [N, K], packed, as NumPy arrays.

    Args:
        matrix: the weights.
        dtype: of activations.
    """
    codes, scale = Int8().pack(matrix)
    return Int8Matrix(codes, scale, np.dtype(dtype))


def on_device(weights: np.ndarray | Int8Matrix, sharding: jax.sharding.Sharding) -> Any:
    """Returns dense weights in the memory that a sharding names, once they are there."""
    return jax.block_until_ready(jax.device_put(weights, sharding))


def numbers(weights: jax.Array | Int8Matrix) -> np.ndarray:
    """Returns the numbers that dense weights stand for, as a NumPy array."""
    return np.asarray(weights.values() if isinstance(weights, Int8Matrix) else weights)


def named_arrays(dense: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields every array of a model's dense parameters with its name, such as "layers.0.norm.scale".

    >>> dense = {"norm": {"scale": 1}, "head": Int8Matrix(2, 3, np.dtype(np.float32))}
    >>> list(named_arrays(dense))
    [('norm.scale', 1), ('head.codes', 2), ('head.scale', 3)]
    """
    for path, weights in flatten_dict(dense).items():
        name = ".".join(map(str, path))
        if isinstance(weights, Int8Matrix):
            yield f"{name}.codes", weights.codes
            yield f"{name}.scale", weights.scale
        else:
            yield name, weights


def dense_format_of(dense: Mapping[str, Any]) -> str | None:
    """Returns the format that a model's dense matrices are packed in; None if they are plain."""
    leaves = jax.tree.leaves(dense, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix))
    return "int8" if any(isinstance(leaf, Int8Matrix) for leaf in leaves) else None
