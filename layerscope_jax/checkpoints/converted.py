"""Checkpoints as `layerscope convert` writes them: laid out for this engine.

    layerscope.json                  what experts and dense layers are packed as, and of which checkpoint
    config.json, tokenizer.json, …   as in the checkpoint
    dense/                           every parameter but the experts, each an array (packed: two) of its own
    experts/00000/                   the experts of one MoE layer: each of their arrays, stacked [E, ...]

`dense/` and each folder of experts is a checkpoint of Orbax's. They are read without it (`stored_arrays`):
through Orbax, loading took three times as long, and half as much memory again as the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from layerscope_jax.checkpoints.dense_weights import check_dense_format, on_device
from layerscope_jax.checkpoints.headers import read_configs
from layerscope_jax.checkpoints.manifest import MANIFEST, Manifest
from layerscope_jax.checkpoints.mapped import IN_PLACE, MappedFiles
from layerscope_jax.checkpoints.safetensors_io import dtype_named
from layerscope_jax.checkpoints.shards import Shards
from layerscope_jax.checkpoints.stored_arrays import StoredArray, stored_array
from layerscope_jax.checkpoints.weight_names import Naming, ParameterPath
from layerscope_jax.formats import Buffer, ExpertFormat, QuantisedFormat, format_named
from layerscope_jax.formats.int8 import Int8
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.matrices import Int8Matrix
from layerscope_jax.offload.bank import (
    ExpertBank,
    device_sharding,
    keep_near,
    putting_each,
    suits_parcels,
)
from layerscope_jax.offload.disk import DiskBank
from layerscope_jax.offload.memory import ALIGNED, Memory
from layerscope_jax.offload.parcels import in_parcel
from layerscope_jax.offload.partition import Partition

DENSE, EXPERTS = "dense", "experts"


def place_of(layer: int) -> str:
    """Returns the folder of a MoE layer's experts within a checkpoint."""
    return f"{EXPERTS}/{layer:05}"


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint before any number of it is read.

    Attributes:
        folder: of the checkpoint.
        manifest: what it says of itself.
        config, raw, generation: as of `Headers`.
        naming: of the model.
        format: of the experts.
        dense: the arrays of each dense parameter: one, or codes and scales.
        experts: [L] the stacked arrays of each MoE layer's experts, in the order of the format.
    """

    folder: Path
    manifest: Manifest
    config: ModelConfig
    raw: dict[str, Any]
    generation: dict[str, Any]
    naming: Naming
    format: ExpertFormat
    dense: dict[ParameterPath, tuple[StoredArray, ...]]
    experts: tuple[tuple[StoredArray, ...], ...]

    @classmethod
    def open(cls, folder: Path) -> Converted:
        """Reads what a folder says of itself, and where its arrays lie.

        Raises:
            ValueError: if it is incomplete, damaged, or of another version.
        """
        manifest = Manifest.read(folder)
        config, raw, generation = read_configs(folder)
        config = dataclasses.replace(config, tie_embeddings=manifest.head == "tied")
        naming, dtype, form = (
            Naming.of(config),
            dtype_named(manifest.dtype),
            _format_of(folder, manifest, config),
        )
        check_dense_format(manifest.dense_format, f"{folder / MANIFEST}: dense")
        dense = {}
        for path, shape in naming.parameters.items():
            name = ".".join(map(str, path))
            if manifest.dense_format is not None and path in naming.matrices:
                buffers = dict(zip(("codes", "scale"), Int8().arrays(*shape), strict=True))
                arrays = {f"{name}.{field}": buffer for field, buffer in buffers.items()}
            else:
                arrays = {name: Buffer(shape, np.dtype(np.float32) if path in naming.wide else dtype)}
            dense[path] = tuple(stored_array(folder / DENSE, *array) for array in arrays.items())
        stacks = {
            name: Buffer((config.num_experts, *buffer.shape), buffer.dtype)
            for name, buffer in form.buffers(config.hidden_size, config.moe_intermediate_size).items()
        }
        experts = tuple(
            tuple(stored_array(folder / place_of(layer), *stack) for stack in stacks.items())
            for layer in range(config.num_moe_layers)
        )
        return cls(folder, manifest, config, raw, generation, naming, form, dense, experts)

    @property
    def dtype(self) -> np.dtype:
        """Of activations."""
        return dtype_named(self.manifest.dtype)

    def dense_bytes(self, part: Callable[[ParameterPath], bool] = lambda path: True) -> int:
        """Returns the size (bytes) of some of the dense parameters, as they are stored and loaded."""
        return sum(array.tensor.size for path, arrays in self.dense.items() if part(path) for array in arrays)

    @property
    def expert_bytes(self) -> int:
        """Size (bytes) of all experts."""
        return sum(stack.tensor.size for stacks in self.experts for stack in stacks)

    @property
    def can_be_mapped(self) -> bool:
        """Whether a CPU can compute experts where they lie in the files.

        JAX takes over arrays that begin at a multiple of `ALIGNED`. Our own loops read others too, where they
        have any for the format; XLA would copy those each time.
        """
        whole = all(stack.tensor.part(0).size % ALIGNED == 0 for stack in self.experts[0])
        return whole or self.format.name in IN_PLACE or isinstance(self.format, QuantisedFormat)

    def dense_weights(self, read: Read, device: jax.Device | None) -> dict[str, Any]:
        """Returns the dense parameters on a device, as a pure dict."""
        sharding, weights = device_sharding(device), {}
        for path, arrays in self.dense.items():
            values = [read(array) for array in arrays]
            whole = values[0] if len(values) == 1 else Int8Matrix(values[0], values[1], self.dtype)
            weights[path] = on_device(whole, sharding)
        return unflatten_dict(weights)

    def bank(
        self, read: Read, device: jax.Device | None, in_place: bool, partition: Partition | None = None
    ) -> ExpertBank:
        """Returns the experts in host memory.

        Args:
            read: gives an array.
            device: device that experts are copied to; None for the default device.
            in_place: whether arrays stay where they are, on a CPU.
            partition: devices that they are copied to, each to its owner, instead.
        """
        puts = putting_each(self.config, device, partition, in_place)
        size = self.format.expert_bytes(self.config.hidden_size, self.config.moe_intermediate_size)
        as_parcels = suits_parcels(device if partition is None else partition.first, size)
        parcels: list[tuple[jax.Array, ...]] = []

        def layer(stacks: tuple[StoredArray, ...]) -> tuple[Any, ...]:
            arrays = [read(stack) for stack in stacks]
            found = {expert: self.format.Expert(*(array[expert] for array in arrays)) for expert in puts}
            if as_parcels:
                both = [in_parcel(found[expert], put) for expert, put in puts.items()]
                parcels.append(tuple(parcel for _, parcel in both))
                return tuple(built for built, _ in both)
            experts = tuple(self.format.Expert(*map(put, found[expert])) for expert, put in puts.items())
            if not in_place:
                for number, expert in zip(puts, experts, strict=True):
                    keep_near(number, expert)
            return experts

        layers = tuple(map(layer, self.experts))
        return ExpertBank(layers, self.format, self.dtype, tuple(parcels) or None)

    def disk_bank(self, device: jax.Device | None) -> DiskBank:
        """Returns the experts where they are on the disk; none is read."""
        pieces = tuple(
            tuple(tuple(stack.piece(expert) for stack in stacks) for expert in range(self.config.num_experts))
            for stacks in self.experts
        )
        return DiskBank(pieces, self.format, self.dtype, device)


Read = Callable[[StoredArray], np.ndarray]
"""Gives an array of a converted checkpoint: read into memory, or mapped."""


def reading(shards: Shards, advance: Callable[[int], None]) -> Read:
    """Returns what reads arrays into memory.

    Args:
        shards: opens and reads their files.
        advance: called with the number of bytes that were read.
    """
    memory = Memory()

    def read(stored: StoredArray) -> np.ndarray:
        content = memory.take(stored.tensor.size)
        shards.read_into(stored.tensor, content)
        advance(stored.tensor.size)
        return stored.array(content)

    return read


def mapping(files: MappedFiles) -> Read:
    """Returns what maps arrays from their files, which must be on this machine as long as they are used."""

    def mapped(stored: StoredArray) -> np.ndarray:
        content = files.array(stored.tensor)
        assert content is not None  # bytes lie anywhere
        return stored.array(content)

    return mapped


def _format_of(folder: Path, manifest: Manifest, config: ModelConfig) -> ExpertFormat:
    try:
        return format_named(manifest.format).for_body(config.expert_body)
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST}: format: {error}") from None
