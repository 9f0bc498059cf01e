"""Rows of experts that several devices own, on their way to the program that adds them up."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from layerscope_jax.offload.partition import AXIS


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "chosen"], meta_fields=["each"])
@dataclass(frozen=True)
class SplitRows:
    """A layer's output rows, of which each device has computed those of its own experts.

    Attributes:
        rows: [N * (A + 1), D], A + 1 on each of N devices; what a device has not computed is any number.
        chosen: [T, K] int32, the expert of each row, A = T * K; on every device.
        each: number of a layer's experts that a device owns.
    """

    rows: Any
    chosen: Any
    each: int

    @property
    def specs(self) -> SplitRows:
        """How devices share the arrays, for `jax.shard_map`."""
        return SplitRows(PartitionSpec(AXIS), PartitionSpec(), self.each)


def exchanged(split: SplitRows) -> jax.Array:
    """Returns all rows [A, D] on every device, inside a program that each device of the mesh runs.

    Each row comes from one device with all its bits: what is summed are words, of which all but one are 0. So
    the result is the same for any number of devices.
    """
    mine = split.chosen.reshape(-1, 1) // split.each == jax.lax.axis_index(AXIS)
    rows = split.rows[:-1]
    words = jnp.where(mine, words_of(rows), jnp.uint32(0))
    return jax.lax.bitcast_convert_type(jax.lax.psum(words, AXIS), rows.dtype).reshape(rows.shape)


def words_of(rows: jax.Array) -> jax.Array:
    """Returns rows [A, D] as words of 32 bits, which every backend can sum across devices.

    >>> words_of(jnp.ones((1, 4), jnp.bfloat16)).shape
    (1, 2)
    """
    if rows.dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(rows, jnp.uint32)
    pairs = rows.reshape(rows.shape[0], -1, 4 // rows.dtype.itemsize)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint32)


def exchanged_bytes(tokens: int, choices: int, width: int, itemsize: int, devices: int) -> int:
    """Returns the bytes that all devices together send to exchange the rows of one layer.

    In a ring each of N devices sends 2 (N - 1) / N of an array that is summed over all of them.

    Args:
        tokens, choices, width: T, K, D.
        itemsize: bytes of a number.
        devices: N.

    >>> exchanged_bytes(tokens=4, choices=2, width=64, itemsize=2, devices=4)
    6144
    """
    return 2 * (devices - 1) * tokens * choices * width * itemsize
