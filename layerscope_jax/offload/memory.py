"""Memory that tensors are read into."""

from __future__ import annotations

import sys

import numpy as np

ALIGNED = 64
"""What the address of an array must be a multiple of (bytes), so that JAX's CPU backend takes it as it is."""

BLOCK_BYTES = 64 << 20
"""Size (bytes) of the blocks that memory is taken in. Within a large block the system hands out pages of
2 MiB (NumPy asks it to), which takes it less time than 4 KiB by 4 KiB, and processors find them sooner."""


class Memory:
    """Gives memory for one tensor after the other.

    The memory of a tensor is given again if nobody holds a view of it any more when the next one is asked
    for; otherwise it is freed, with the other memory of its block, once nobody does.
    """

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)
        self._begin = self._end = 0  # of `_last` in the block
        self._last = self._block

    def take(self, size: int) -> np.ndarray:
        """Returns an array of `size` bytes, aligned to `ALIGNED`; what it holds is undefined."""
        held = sys.getrefcount(self._last) > 2  # by more than this object and the call: by views, that is
        begin = self._end if held else self._begin
        begin += -(self._block.ctypes.data + begin) % ALIGNED
        if begin + size > self._block.size:
            self._last = self._block = np.empty(0, np.uint8)  # gone before there is another
            self._block = np.empty(max(BLOCK_BYTES, size + ALIGNED), np.uint8)
            begin = -self._block.ctypes.data % ALIGNED
        self._begin, self._end = begin, begin + size
        # Through a memoryview, so that views of the result refer to the result and not to the block.
        self._last = np.frombuffer(self._block.data[begin : begin + size], np.uint8)
        return self._last
