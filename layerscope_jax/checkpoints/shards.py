"""Open files of a checkpoint: each is opened once, and all cores read a tensor together."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from layerscope_jax.checkpoints.safetensors_io import StoredTensor, errors_of
from layerscope_jax.support.machine import cores
from layerscope_jax.support.threads import Helpers

PIECE_BYTES = 2 << 20
"""Bytes that a thread reads at a time: a page of the largest usual size."""


class Shards:
    """Reads tensors of safetensors files, which stay open until this is closed; a context manager.

    New memory costs more than the bytes that are copied into it: the system clears each page when it is first
    written to. Several threads share that work, too.

    Args:
        threads: number of threads that read, the caller's included; None for one per core.
    """

    def __init__(self, threads: int | None = None):
        self._threads = threads or cores()
        self._files: dict[Path, int] = {}
        self._stack = ExitStack()
        self._helpers = Helpers(self._threads - 1, "layerscope-load")
        self._stack.callback(self._helpers.close)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and closes the files; may be called again."""
        self._stack.close()

    def read_into(self, tensor: StoredTensor, buffer: np.ndarray) -> None:
        """Fills a buffer of bytes with those of a tensor.

        Raises:
            ValueError: as `StoredTensor.read`.
        """
        with errors_of(tensor.file):
            opened, memory = self._opened(tensor), buffer.data
            begins = iter(range(0, tensor.size, PIECE_BYTES))

            def share(_: int) -> None:
                for begin in begins:  # no two threads are given the same
                    tensor.fill(opened, memory[begin : begin + PIECE_BYTES], begin)

            pieces = -(-tensor.size // PIECE_BYTES)
            self._helpers.run(share, max(1, min(self._threads, pieces)))
            tensor.check(opened)

    def _opened(self, tensor: StoredTensor) -> int:
        if tensor.file not in self._files:
            file = self._stack.enter_context(tensor.file.open("rb", buffering=0))
            self._files[tensor.file] = file.fileno()
        return self._files[tensor.file]
