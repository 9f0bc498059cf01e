"""Reads the arrays of a decoder from a checkpoint's tensors, one row of the table of weights at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from layerscope_jax.checkpoints.mapped import MappedFiles
from layerscope_jax.checkpoints.packed_tensors import PackedMatrix, PackedTensor
from layerscope_jax.checkpoints.safetensors_io import StoredTensor, cast
from layerscope_jax.checkpoints.shards import Shards
from layerscope_jax.checkpoints.weight_names import Naming, Source
from layerscope_jax.offload.memory import Memory


class TensorReader:
    """Reads and transforms tensors.

    JAX's CPU backend takes over what it returns without a copy, wherever nothing happens to a tensor on its
    way. Memory of which nobody holds a view is read into again.

    Args:
        naming: of the model.
        stored: the checkpoint's tensors, by the names of `naming`.
        shards: opens and reads the files of these tensors.
        dtype: of the arrays, but for those that `naming` has as float32.
        mapped: maps the files that experts lie in, so that those which nothing happens to are not read; None
            to read all.
        advance: called with the number of bytes that were read.
        packed: whether the matrices of experts that are packed stay so.
    """

    def __init__(
        self,
        naming: Naming,
        stored: Mapping[str, StoredTensor | PackedTensor],
        shards: Shards,
        dtype: np.dtype,
        advance: Callable[[int], None] = lambda size: None,
        mapped: MappedFiles | None = None,
        packed: bool = False,
    ):
        self._naming, self._stored, self._dtype, self._advance = naming, stored, dtype, advance
        self._kept: dict[Any, Any] = {}
        self._shards, self._memory, self._mapped, self._packed = shards, Memory(), mapped, packed

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
        of_expert = source.keys[0] in self._naming.experts
        tensors = [self._read(name, index, of_expert) for name, index in source.tensors]
        arrays = source.transform.load(tensors, source.shapes)
        result: dict[Any, Any] = {}
        for key, array in zip(source.keys, arrays, strict=True):
            if isinstance(array, PackedMatrix):
                result[key] = array
                continue
            dtype = np.dtype(np.float32) if key in self._naming.wide else self._dtype
            result[key] = cast(array, dtype, source.tensors[0][0])
        return result

    def _read(self, name: str, index: int | None, of_expert: bool) -> Any:
        tensor = self._stored[name]
        tensor = tensor if index is None else tensor.part(index)
        self._advance(tensor.size)
        if isinstance(tensor, PackedTensor):
            matrix = tensor.read()
            return matrix if self._packed and of_expert else matrix.values()
        array = self._mapped.array(tensor) if self._mapped is not None and of_expert else None
        if array is not None:
            return array
        buffer = self._memory.take(tensor.size)
        self._shards.read_into(tensor, buffer)
        return tensor.array(buffer)
