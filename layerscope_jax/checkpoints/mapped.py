"""Files of a checkpoint that are mapped into memory: what is read of them are the system's own copies."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from layerscope_jax.checkpoints.headers import Tensor
from layerscope_jax.checkpoints.safetensors_io import DTYPES, StoredTensor, errors_of
from layerscope_jax.checkpoints.weight_names import Naming
from layerscope_jax.support import machine, numa
from layerscope_jax.support.files import READ_ONLY

IN_PLACE = ("float32", "bfloat16")
"""Plain formats of experts that are mapped: our own loops read them wherever they lie."""

SHARE = 0.8
"""Share of the free memory that weights may take on a host of several NUMA nodes."""


def maps_by_default(folder: Path) -> bool:
    """Whether experts that could be mapped are, where nothing is said.

    Not on a host of several NUMA nodes with memory for them, which reads each into the memory of the node
    that computes it: mapped pages stay where the system has put them.
    """
    if not numa.nodes():
        return True
    size, free = sum(file.stat().st_size for file in folder.glob("*.safetensors")), machine.free_bytes()
    return free is not None and size > SHARE * free


class MappedFiles:
    """Maps safetensors files, read-only, and keeps them open as long as it or an array of theirs is there.

    Nothing is read until a page is asked for. Processes that map the same files share the memory, and the
    system may take it back where memory is short. So a file must not be written to meanwhile: its weights
    would change, which `check` tells before tokens of theirs are given out, and if it gets shorter in the
    middle of a step, the system ends the process (SIGBUS). To replace a file, write another and rename it:
    what is mapped then stays the old file.

    It costs some speed: the system maps files in pages of 4 KiB, and published files have tensors where no
    cache line begins, so that a decode step takes about a tenth longer than with experts in memory.
    """

    def __init__(self) -> None:
        self._opened: dict[Path, tuple[int, np.ndarray, StoredTensor]] = {}
        weakref.finalize(self, _close, self._opened)

    def array(self, tensor: StoredTensor) -> np.ndarray | None:
        """Returns the values of a tensor where its file is mapped, in its own dtype; read-only.

        None if the tensor does not lie at a multiple of the size of its numbers.

        Raises:
            ValueError: if its file cannot be opened, or is no longer the one that its header was read of.
        """
        with errors_of(tensor.file):
            if tensor.file not in self._opened:
                opened = os.open(tensor.file, READ_ONLY)
                try:
                    tensor.check(opened)
                    content = np.frombuffer(mmap.mmap(opened, 0, access=mmap.ACCESS_READ), np.uint8)
                except BaseException:
                    os.close(opened)
                    raise
                self._opened[tensor.file] = opened, content, tensor
        array = tensor.array(self._opened[tensor.file][1][tensor.start : tensor.start + tensor.size])
        return array if array.flags.aligned else None

    def check(self) -> None:
        """Checks that no file was written to since its header was read.

        Raises:
            ValueError: naming one that was.
        """
        for file, (opened, _, tensor) in self._opened.items():
            if tensor.is_changed(opened):
                raise ValueError(
                    f"{file} was changed while a model was using it; load the model again, and replace "
                    "files by renaming others rather than writing to them (or load with mmap=False)"
                )


def _close(opened: dict[Path, tuple[int, np.ndarray, StoredTensor]]) -> None:
    for number, *_ in opened.values():
        os.close(number)


def are_as_stored(naming: Naming, stored: Mapping[str, Tensor], dtype: np.dtype) -> bool:
    """Whether experts of a dtype are those of a checkpoint's tensors, and can be computed where they lie.

    Our own loops read experts wherever they lie; XLA, which computes the others, would copy them each time.
    """
    names = {name for source in naming.experts.values() for name, _ in source.tensors}
    return dtype.name in IN_PLACE and all(DTYPES.get(stored[name].dtype) == dtype for name in names)
