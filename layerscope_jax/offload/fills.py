"""Fills: what copies experts from host memory into slots on the device, inside a jitted step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from layerscope_jax.kernels import slot_fill
from layerscope_jax.kernels.cpu import address
from layerscope_jax.kernels.xla_ffi import Unavailable
from layerscope_jax.offload.slots import Moves


@dataclass(frozen=True)
class Fill:
    """One way to fill slots.

    Attributes:
        name: what it is called.
        array: fills one array: (pool [S, ...], sources [N], targets [N], addresses) -> pool, in its place.
            `addresses` is [E, 2] uint32, an address of 64 bits in two words.
    """

    name: str
    array: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

    def __call__(self, pool: Any, moves: Moves, tables: jax.Array) -> Any:
        """Copies experts into slots.

        Args:
            pool: an expert's arrays with a leading axis S.
            moves: which expert goes to which slot.
            tables: [A, E, 2] uint32 addresses of the A arrays of each expert (`addresses_of`).
        """
        arrays = [self.array(array, *moves, table) for array, table in zip(pool, tables, strict=True)]
        return type(pool)(*arrays)


def addresses_of(experts: Sequence[Any]) -> np.ndarray:
    """Returns where the arrays of experts begin in host memory: [A, E, 2] uint32.

    The memory must outlive every program that is given the addresses, and stay where it is.
    """
    pointers = np.array([[address(array) for array in expert] for expert in experts], np.uint64)
    return np.ascontiguousarray(pointers.T).view(np.uint32).reshape(*pointers.T.shape, 2)


def fill_for(device: jax.Device) -> Fill:
    """Returns what fills slots of a device.

    Raises:
        Unavailable: if nothing does, with what is missing.
    """
    if device.platform == "cpu":
        return by_loops()
    if device.platform in ("gpu", "cuda"):
        return by_warp()
    raise Unavailable(f"nothing fills slots on {device.platform!r} inside a step")


@functools.cache
def by_loops() -> Fill:
    """Returns the fill of CPUs, in a loop of this package's own.

    Raises:
        Unavailable: if XLA cannot call it.
    """
    slot_fill.target_of(np.dtype(np.float32))
    return Fill(
        "loops", lambda pool, sources, targets, table: slot_fill.filled(pool, sources, targets, table.ravel())
    )


@functools.cache
def by_warp() -> Fill:
    """Returns the fill of NVIDIA GPUs, which read pinned host memory by its address; on CPUs it runs too.

    Raises:
        Unavailable: if NVIDIA Warp is not installed, or cannot be used.
    """
    if find_spec("warp") is None:
        raise Unavailable("NVIDIA Warp is not installed: pip install 'layerscope-jax[warp]'")
    try:
        from layerscope_jax.offload.warp_fill import filled
    except Exception as error:  # whatever a Warp raises that is damaged or too old
        raise Unavailable(f"NVIDIA Warp cannot be used: {type(error).__name__}: {error}") from error
    return Fill("warp", filled)
