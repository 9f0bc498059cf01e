"""Rows that the host computed, on their way to the program that adds them up: one array with their places."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PLACE = 4
"""Bytes of a row's place."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["outputs", "words"], meta_fields=[])
@dataclass(frozen=True)
class HostRows:
    """A layer's output rows, and those of the host that belong among them.

    They go into the program of the next layer as they are: putting them among the others is no dispatch of
    its own. There are as many as there could be, so that one program serves any number of them.

    Attributes:
        outputs: [A + 1, D] rows on the device; what the host computed is missing.
        words: [A, 4 + n] uint8, the place of each row (int32; A for none), and the row, of n bytes.
    """

    outputs: Any
    words: Any

    @classmethod
    def of(cls, outputs: jax.Array, rows: np.ndarray, taken: np.ndarray) -> HostRows:
        """Returns the outputs with rows of the host.

        Args:
            outputs: [A + 1, D].
            rows: [A + 1, D] of the host.
            taken: [R] int32, which of them.
        """
        total, width = len(outputs) - 1, rows.shape[1] * rows.itemsize
        words = np.zeros((total, PLACE + width), np.uint8)
        places = np.full(total, total, np.int32)
        places[: len(taken)] = taken
        words[:, :PLACE] = places[:, None].view(np.uint8)
        words[: len(taken), PLACE:] = np.ascontiguousarray(rows[taken]).view(np.uint8).reshape(-1, width)
        return cls(outputs, words)

    @classmethod
    def none(cls, outputs: jax.Array) -> HostRows:
        """Returns the outputs with no row of the host."""
        return cls.of(outputs, np.zeros(outputs.shape, outputs.dtype), np.zeros(0, np.int32))


def merged(outputs: Any) -> Any:
    """Returns outputs [A + 1, D] with the host's rows in their places, inside a jitted program.

    >>> rows = HostRows.of(jnp.zeros((3, 2)), np.array([[1, 2], [3, 4], [0, 0]], np.float32), np.array([1]))
    >>> merged(rows).tolist()[:2]
    [[0.0, 0.0], [3.0, 4.0]]
    """
    if not isinstance(outputs, HostRows):
        return outputs
    device, words = outputs.outputs, jnp.asarray(outputs.words)
    total, width = len(device) - 1, device.shape[1]
    places = jax.lax.bitcast_convert_type(words[:, :PLACE], jnp.int32)
    rows = jax.lax.bitcast_convert_type(words[:, PLACE:].reshape(total, width, -1), device.dtype)
    return device.at[places].set(rows)
