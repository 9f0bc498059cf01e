"""What this machine is: its processor, accelerator and memory, and the versions of what runs on it."""

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
"""Read to measure the memory: more than most caches hold."""

READS = 5

UNKNOWN_BYTES = 2**32
"""What a machine that does not tell is taken to have."""


def describe(device: jax.Device) -> dict[str, Any]:
    """The parts that costs depend on.

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
    """Of what computes."""
    return {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__}


def cpu_name() -> str:
    """As Linux tells it, elsewhere as much as Python knows."""
    named = _field("/proc/cpuinfo", "model name")
    return named or platform.processor() or platform.machine()


def cpu_features() -> str:
    """The instructions that it knows, as Linux tells them; empty elsewhere."""
    return _field("/proc/cpuinfo", "flags") or _field("/proc/cpuinfo", "Features") or ""


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_device() -> jax.Device:
    """The last of JAX's CPU devices.

    Raises:
        ValueError: if JAX was told to do without.
    """
    try:
        return jax.devices("cpu")[-1]
    except RuntimeError as error:
        raise ValueError(
            f"experts on the host need JAX's CPU backend, which is off ({error}); "
            "leave JAX_PLATFORMS unset or add cpu to it, as in JAX_PLATFORMS=cuda,cpu"
        ) from None


def free_bytes() -> int:
    """Host memory that may still be taken, what the system would give up for it included."""
    available = _field("/proc/meminfo", "MemAvailable")
    if available is not None:
        return int(available.split()[0]) * 1024
    return (memory_bytes() or UNKNOWN_BYTES) // 2  # a guess where none can be had


def memory_bytes() -> int | None:
    """Host memory in all; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no such call, other systems not these names
        return None


def device_free_bytes(device: jax.Device) -> int | None:
    """Memory of the accelerator that may still be taken; None where it does not say, as CPUs do not."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def read_bytes_per_s() -> float:
    """How fast all cores together read host memory: the most that computing few tokens on the host can reach.

    Reads less than `MOST_BYTES` where little memory is free.
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
    """The value of the first line `name: value` in a file of /proc; None if there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
