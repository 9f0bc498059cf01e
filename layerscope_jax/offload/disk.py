"""Experts that stay in a checkpoint's files (`DiskBank`), and direct reads of them (`File`)."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layerscope_jax.formats import ExpertFormat
from layerscope_jax.offload.bank import ExpertBank, host_sharding
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support import files
from layerscope_jax.support.errors import ReadError
from layerscope_jax.support.files import state_of

BLOCK = 4096
"""What offsets, sizes and addresses of direct reads must be multiples of (bytes), whatever the disk."""

CHUNK = 4 << 20
"""Bytes of one read: large enough for a disk's full rate, small enough for the copy behind it to find the
bytes in the CPU's cache."""

DIRECT = getattr(os, "O_DIRECT", 0)
"""Flag that opens a file for reads past the page cache; 0 where the system has none."""

preadv: Callable[[int, list[Any], int], int] = files.preadv
"""Does every read; tests replace it to inject faults."""


@dataclass(frozen=True)
class Piece:
    """Range of a file that holds one array of an expert, exactly as it is computed from.

    Attributes:
        file: the file.
        start, size: range (bytes).
        shape, dtype: of the array.
        state: of the file when the model was loaded (`support.files.state_of`).
    """

    file: Path
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype
    state: tuple[int, ...]


