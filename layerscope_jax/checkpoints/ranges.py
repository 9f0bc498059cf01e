"""Where the arrays of experts lie in a checkpoint's files, for experts that are not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layerscope_jax.checkpoints.safetensors_io import BYTES, DTYPES, StoredTensor
from layerscope_jax.checkpoints.weight_names import Naming, Source
from layerscope_jax.formats import format_named
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.offload.disk import DiskBank, Piece
from layerscope_jax.scheduling.plan import ExpertId


def disk_bank(
    config: ModelConfig,
    naming: Naming,
    stored: Mapping[str, Any],
    dtype: np.dtype,
    device: jax.Device | None,
) -> DiskBank:
    """Returns the routed experts of a checkpoint as ranges of its files; no weights are read.

    Args:
        config: of the model.
        naming: of the model.
        stored: the checkpoint's tensors, by the names of `naming`.
        dtype: dtype of the model.
        device: device that the experts are copied to; None for the default device.

    Raises:
        ValueError: if an array of an expert does not lie in a file as it is computed from.
    """
    ranges = Ranges(stored)
    names = list(config.expert_shapes())
    pieces = tuple(
        tuple(
            tuple(ranges.piece(naming.experts[expert, name], (expert, name), dtype) for name in names)
            for expert in (ExpertId(layer, number) for number in range(config.num_experts))
        )
        for layer in range(config.num_moe_layers)
    )
    return DiskBank(pieces, format_named(dtype.name).for_body(config.expert_body), dtype, device)


class Ranges:
    """Finds the ranges that arrays take in the files of their tensors.

    A transform of tensors into arrays is run on views of the mapped files. Where it returns views too, these
    say which bytes it means, and nothing is read.

    Args:
        stored: the checkpoint's tensors.
    """

    def __init__(self, stored: Mapping[str, Any]):
        self._stored = stored
        self._maps: dict[Path, np.memmap] = {}

    def piece(self, source: Source, key: tuple[ExpertId, str], dtype: np.dtype) -> Piece:
        """Returns the range of one array of an expert.

        Args:
            source: where the array comes from.
            key: expert, and name of its array.
            dtype: that the array must have.

        Raises:
            ValueError: if the array is not a range of a file, or has another dtype.
        """
        tensors = [self._tensor(name, index) for name, index in source.tensors]
        array = source.transform.load([self._view(tensor) for tensor in tensors], source.shapes)[
            source.keys.index(key)
        ]
        (expert, name), first = key, tensors[0]
        what = f"{first.file}: {name} of expert {expert.expert}, layer {expert.layer}"
        remedy = "load with experts='memory'"
        if array.dtype != dtype:
            raise ValueError(
                f"{what}: expected {dtype}, as experts='disk' converts nothing, got {array.dtype}; {remedy}, "
                "or save the model in that dtype first (layerscope_jax.save)"
            )
        for tensor in tensors:
            start = array.ctypes.data - self._maps[tensor.file].ctypes.data
            inside = tensor.start <= start and start + array.nbytes <= tensor.start + tensor.size
            if inside and array.flags.c_contiguous:
                return Piece(tensor.file, start, array.nbytes, array.shape, array.dtype, tensor.state)
        raise ValueError(
            f"{what}: expected an array that lies in the file row after row, as experts='disk' reads it, got "
            f"one that is made of it by {source.transform.name!r}; {remedy}, or save the model first "
            "(layerscope_jax.save)"
        )

    def _tensor(self, name: str, index: int | None) -> StoredTensor:
        return self._stored[name] if index is None else self._stored[name].part(index)

    def _view(self, tensor: StoredTensor) -> np.ndarray:
        if tensor.file not in self._maps:
            self._maps[tensor.file] = np.memmap(tensor.file, np.uint8, "r")
        within = self._maps[tensor.file][tensor.start : tensor.start + tensor.size]
        return np.asarray(within).view((DTYPES | BYTES)[tensor.dtype]).reshape(tensor.shape)
