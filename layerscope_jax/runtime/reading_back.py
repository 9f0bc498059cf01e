"""What the host reads of a layer, in one array: copies from an accelerator cost by number, not by size."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Read(NamedTuple):
    """What the host reads of a layer before it plans.

    Attributes:
        experts: [T, K] int32, the chosen experts.
        expected: [W, E] float32, the forecast; None without one.
        inputs: [T, D] inputs of the experts; None where the host computes none.
    """

    experts: np.ndarray
    expected: np.ndarray | None
    inputs: np.ndarray | None


def packed(*arrays: jax.Array | None) -> jax.Array:
    """Returns the bytes of arrays in a row, inside a jitted program: [N] uint8.

    >>> packed(jnp.array([[1, 2]], jnp.int32), None).tolist()
    [1, 0, 0, 0, 2, 0, 0, 0]
    """
    words = [jax.lax.bitcast_convert_type(array, jnp.uint8) for array in arrays if array is not None]
    return jnp.concatenate([array.reshape(-1) for array in words])


def read(
    words: jax.Array,
    experts: jax.Array,
    expected: jax.Array | None,
    inputs: jax.Array | None,
) -> Read:
    """Waits for the bytes that `packed` made of a layer's arrays, and returns these as they are on the host.

    Args:
        words: [N] uint8.
        experts, expected, inputs: the arrays on the device, of which only shapes are looked at; None for
            those that were not packed.
    """
    held, at = np.asarray(words), 0
    found: list[np.ndarray | None] = []
    for array in (experts, expected, inputs):
        if array is None:
            found.append(None)
            continue
        size = math.prod(array.shape) * array.dtype.itemsize
        found.append(held[at : at + size].view(array.dtype).reshape(array.shape))
        at += size
    return Read(*found)  # type: ignore[arg-type]
