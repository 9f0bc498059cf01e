"""Reads the arrays of a decoder from a checkpoint's tensors, one row of the table of weights at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from layerscope_jax.checkpoints.packed_tensors import PackedMatrix, PackedTensor
from layerscope_jax.checkpoints.safetensors_io import StoredTensor, cast
from layerscope_jax.checkpoints.weight_names import Naming, Source

ALIGNED = 64
"""What the address of an array must be a multiple of (bytes), so that JAX's CPU backend takes it as it is."""


class TensorReader:
    """Reads and transforms tensors.

    JAX's CPU backend takes over what it returns without a copy, wherever nothing happens to a tensor on its
    way. Memory of which nobody holds a view is read into again: new memory for each tensor would take
    the system as long as reading does.

    Args:
        naming: of the model.
        stored: the checkpoint's tensors, by the names of `naming`.
        dtype: of the arrays, but for those that `naming` has as float32.
        advance: is told how many bytes were read.
        packed: whether the matrices of experts that are packed stay so.
    """

    def __init__(
        self,
        naming: Naming,
        stored: Mapping[str, StoredTensor | PackedTensor],
        dtype: np.dtype,
        advance: Callable[[int], None] = lambda size: None,
        packed: bool = False,
    ):
        self._naming, self._stored, self._dtype, self._advance = naming, stored, dtype, advance
        self._packed = packed
        self._kept: dict[Any, Any] = {}
        self._memory = np.empty(0, np.uint8)

    def array(self, source: Source, key: Any) -> Any:
        """Returns one array of a source; the others of the same tensors are kept until they are asked for."""
        if key not in self._kept:
            self._kept |= self.arrays(source)
        return self._kept.pop(key)

    def arrays(self, source: Source) -> dict[Any, Any]:
        """Returns all arrays of a source, by their keys; of an expert that stays packed, a `PackedMatrix`.

        Raises:
            ValueError: if a file cannot be read, was changed, or holds numbers too large for the dtype.
        """
        packed = self._packed and source.keys[0] in self._naming.experts
        tensors = [self._read(name, index, packed) for name, index in source.tensors]
        arrays = source.transform.load(tensors, source.shapes)
        result: dict[Any, Any] = {}
        for key, array in zip(source.keys, arrays, strict=True):
            if isinstance(array, PackedMatrix):
                result[key] = array
                continue
            dtype = np.dtype(np.float32) if key in self._naming.wide else self._dtype
            result[key] = cast(array, dtype, source.tensors[0][0])
        return result

    def _read(self, name: str, index: int | None, packed: bool) -> Any:
        tensor = self._stored[name]
        tensor = tensor if index is None else tensor.part(index)
        self._advance(tensor.size)
        if isinstance(tensor, PackedTensor):
            matrix = tensor.read()
            return matrix if packed else matrix.values()
        held = sys.getrefcount(self._memory) > 2  # by more than this object and the call: by views, that is
        if held or self._memory.size != tensor.size + ALIGNED:
            self._memory = np.empty(0, np.uint8)  # gone before there is another
            self._memory = np.empty(tensor.size + ALIGNED, np.uint8)
        first = -self._memory.ctypes.data % ALIGNED
        return tensor.read(self._memory[first : first + tensor.size])