class File:
    """An open file, read past the page cache: by direct reads, or else the pages are dropped after each read.

    A file that is replaced by another under its name stays readable as it was; one that is written to in
    place is refused.

    Args:
        path: the file.

    Attributes:
        direct: whether reads are direct.
    """

    def __init__(self, path: Path):
        self.path = path
        self.direct = bool(DIRECT)
        if self.direct:
            try:
                self.number = os.open(path, os.O_RDONLY | DIRECT)
                os.preadv(self.number, [aligned(BLOCK).data], 0)
                return
            except OSError:  # the file system has none
                self.direct = False
        try:
            self.number = os.open(path, files.READ_ONLY)
        except OSError as error:
            raise ReadError(
                f"{path}: {error.strerror}; experts are read from it while they are used"
            ) from None

    def read(self, piece: Piece, memory: Any, buffer: np.ndarray) -> None:
        """Reads a piece into memory.

        Args:
            piece: range of this file.
            memory: ctypes array of `piece.size` bytes, at any address.
            buffer: `CHUNK` bytes of the calling thread, aligned to `BLOCK`.

        Raises:
            ReadError: if the file cannot be read, ends too early, or was changed since it was opened.
        """
        try:
            if self.direct:
                self._read_directly(piece, memory, buffer)
            else:
                self._fill(memoryview(memory).cast("B"), piece.start, piece.size)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self.number, piece.start, piece.size, os.POSIX_FADV_DONTNEED)
            changed = state_of(self.number) != piece.state
        except OSError as error:
            raise ReadError(
                f"{self.path}: {error.strerror or error} while an expert was read; check the disk, and load "
                "the model again"
            ) from error
        if changed:
            raise ReadError(f"{self.path} was changed since it was loaded; load the model again")

    def _read_directly(self, piece: Piece, memory: Any, buffer: np.ndarray) -> None:
        """Reads the blocks that hold the piece, and copies the piece out of them.

        Through a buffer, because tensors begin anywhere in a block, and JAX's arrays do not.
        """
        target, source = ctypes.addressof(memory), buffer.ctypes.data
        done = 0
        while done < piece.size:
            offset = piece.start + done
            first = offset % BLOCK
            needed = min(CHUNK, first + piece.size - done)
            # The last block of a file may be cut short: a direct read then ends where the file does.
            self._fill(buffer.data[: -(-needed // BLOCK) * BLOCK], offset - first, needed)
            ctypes.memmove(target + done, source + first, needed - first)
            done += needed - first

    def _fill(self, memory: memoryview, offset: int, needed: int) -> None:
        """Reads until the first `needed` bytes of `memory` are those of the file from `offset` on."""
        count = 0
        while count < needed:
            begin = count - count % BLOCK if self.direct else count  # goes on from a whole block
            came = preadv(self.number, [memory[begin:]], offset + begin)
            if begin + came <= count:
                raise ReadError(f"{self.path} was cut off since it was loaded; load the model again")
            count = begin + came

    def close(self) -> None:
        os.close(self.number)


def aligned(size: int, to: int = BLOCK) -> np.ndarray:
    """Returns `size` bytes of memory that begin at a multiple of `to`."""
    memory = np.empty(size + to, np.uint8)
    first = -memory.ctypes.data % to
    return memory[first : first + size]


class DiskBank(ExpertBank):
    """All routed experts of a model, in its checkpoint's files.

    An engine reads them into a pool of host memory (`layerscope_jax.offload.pool.HostPool`). Everything else
    that asks this bank for an expert gets it read into memory of its own.

    Args:
        pieces: [L][E] the pieces of each expert, in the order of the format's arrays.
        format: format of the experts, for their body.
        dtype: dtype of the inputs and outputs of experts.
        device: device that the experts are copied to; None for the default device.

    Raises:
        ValueError: if the pieces are not those of experts of the format, all of one shape.
    """

    def __init__(
        self,
        pieces: tuple[tuple[tuple[Piece, ...], ...], ...],
        format: ExpertFormat,
        dtype: np.dtype,
        device: jax.Device | None = None,
    ):
        super().__init__(pieces, format, dtype)
        object.__setattr__(self, "sharding", host_sharding(device))
        empty = format.Expert(*(np.broadcast_to(np.zeros((), p.dtype), p.shape) for p in pieces[0][0]))
        format.check(empty)
        object.__setattr__(self, "_sizes", format.sizes(empty))
        expected = [(piece.shape, piece.dtype) for piece in pieces[0][0]]
        for layer in pieces:
            for each in layer:
                if [(piece.shape, piece.dtype) for piece in each] != expected:
                    raise ValueError(f"expected experts of one shape and dtype, {expected}, got {each}")

    sharding: jax.sharding.Sharding
    _sizes: tuple[int, int]

    def pieces(self, expert: ExpertId) -> tuple[Piece, ...]:
        """Returns where the arrays of an expert lie."""
        return self.layers[expert.layer][expert.expert]

    def __getitem__(self, expert: ExpertId) -> Any:
        return self.format.Expert(*(jax.device_put(view, self.sharding) for view in self.views(expert)))

    def views(self, expert: ExpertId) -> tuple[np.ndarray, ...]:
        """Returns an expert's arrays, read into new memory.

        Raises:
            ReadError: if they cannot be read.
        """
        arrays, buffer = [], aligned(CHUNK)
        for piece in self.pieces(expert):
            memory, file = aligned(piece.size, 64), File(piece.file)
            try:
                file.read(piece, (ctypes.c_char * piece.size).from_buffer(memory.data), buffer)
            finally:
                file.close()
            arrays.append(memory.view(piece.dtype).reshape(piece.shape))
        return tuple(arrays)

    def converted(self, format: ExpertFormat) -> ExpertBank:
        raise ValueError(
            "experts that stay on the disk stay in the format of their files; load the model with "
            f"experts='memory' to have them in the format {format.name!r}"
        )

    @property
    def sizes(self) -> tuple[int, int]:
        return self._sizes


class Files:
    """Opens each file once, for several threads, and reads experts from them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[Path, File] = {}

    def read(self, pieces: tuple[Piece, ...], memories: list[Any], buffer: np.ndarray) -> None:
        """Reads the arrays of an expert into memory; see `File.read`."""
        for piece, memory in zip(pieces, memories, strict=True):
            self._file(piece.file).read(piece, memory, buffer)

    def _file(self, path: Path) -> File:
        with self._lock:
            if path not in self._opened:
                self._opened[path] = File(path)
            return self._opened[path]

    def close(self) -> None:
        with self._lock:
            for file in self._opened.values():
                file.close()
            self._opened.clear()
