"""Facts about this machine: processor, accelerator, memory, and versions of Python, JAX and NumPy."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layerscope_jax.support.threads import Helpers

MOST_BYTES = 256 * 2**20
"""Bytes that are read to measure memory: more than most caches hold."""

READS = 5

UNKNOWN_BYTES = 2**32
"""Size of memory (bytes) that is assumed if the system does not report it."""


def describe(device: jax.Device) -> dict[str, Any]:
    """Returns the parts of this machine that costs depend on.

    Args:
        device: the accelerator.
    """
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "device": device.device_kind,
        "memory_bytes": memory_bytes(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, JAX and NumPy."""
    return {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__}


def cpu_name() -> str:
    """Returns the processor's name, from Linux or, elsewhere, from Python."""
    named = _field("/proc/cpuinfo", "model name")
    return named or platform.processor() or platform.machine()


def cpu_features() -> str:
    """Returns the processor's instruction sets as Linux lists them; empty elsewhere."""
    return _field("/proc/cpuinfo", "flags") or _field("/proc/cpuinfo", "Features") or ""


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_device() -> jax.Device:
    """Returns the last of JAX's CPU devices.

    Raises:
        ValueError: if JAX's CPU backend is off.
    """
    try:
        return jax.devices("cpu")[-1]
    except RuntimeError as error:
        raise ValueError(
            f"experts on the host need JAX's CPU backend, which is off ({error}); "
            "leave JAX_PLATFORMS unset or add cpu to it, as in JAX_PLATFORMS=cuda,cpu"
        ) from None


def free_bytes() -> int:
    """Returns the host memory (bytes) that can still be allocated, reclaimable memory included."""
    available = _field("/proc/meminfo", "MemAvailable")
    if available is not None:
        return int(available.split()[0]) * 1024
    return (memory_bytes() or UNKNOWN_BYTES) // 2  # a guess, if the system does not report it


def memory_bytes() -> int | None:
    """Returns the total host memory (bytes); None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows lacks the call, some other systems these names
        return None


def device_free_bytes(device: jax.Device) -> int | None:
    """Returns the accelerator's free memory (bytes); None if it is not reported, as on a CPU."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def read_bytes_per_s() -> float:
    """Returns the read bandwidth (bytes/s) of host memory, which limits computing few tokens on the host.

    Reads less than `MOST_BYTES` if little memory is free.
    """
    threads = cores()
    part = min(MOST_BYTES, free_bytes() // 8) // threads // 4
    parts = [np.ones(part, np.float32) for _ in range(threads)]
    times = []
    helpers = Helpers(threads - 1, "layerscope-read")
    try:
        for _ in range(READS):
            began = time.perf_counter()
            helpers.run(lambda number: parts[number].dot(parts[number]), threads)
            times.append(time.perf_counter() - began)
    finally:
        helpers.close()
    return 4 * part * threads / min(times)


def _field(file: str, name: str) -> str | None:
    """Returns the value of the first line `name: value` in a file of /proc; None without such a line."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
