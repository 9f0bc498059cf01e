"""A fill by NVIDIA Warp: one kernel for GPUs and CPUs, which reads host memory by its address.

Host memory of the kind `pinned_host` has one address for the host and for its GPUs. So the bank is no
argument of the program: what the program gets is a table of addresses, and XLA has nothing to move.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
import warp as wp

wp.config.log_level = wp.LOG_WARNING  # below that it prints to stdout

THREADS = wp.constant(2048)
"""Threads that copy one array of one expert."""

TYPES = {
    "int8": wp.int8,
    "uint8": wp.uint8,
    "float16": wp.float16,
    "float32": wp.float32,
    "bfloat16": wp.bfloat16,
}

WORDS = {16: wp.vec4ui, 4: wp.uint32, 2: wp.uint16, 1: wp.uint8}
"""What a thread copies at a time, by its bytes: the largest that divides an array of an expert."""


@functools.cache
def kernel_of(dtype: str, step: int) -> Any:
    """Returns JAX's function of the kernel for a pool of a dtype, copied in words of so many bytes."""
    word = WORDS[step]

    @wp.kernel(module="unique")
    def fill(
        sources: wp.array(dtype=wp.int32),  # type: ignore[valid-type]
        targets: wp.array(dtype=wp.int32),  # type: ignore[valid-type]
        table: wp.array(dtype=wp.uint32, ndim=2),  # type: ignore[valid-type]
        words: int,
        pool: wp.array(dtype=TYPES[dtype], ndim=2),  # type: ignore[valid-type]
    ):
        move, thread = wp.tid()  # type: ignore[misc]
        source = sources[move]
        if source < 0:
            return
        at = (wp.uint64(table[source, 1]) << wp.uint64(32)) | wp.uint64(table[source, 0])
        place = pool.ptr + wp.uint64(targets[move]) * wp.uint64(words) * wp.uint64(step)
        given = wp.array(ptr=at, shape=(words,), dtype=word)
        kept = wp.array(ptr=place, shape=(words,), dtype=word)
        index = thread
        while index < words:
            kept[index] = given[index]
            index += THREADS

    return wp.jax_kernel(fill, num_outputs=1, in_out_argnames=["pool"])


def filled(pool: jax.Array, sources: jax.Array, targets: jax.Array, table: jax.Array) -> jax.Array:
    """Fills one array of the experts in slots; see `Fill`."""
    count = math.prod(pool.shape[1:])
    size = count * np.dtype(pool.dtype).itemsize
    step = next(step for step in WORDS if size % step == 0)
    run = kernel_of(np.dtype(pool.dtype).name, step)
    (result,) = run(
        sources,
        targets,
        table,
        size // step,
        pool.reshape(len(pool), count),
        launch_dims=(len(sources), int(THREADS)),
    )
    return result.reshape(pool.shape)
