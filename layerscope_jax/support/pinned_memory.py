"""The limit of a GPU's pinned host memory, which experts lie in."""

from __future__ import annotations

import os

import jax
from jax._src import xla_bridge

LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""Environment variable that XLA reads when JAX first uses a GPU."""

LIMIT_GIB = 64
"""Limit (GiB) without it."""

BESIDE_GIB = 4
"""Pinned memory (GiB) for what is copied besides: tokens, and whatever JAX stages."""


def pinned_limit_gib() -> int:
    """Returns the limit (GiB): the variable's, or XLA's own."""
    given = os.environ.get(LIMIT, "")
    return int(given) if given.isdecimal() else LIMIT_GIB


def need_pinned(size: int, device: jax.Device | None = None) -> None:
    """Sees to it that so many bytes of pinned host memory can be allocated for a GPU.

    The limit is raised if it has not been read yet, and nobody has set it.

    Args:
        size: in bytes.
        device: that the memory belongs to; None for the default device.

    Raises:
        ValueError: if JAX uses a GPU whose limit is lower, with what to set.
    """
    given, limit = os.environ.get(LIMIT, ""), pinned_limit_gib()
    if size <= limit << 30:
        return
    needed = -(-size >> 30) + BESIDE_GIB
    if not given and not xla_bridge.backends_are_initialized():
        os.environ[LIMIT] = str(needed)
        return
    if (device or jax.devices()[0]).platform == "gpu":
        raise ValueError(
            f"the experts take {size / 2**30:.1f} GiB of pinned host memory, of which JAX allows {limit} "
            f"GiB: set {LIMIT}={needed} in the environment before the program starts"
        )
