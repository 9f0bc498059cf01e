"""Measures how fast copies to a device are, and how much of their time passes while it computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.offload.bank import device_sharding, host_sharding
from layerscope_jax.support import machine

MOST_BYTES = 64 * 2**20
ROUNDS = 5
WIDTH = 1024
"""Rows and columns of the matrices that keep the device busy."""


@dataclass(frozen=True)
class Copies:
    """Copies from pinned host memory to a device.

    Attributes:
        bytes_per_s: of a copy while nothing else runs.
        overlap: share of the shorter of copying and computing that passed during the other, 0..1.
    """

    bytes_per_s: float
    overlap: float


def measured_copies(device: jax.Device) -> Copies:
    """Measures copies to a device, alone and beside products of matrices that take as long."""
    size = min(MOST_BYTES, machine.free_bytes() // 16)
    source = jax.block_until_ready(jax.device_put(np.ones(size, np.uint8), host_sharding(device)))
    matrix = jax.device_put(np.full((WIDTH, WIDTH), 1 / WIDTH, np.float32), device_sharding(device))

    def copy() -> jax.Array:
        return jax.device_put(source, device_sharding(device))

    def compute(times: int) -> jax.Array:
        return products(matrix, np.int32(times))

    copying = least_s(lambda: [copy()])
    once = least_s(lambda: [compute(9)]) - least_s(lambda: [compute(1)])
    times = max(1, math.ceil(copying / max(once / 8, 1e-6)))
    computing = least_s(lambda: [compute(times)])
    both = least_s(lambda: [compute(times), copy()])
    saved = (copying + computing - both) / min(copying, computing)
    return Copies(size / copying, min(1.0, max(0.0, saved)))


@jax.jit
def products(matrix: jax.Array, times: jax.Array) -> jax.Array:
    """Multiplies a matrix [N, N] with itself so many times."""
    return jax.lax.fori_loop(0, times, lambda _, result: jnp.matmul(matrix, result), matrix)


def least_s(start: Callable[[], list[jax.Array]]) -> float:
    """Returns the least time (s) in which something that is started is ready; the first round warms up."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        jax.block_until_ready(start())
        times.append(time.perf_counter() - began)
    return min(times[1:])
