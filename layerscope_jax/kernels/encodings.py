"""Matrices of packed weights as compiled functions take them, and tables of what 4 bits stand for.

A matrix is a row of numbers (`MATRIX`), so that one compiled loop reads every encoding.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from layerscope_jax.formats.encoding import Encoding
from layerscope_jax.formats.fp8 import Fp8
from layerscope_jax.formats.int4 import Int4
from layerscope_jax.formats.int8 import Int8
from layerscope_jax.formats.mxfp4 import Mxfp4
from layerscope_jax.formats.nvfp4 import Nvfp4
from layerscope_jax.formats.quantised import QuantisedFormat
from layerscope_jax.formats.small_floats import E2M1_VALUES, e8m0
from layerscope_jax.support.njit import njit
from layerscope_jax.support.target import features

CHUNK = 32
"""Numbers of a row that are decoded at once."""

# Of a matrix: addresses of codes, scales and what is third (zero points, or a scale of the whole); K; its
# encoding; columns and rows that share a scale; scales in a row; chunks that share one, as a power of two;
# the address of its table (`table_of`), 0 where there is none.
CODES, SCALES, THIRD, DEPTH, CODE, COLUMNS, ROWS, ALONG, SHARED, TABLE = range(10)
MATRIX = 10

INT8, FP8, INT4_FLOAT16, INT4_BFLOAT16, MXFP4, NVFP4 = range(6)

ENTRIES = 16
"""What a scale has in a table: a number for each code of 4 bits."""

SPAN = 64
"""Most chunks of a row that are decoded at once."""

APART = 4 * SPAN
"""Bytes from one row's scales to the next one's, where they are written out."""

ROOM = 2 * 256 * ENTRIES
"""Bytes of a table for one matrix, or of the scales of 32 rows."""

LINE = 32
"""Numbers of 16 bits that caches fetch at once."""

MOST_POINT = 16
"""The largest zero point."""

BYTES_APART = not {"avx512f", "avx512bw", "avx512vl"} <= features()
"""Whether a table has the low bytes of a scale's entries first, then the high ones, as AVX2 looks them up."""


@njit(cache=True, nogil=True)
def row_of(matrix, depth, row):
    """Where a row's codes begin, and the bytes of one."""
    size = depth if matrix[CODE] in (INT8, FP8) else depth // 2
    return matrix[CODES] + size * row, size


@functools.cache
def suit(format: QuantisedFormat, width: int, hidden: int) -> bool:
    """Whether experts [width, hidden] of a format can be computed by compiled loops."""
    return None not in (facts_of(format, hidden, width), facts_of(format, width, hidden))


@functools.cache
def facts_of(format: QuantisedFormat, rows: int, depth: int) -> tuple[int, ...] | None:
    """Returns CODE to TABLE of matrices [rows, depth]; None where they cannot be read by chunks."""
    encoding = format.encoding
    if depth % CHUNK:
        return None
    if isinstance(encoding, Int8):
        return INT8, depth, 1, 1, 0, 0
    if isinstance(encoding, Fp8):
        high, wide = encoding.block(rows, depth)
        along = -(-depth // wide)
        return None if along > 1 and wide % CHUNK else (FP8, wide, high, along, 0, 0)
    if isinstance(encoding, Nvfp4):
        return NVFP4, CHUNK // 2, 1, depth // (CHUNK // 2), 0, 0
    table = table_of(encoding)
    address = 0 if table is None else table.ctypes.data
    if isinstance(encoding, Int4):
        shared = (encoding.group // CHUNK).bit_length() - 1
        if depth % encoding.group or encoding.group != CHUNK << shared:
            return None
        code = INT4_FLOAT16 if encoding.scale == "float16" else INT4_BFLOAT16
        return code, encoding.group, 1, depth // encoding.group, shared, address
    if isinstance(encoding, Mxfp4):
        return MXFP4, CHUNK, 1, depth // CHUNK, 0, address
    return None


@functools.cache
def table_of(encoding: Encoding) -> np.ndarray | None:
    """Returns what codes of 4 bits stand for with each possible scale, as bits of bfloat16.

    Rounding a few numbers once is cheaper than rounding all weights whenever they are read.

    Returns:
        [S, ENTRIES] of S possible scales. With zero points [S, 2 * ENTRIES]: the numbers that stand for
        -MOST_POINT and more, without one. None of 8 bits, and of NVFP4, as each of its matrices has another
        scale beside. With `BYTES_APART` the bytes of a row are in that order.
    """
    if isinstance(encoding, Int4):
        kind = np.float16 if encoding.scale == "float16" else ml_dtypes.bfloat16
        scales = np.arange(1 << 16, dtype=np.uint16).view(kind).astype(np.float32)
        first = -MOST_POINT if encoding.zeros else -ENTRIES // 2
        values = np.arange(first, first + ENTRIES * (1 + encoding.zeros), dtype=np.float32)
    elif isinstance(encoding, Mxfp4):
        scales, values = e8m0(np.arange(256, dtype=np.uint8)), E2M1_VALUES
    else:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = (values * scales[:, None]).astype(ml_dtypes.bfloat16).view(np.uint16)
    if BYTES_APART:
        pairs = numbers.view(np.uint8).reshape(*numbers.shape, 2)
        numbers = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(len(numbers), -1).view(np.uint16)
    # From where a line of the caches begins, so that none of 16 entries lie in two.
    memory = np.empty(numbers.size + LINE, np.uint16)
    first = -memory.ctypes.data % (2 * LINE) // 2
    table = memory[first : first + numbers.size].reshape(numbers.shape)
    table[:] = numbers
    return table
