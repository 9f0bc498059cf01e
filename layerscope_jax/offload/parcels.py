"""Parcels: all arrays of an expert in one array of bytes, which crosses a link as one copy.

A copy to an accelerator costs some 200 us whatever its size, and an expert has three arrays, in packed
formats up to ten. The host's kernels read the same bytes through views.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from layerscope_jax.offload.memory import ALIGNED

MOST_BYTES = 32 << 20
"""Experts of more bytes stay in several arrays: they are worth their copies, and between two of these an
on-demand load may overtake a prefetch."""


def offsets(sizes: Iterable[int]) -> list[int]:
    """Returns where arrays of so many bytes begin in a parcel, and at the end how many it has.

    >>> offsets([100, 64, 1])
    [0, 128, 192, 256]
    """
    found = [0]
    for size in sizes:
        found.append(-(-(found[-1] + size) // ALIGNED) * ALIGNED)
    return found


def in_parcel(expert: Any, put: Callable[[np.ndarray], Any]) -> tuple[Any, jax.Array]:
    """Returns an expert whose arrays are views of one parcel in pinned host memory, and the parcel.

    Args:
        expert: its arrays in this machine's memory.
        put: puts bytes into that memory.
    """
    arrays = [np.asarray(array) for array in expert]
    begins = offsets(array.nbytes for array in arrays)
    packed = np.zeros(begins[-1], np.uint8)
    for begin, array in zip(begins, arrays, strict=False):
        packed[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    parcel = put(packed)
    held = memory_of(parcel)
    views = [
        held[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        for begin, array in zip(begins, arrays, strict=False)
    ]
    return type(expert)(*views), parcel


def memory_of(parcel: jax.Array) -> np.ndarray:
    """Returns the bytes of an array in host memory, without a copy; they keep the array."""
    handle: Any = (ctypes.c_uint8 * parcel.nbytes).from_address(parcel.unsafe_buffer_pointer())
    handle.owner = parcel  # whatever is made of the view holds the handle
    view = np.ctypeslib.as_array(handle)
    view.flags.writeable = False
    return view


def unpacked(parcel: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the arrays of an expert from its parcel, inside a jitted program.

    Args:
        parcel: [N] uint8.
        like: arrays of the same dtypes with one more axis, the first.
    """
    shapes = [array.shape[1:] for array in like]
    sizes = [math.prod(shape) * array.dtype.itemsize for shape, array in zip(shapes, like, strict=True)]
    result = []
    for begin, size, shape, array in zip(offsets(sizes), sizes, shapes, like, strict=False):
        words = jax.lax.slice_in_dim(parcel, begin, begin + size)
        if array.dtype.itemsize > 1:
            words = words.reshape(*shape, array.dtype.itemsize)
        result.append(jax.lax.bitcast_convert_type(words, array.dtype).reshape(shape))
    return result
