"""Where arrays of JAX's first device are: pinned memory, NumPy's views of it, buffers that are donated."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.bench_prefill import status
from layerscope_jax.generation.cache_rows import put_rows
from layerscope_jax.models.layers import KVCache
from layerscope_jax.offload.bank import device_sharding, host_sharding
from layerscope_jax.offload.executors import place_rows
from layerscope_jax.support import machine


def ordinary(size: int) -> np.ndarray:
    """Bytes of memory that no backend shares: JAX's CPU backend would, where they begin at 64 bytes."""
    memory = np.ones(size + 64, np.uint8)
    start = (16 - memory.ctypes.data) % 64
    return memory[start : start + size]


def pinned(size: int) -> jax.Array:
    """Bytes of pinned memory."""
    return jax.block_until_ready(jax.device_put(ordinary(size), host_sharding()))


def on_device(array: Any) -> jax.Array:
    """A copy that may be on its way."""
    return jax.device_put(array, device_sharding())


def waited(call: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """A call that returns when all that it gave is there."""

    def run() -> None:
        jax.block_until_ready(call(*arguments))

    return run


def views(size: int, rounds: int) -> dict[str, Any]:
    """Whether what the host's kernels read is the pinned memory itself, and how fast they read it.

    Args:
        size: of an array, whole times 8.
        rounds: of reading it.
    """
    array, cpu = pinned(size), jax.devices("cpu")[-1]
    linux = sys.platform.startswith("linux")
    before = status("VmRSS") if linux else 0
    view = np.asarray(array.addressable_data(0))
    again = jax.block_until_ready(jax.device_put(view, cpu))
    grown = status("VmRSS") - before if linux else None
    here = view.view(np.uint64)
    there = here.copy()
    samples = harness.measure({"pinned": waited(here.sum), "ordinary": waited(there.sum)}, rounds)
    return {
        "bytes": size,
        "view_is_the_buffer": view.ctypes.data == array.unsafe_buffer_pointer(),
        "cpu_array_is_the_buffer": again.unsafe_buffer_pointer() == array.unsafe_buffer_pointer(),
        "grown_bytes": grown,
        "read_gb_per_s": {
            name: harness.spread(size / s / 1e9 for s in found.parts["seconds"])
            for name, found in samples.items()
        },
    }


def donation() -> dict[str, bool]:
    """Whether what an engine donates is written to in place: rows of experts, and keys and values."""
    zeros = partial(jnp.zeros, dtype=jnp.float32, device=device_sharding())
    rows, cache = zeros((17, 256)), KVCache(zeros((4, 2, 64, 32)), zeros((4, 2, 64, 32)))
    before = [jax.block_until_ready(array).unsafe_buffer_pointer() for array in (rows, *cache)]
    placed = place_rows(rows, np.arange(4, dtype=np.int32), np.ones((4, 256), np.float32))
    new = KVCache(zeros((4, 2, 16, 32)), zeros((4, 2, 16, 32)))
    (put,) = put_rows([cache], np.arange(4, dtype=np.int32), [new])
    after = [jax.block_until_ready(array).unsafe_buffer_pointer() for array in (placed, *put)]
    return {"rows": after[0] == before[0], "caches": after[1:] == before[1:]}


def pool_bytes() -> int:
    """Most pinned memory that XLA takes for a GPU; the variable is read when JAX begins to use the GPU."""
    return int(os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "64")) * 2**30


def pinned_memory(step: int, limit: int) -> dict[str, Any]:
    """How much pinned memory there is, asked for step by step up to a limit. XLA keeps what it has taken."""
    source, held, seconds, stopped = ordinary(step), list[jax.Array](), list[float](), "the limit"
    while (len(held) + 1) * step <= limit:
        # XLA takes host memory in pieces, each as large as all before: there must be room for the next.
        taken = len(held) * step
        if machine.free_bytes() < step + max(0, min(taken, pool_bytes() - taken)):
            stopped = "host memory is short"
            break
        began = time.perf_counter()
        try:
            held.append(jax.block_until_ready(jax.device_put(source, host_sharding())))
        except jax.errors.JaxRuntimeError as error:
            stopped = str(error).splitlines()[0]
            break
        seconds.append(time.perf_counter() - began)
    return {
        "bytes": len(held) * step,
        "stopped_by": stopped,
        "gb_per_s": harness.spread(step / s / 1e9 for s in seconds) if seconds else None,
        "pool_bytes": pool_bytes(),
    }
