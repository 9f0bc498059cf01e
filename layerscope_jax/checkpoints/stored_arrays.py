"""Arrays that Orbax wrote as `layerscope convert` asks it to, and that are read without it.

Each lies in a file of its own as it is computed from, so that it can be read, mapped, or read expert by
expert, as a tensor of a safetensors file can.

Such a file is a chunk of Zarr 3, the whole array, uncompressed: its numbers row after row, and behind them
the index of the chunk's only part. `zarr.json` beside it says what the numbers are.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from layerscope_jax.checkpoints.manifest import REMEDY
from layerscope_jax.checkpoints.safetensors_io import StoredTensor, errors_of
from layerscope_jax.formats import Buffer
from layerscope_jax.offload.disk import Piece
from layerscope_jax.support.files import is_there, pread, read_json, state_of

STORED = ("float32", "bfloat16", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32")
"""Dtypes that are stored as such; arrays of others as unsigned integers of the same size."""

INDEX = struct.Struct("<QQI")
"""Behind the numbers: where they begin, how many bytes they are, and a checksum of both."""


def as_stored(array: np.ndarray) -> np.ndarray:
    """Returns an array, or a view of it, in a dtype of `STORED`."""
    return array if array.dtype.name in STORED else array.view(f"u{array.dtype.itemsize}")


class StoredArray(NamedTuple):
    """An array in a file.

    Attributes:
        tensor: where its bytes lie, those of each place along its first axis in a row: [E, ...] bytes.
        buffer: its shape and dtype.
    """

    tensor: StoredTensor
    buffer: Buffer

    def array(self, content: np.ndarray) -> np.ndarray:
        """Returns the array, as a view of its bytes."""
        return content.reshape(-1).view(self.buffer.dtype).reshape(self.buffer.shape)

    def piece(self, index: int) -> Piece:
        """Returns where the part lies that is at a place along its first axis."""
        part, (_, *shape) = self.tensor.part(index), self.buffer.shape
        return Piece(part.file, part.start, part.size, tuple(shape), self.buffer.dtype, part.state)


def stored_array(folder: Path, name: str, buffer: Buffer) -> StoredArray:
    """Returns where an array lies; its numbers are not read.

    Args:
        folder: of the arrays that Orbax wrote together.
        name: of the array.
        buffer: shape and dtype that it must have.

    Raises:
        ValueError: if it is missing, cut off, or another one.
    """
    place = folder / "state" / name
    file = place.joinpath("c", *["0"] * len(buffer.shape))
    if not is_there(file) or not is_there(place / "zarr.json"):
        raise ValueError(f"{place}: expected an array, zarr.json and its numbers, found none; {REMEDY}")
    said = read_json(place / "zarr.json", REMEDY)
    expected = {"shape": list(buffer.shape), "data_type": as_stored(np.empty(0, buffer.dtype)).dtype.name}
    if {key: said.get(key) for key in expected} != expected:
        got = {key: said.get(key) for key in expected}
        raise ValueError(f"{place / 'zarr.json'}: expected {expected}, got {got}; {REMEDY}")
    with errors_of(file), file.open("rb", buffering=0) as opened:
        state, size = state_of(opened.fileno()), os.fstat(opened.fileno()).st_size
        index = pread(opened.fileno(), INDEX.size, buffer.nbytes)
    if size != buffer.nbytes + INDEX.size or INDEX.unpack(index)[:2] != (0, buffer.nbytes):
        raise ValueError(
            f"{file}: expected {buffer.nbytes:,} bytes of numbers and their index, as layerscope convert "
            f"writes them, got a file of {size:,} bytes; {REMEDY}"
        )
    count = buffer.shape[0]
    return StoredArray(
        StoredTensor(file, "U8", (count, buffer.nbytes // count), 0, buffer.nbytes, state), buffer
    )
