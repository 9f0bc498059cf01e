"""Where the scales of 8-bit codes lie, one for each row, or for each block of rows and columns."""

from __future__ import annotations

import numpy as np
from numba import carray

from layerscope_jax.kernels.encodings import ALONG, APART, CHUNK, CODE, COLUMNS, FP8, INT8, ROWS, SCALES, SPAN
from layerscope_jax.kernels.numbers import pointer
from layerscope_jax.support.njit import njit

ALL = 63
"""As the power of two of chunks that share a scale: all of a row."""


@njit(cache=True, nogil=True)
def prepare_rows(matrix, first, rows, k, chunks, room, kind):
    """Finds the scales of 8-bit chunks of some rows, from column `k` on; of 4 bits they are read as they lie.

    Scales of a row are read as they lie. Those of narrower blocks are written out by chunks, once if all of
    these rows share them.

    Args:
        chunks: at most `SPAN`.
        room: address of room for `rows * APART` bytes.
        kind: an array of the type that will be written; of no use here.

    Returns:
        where the scale of the first row's first column would be, bytes from one row's to the next one's,
        chunks that share a scale, as a power of two; 0, as these are no tables (`wide_decoding.prepare`).
    """
    if matrix[CODE] not in (INT8, FP8):
        return room, np.int64(0), np.int64(0), np.int64(0)
    along, high = matrix[ALONG], matrix[ROWS]
    last = (first + rows - 1) // high
    together = first // high == last
    if along == 1 and (together or high == 1):
        step = np.int64(0 if together else 4)
        return matrix[SCALES] + 4 * (first // high), step, np.int64(ALL), np.int64(0)
    shared = matrix[COLUMNS] // CHUNK  # chunks that share a scale
    begin = k // CHUNK
    for row in range(1 if together else rows):
        at = matrix[SCALES] + 4 * along * ((first + row) // high)
        scales = carray(pointer(at), along, np.float32)
        line = carray(pointer(room + APART * row), SPAN, np.float32)
        if along == 1:
            line[:chunks] = scales[0]
            continue
        index, done, end = begin // shared, 0, shared - begin % shared
        while done < chunks:
            for chunk in range(np.uint64(done), np.uint64(min(end, chunks))):
                line[chunk] = scales[index]
            index, done, end = index + 1, end, end + shared
    return room - 4 * begin, np.int64(0 if together else APART), np.int64(0), np.int64(0)
