"""Checkpoints as `layerscope convert` writes them: laid out for this engine, by Orbax.

    layerscope.json                  what the experts are packed as, and of which checkpoint
    config.json, tokenizer.json, …   as in the checkpoint
    dense/                           every parameter but the experts, each an array of its own
    experts/00000/                   the experts of one MoE layer: each of their arrays, stacked [E, ...]

An expert is a chunk of its own in each of these arrays, so that it can be read alone. An array for each
expert would do the same, but Orbax takes 2 ms for each array whatever its size: 37 s to load the 18,432 of a
model of 48 layers with 128 experts, against 0.3 s for 144 stacked ones.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layerscope_jax.checkpoints.manifest import MANIFEST, REMEDY, Manifest
from layerscope_jax.checkpoints.safetensors_io import dtype_named
from layerscope_jax.formats import Buffer, ExpertFormat, format_named
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.offload.bank import ExpertBank, device_sharding, host_sharding
from layerscope_jax.scheduling.plan import ExpertId

DENSE, EXPERTS = "dense", "experts"

STORED = ("float32", "bfloat16", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32")
"""Dtypes that are stored as such; arrays of others as unsigned integers of the same size."""


def orbax() -> Any:
    """Imports Orbax's checkpoints, which only converted checkpoints need.

    Raises:
        ValueError: if Orbax is not installed.
    """
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        raise ValueError(
            "converted checkpoints are written and read by Orbax, which is not installed: "
            "pip install 'layerscope-jax[convert]'"
        ) from error
    return v1


class Writer:
    """Writes the arrays of a converted checkpoint into a folder.

    Args:
        folder: of the checkpoint; must exist.
    """

    def __init__(self, folder: Path):
        self._folder, self._ocp = folder, orbax()

    def dense(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the dense parameters, by dotted path."""
        self._save(DENSE, dict(arrays))

    def layer(self, number: int, experts: Iterator[Any], buffers: Mapping[str, Buffer], count: int) -> None:
        """Writes the experts of a MoE layer.

        Args:
            number: of the layer.
            experts: each as the arrays of its format; only one is held at a time.
            buffers: shapes and dtypes of these arrays.
            count: E.
        """
        stacks = {name: np.empty((count, *buffer.shape), buffer.dtype) for name, buffer in buffers.items()}
        for index, expert in enumerate(experts):
            for stack, array in zip(stacks.values(), expert, strict=True):
                stack[index] = array
        self._save(place_of(number), {name: as_stored(stack) for name, stack in stacks.items()})

    def _save(self, place: str, arrays: dict[str, np.ndarray]) -> None:
        context = self._ocp.Context()
        context.array.saving.use_compression = False  # weights stay as large, and load four times as long
        if place != DENSE:
            context.array.saving.storage_options.shard_axes = (0,)  # a chunk an expert
        with context, quiet():
            try:
                self._ocp.save(self._folder.absolute() / place, arrays)
            except Exception as error:  # whatever Orbax and TensorStore raise for what the system refused
                raise system_error(error, place) from error


def place_of(layer: int) -> str:
    """Returns the folder of a MoE layer's experts within a checkpoint."""
    return f"{EXPERTS}/{layer:05}"


def as_stored(array: np.ndarray) -> np.ndarray:
    """Returns an array, or a view of it, in a dtype of `STORED`."""
    return array if array.dtype.name in STORED else array.view(f"u{array.dtype.itemsize}")


def read_arrays(
    folder: Path, place: str, shapes: Mapping[str, Buffer], sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
    """Reads arrays straight into the memory that a sharding names.

    Raises:
        ValueError: if they are missing, damaged, or of other shapes.
    """
    ocp = orbax()
    abstract = {
        name: jax.ShapeDtypeStruct(
            buffer.shape, as_stored(np.empty(0, buffer.dtype)).dtype, sharding=sharding
        )
        for name, buffer in shapes.items()
    }
    with damage(folder / place), quiet():
        return jax.block_until_ready(ocp.load(folder.absolute() / place, abstract))


@contextmanager
def damage(place: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for files that are missing or damaged into a ValueError."""
    try:
        yield
    except Exception as error:
        what = f"expected arrays as layerscope convert writes them, got {first_line(error)}"
        raise ValueError(f"{place}: {what}; {REMEDY}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax from printing what it raises as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def system_error(error: Exception, place: str) -> OSError:
    """Returns the system's error that kept Orbax from writing, as TensorStore quotes it."""
    quoted = re.search(r"os_error_code='(\d+)'", str(error))
    if quoted is not None:
        return OSError(int(quoted[1]), os.strerror(int(quoted[1])), place)
    return OSError(f"Orbax could not write {place}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """Returns the beginning of what an error says, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def read_bank(
    folder: Path,
    manifest: Manifest,
    config: ModelConfig,
    device: jax.Device | None,
    advance: Callable[[int], None] = lambda size: None,
) -> ExpertBank:
    """Reads the experts, one layer after the other.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        config: of the model.
        device: as for `load`.
        advance: is told how many bytes were read.

    Raises:
        ValueError: if the format is not known, or experts are missing or damaged.
    """
    form, sharding = format_of(folder, manifest, config), host_sharding(device)
    buffers = form.buffers(config.hidden_size, config.moe_intermediate_size)

    def put(array: np.ndarray) -> jax.Array:
        return jax.block_until_ready(jax.device_put(array, sharding))

    def layer(number: int) -> tuple[Any, ...]:
        shapes = {
            name: Buffer((config.num_experts, *buffer.shape), buffer.dtype)
            for name, buffer in buffers.items()
        }
        read = read_arrays(folder, place_of(number), shapes, sharding)
        # Views: on a CPU, JAX takes them over without a copy.
        stacks = [
            np.asarray(read[name].addressable_data(0)).view(buffer.dtype) for name, buffer in buffers.items()
        ]
        advance(sum(stack.nbytes for stack in stacks))
        return tuple(
            form.Expert(*(put(stack[expert]) for stack in stacks)) for expert in range(config.num_experts)
        )

    layers = tuple(layer(number) for number in range(config.num_moe_layers))
    return ExpertBank(layers, form, dtype_named(manifest.dtype))


def format_of(folder: Path, manifest: Manifest, config: ModelConfig) -> ExpertFormat:
    """Returns the format of a converted checkpoint's experts.

    Raises:
        ValueError: if no format of that name is registered.
    """
    try:
        return format_named(manifest.format).for_body(config.expert_body)
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST}: format: {error}") from None


def read_dense(folder: Path, shapes: Mapping[str, Buffer], device: jax.Device | None) -> dict[str, jax.Array]:
    """Reads the dense parameters onto the device, by dotted path."""
    return read_arrays(folder, DENSE, shapes, device_sharding(device))


def layer_ids(layer: int, config: ModelConfig) -> list[ExpertId]:
    """Returns the experts of a MoE layer."""
    return [ExpertId(layer, expert) for expert in range(config.num_experts)]
