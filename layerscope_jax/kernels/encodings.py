"""Matrices of packed weights as compiled functions take them, and their scales, written out in float32.

A matrix is a row of numbers (`MATRIX`), so that one compiled loop reads every encoding.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import carray

from layerscope_jax.formats.fp8 import Fp8
from layerscope_jax.formats.int4 import Int4
from layerscope_jax.formats.int8 import Int8
from layerscope_jax.formats.mxfp4 import Mxfp4
from layerscope_jax.formats.nvfp4 import Nvfp4
from layerscope_jax.formats.quantised import QuantisedFormat
from layerscope_jax.kernels.numbers import float_of, pointer
from layerscope_jax.support.njit import njit

CHUNK = 32
"""Numbers of a row that are decoded at once."""

SPAN = 64
"""Most chunks of a row whose scales are written out at once."""

APART = 2 * SPAN
"""Floats from one row's scales to the next one's."""

# Of a matrix: addresses of codes, scales and what is third (zero points, or a scale of the whole); K; what the
# codes are, and the scales; columns and rows that share a scale; scales in a row.
CODES, SCALES, THIRD, DEPTH, CODE, SCALE, COLUMNS, ROWS, ALONG = range(9)
MATRIX = 9

INT8, FP8, INT4, MXFP4, NVFP4 = range(5)
FLOAT32, FLOAT16, BFLOAT16, E8M0, E4M3 = range(5)


@njit(cache=True, nogil=True)
def row_of(matrix, depth, row):
    """Where a row's codes begin, and the bytes of one."""
    size = depth if matrix[CODE] in (INT8, FP8) else depth // 2
    return matrix[CODES] + size * row, size


@njit(cache=True, nogil=True, inline="always")
def of_float16(bits):
    """The float32 of a float16, which comes as its bits in uint32."""
    size = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    number = float_of(size + np.uint32(112 << 23))
    if size < np.uint32(1 << 23):
        number = np.float32(np.int32(bits & np.uint32(0x3FF))) * np.float32(2.0**-24)
    if size >= np.uint32(31 << 23):
        number = float_of(size + np.uint32(224 << 23))
    return -number if bits & np.uint32(0x8000) else number


@njit(cache=True, nogil=True, inline="always")
def of_e4m3(bits):
    """The same of an E4M3 number."""
    size = bits & np.uint32(0x7F)
    number = float_of((size << np.uint32(20)) + np.uint32(120 << 23))
    if size < np.uint32(8):
        number = np.float32(np.int32(size)) * np.float32(2.0**-9)
    if size == np.uint32(0x7F):
        number = np.float32(np.nan)
    return -number if bits & np.uint32(0x80) else number


@njit(cache=True, nogil=True, inline="always")
def of_e8m0(bits):
    """The same of an E8M0 number; of 0, 2 ** -127, which has leading zeros in its fraction."""
    return float_of(max(bits << np.uint32(23), np.uint32(0x00400000)))


@njit(cache=True, nogil=True)
def scale_size(kind):
    """Bytes of a scale."""
    return 4 if kind == FLOAT32 else 2 if kind in (FLOAT16, BFLOAT16) else 1


@njit(cache=True, nogil=True)
def convert(kind, at, count, to):
    """Writes scales of a kind that lie side by side."""
    out = carray(pointer(to), count, np.float32)
    if kind == FLOAT32:
        out[:] = carray(pointer(at), count, np.float32)
        return
    if kind in (FLOAT16, BFLOAT16):
        words = carray(pointer(at), count, np.uint16)
        if kind == FLOAT16:
            for index in range(np.uint64(count)):
                out[index] = of_float16(np.uint32(words[index]))
        else:
            for index in range(np.uint64(count)):
                out[index] = float_of(np.uint32(words[index]) << np.uint32(16))
        return
    small = carray(pointer(at), count, np.uint8)
    if kind == E8M0:
        for index in range(np.uint64(count)):
            out[index] = of_e8m0(np.uint32(small[index]))
    else:
        for index in range(np.uint64(count)):
            out[index] = of_e4m3(np.uint32(small[index]))


@njit(cache=True, nogil=True)
def write_scales(matrix, first, rows, k, chunks, to):
    """Writes the scales of chunks of some rows, from column `k` on, in float32.

    Args:
        matrix: [MATRIX] of it.
        chunks: at most `SPAN`.
        to: address of [rows, APART]: of each chunk a scale, and `SPAN` behind it its zero point, where the
            matrix has them; or two scales of each chunk (NVFP4).
    """
    kind, columns, along = matrix[SCALE], matrix[COLUMNS], matrix[ALONG]
    size, zeros = scale_size(kind), matrix[CODE] == INT4 and matrix[THIRD] != 0
    for row in range(first, first + rows):
        at = matrix[SCALES] + size * along * (row // matrix[ROWS])
        line = carray(pointer(to + 4 * APART * (row - first)), APART, np.float32)
        points = carray(pointer(matrix[THIRD] + along * row if zeros else at), along, np.uint8)
        if columns <= CHUNK:
            count, begin = chunks * CHUNK // columns, k // columns
            convert(kind, at + size * begin, count, line.ctypes.data)
            if matrix[CODE] == NVFP4:
                whole = carray(pointer(matrix[THIRD]), 1, np.float32)[0]
                for index in range(np.uint64(count)):
                    line[index] *= whole
            if zeros:
                for index in range(count):
                    line[SPAN + index] = points[begin + index]
            continue
        begin = 0
        while begin < chunks:
            index = (k + CHUNK * begin) // columns
            end = min(chunks, (columns * (index + 1) - k) // CHUNK)
            convert(kind, at + size * index, 1, line[begin:].ctypes.data)
            line[begin:end] = line[begin]
            if zeros:
                line[SPAN + begin : SPAN + end] = points[index]
            begin = end


@functools.cache
def suit(format: QuantisedFormat, width: int, hidden: int) -> bool:
    """Whether experts [width, hidden] of a format can be computed by compiled loops."""
    return None not in (facts_of(format, hidden, width), facts_of(format, width, hidden))


def facts_of(format: QuantisedFormat, rows: int, depth: int) -> tuple[int, ...] | None:
    """Returns CODE to ALONG of matrices [rows, depth]; None where they cannot be read by chunks."""
    encoding = format.encoding
    if depth % CHUNK:
        return None
    if isinstance(encoding, Int8):
        return INT8, FLOAT32, depth, 1, 1
    if isinstance(encoding, Fp8):
        high, wide = encoding.block(rows, depth)
        along = -(-depth // wide)
        if along > 1 and wide % CHUNK:
            return None
        return FP8, FLOAT32, depth if along == 1 else wide, high, along
    if isinstance(encoding, Int4):
        group = encoding.group
        scale = FLOAT16 if encoding.scale == "float16" else BFLOAT16
        return None if depth % group else (INT4, scale, group, 1, depth // group)
    if isinstance(encoding, Mxfp4):
        return MXFP4, E8M0, CHUNK, 1, depth // CHUNK
    if isinstance(encoding, Nvfp4):
        return NVFP4, E4M3, CHUNK // 2, 1, depth // (CHUNK // 2)
    return None
