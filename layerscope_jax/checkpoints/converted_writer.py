"""Writes checkpoints in this engine's layout, by Orbax (`converted` says how they are laid out)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax.checkpoints.converted import DENSE, place_of
from layerscope_jax.checkpoints.stored_arrays import as_stored, stored_array
from layerscope_jax.formats import Buffer


def orbax() -> Any:
    """Imports Orbax's checkpoints, which only writing needs.

    Raises:
        ValueError: if Orbax is not installed.
    """
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        raise ValueError(
            "converted checkpoints are written by Orbax, which is not installed: "
            "pip install 'layerscope-jax[convert]'"
        ) from error
    return v1


class Writer:
    """Writes the arrays of a converted checkpoint into a folder.

    Args:
        folder: of the checkpoint; must exist.
    """

    def __init__(self, folder: Path):
        self._folder, self._ocp = folder.absolute(), orbax()

    def dense(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the dense parameters' arrays, by their names."""
        self._save(DENSE, arrays)

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
        self._save(place_of(number), stacks)

    def _save(self, place: str, arrays: Mapping[str, np.ndarray]) -> None:
        context = self._ocp.Context()
        saving = context.array.saving
        # A file for each array, with its numbers as they are: no compression (weights stay as large), and
        # not in Orbax's database of chunks.
        saving.use_ocdbt, saving.use_zarr3, saving.use_compression = False, True, False
        stored = {name: as_stored(array) for name, array in arrays.items()}
        with context, quiet():
            try:
                self._ocp.save(self._folder / place, stored)
            except Exception as error:  # whatever Orbax and TensorStore raise for what the system refused
                raise system_error(error, place) from error
        for name, array in arrays.items():  # that this version of Orbax lays them out so
            stored_array(self._folder / place, name, Buffer(array.shape, array.dtype))


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
