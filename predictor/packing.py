"""Arrays of parameters in few bytes: matrices in 8 bits with a scale a column, the rest in float16."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

SCALE = ".scale"
LARGEST = 127


def packed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What to keep of `arrays`: int8 and a float32 scale for each matrix, float16 of the rest.

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
        if array.ndim == 3:
            exact = np.asarray(arrays[name], np.float32)
            # Float16 has few digits left for numbers as small as a scale can be.
            scale = np.abs(exact).max(1, keepdims=True) / LARGEST
            kept[name] = np.round(exact / np.where(scale > 0, scale, 1)).astype(np.int8)
            kept[name + SCALE] = scale
        else:
            kept[name] = array
    return kept


def unpacked(kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name -> [L, ...] float32 again.

    Raises:
        ValueError: for a matrix without its scales.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in kept.items():
        if name.endswith(SCALE):
            continue
        found[name] = array.astype(np.float32)
        if array.ndim == 3:
            scale = kept.get(name + SCALE)
            if scale is None or scale.shape != (array.shape[0], 1, array.shape[2]):
                raise ValueError(f"{name} without a scale for each of its columns")
            found[name] *= scale
    return found
