"""What packed weights stand for, written where products read it, some rows at a time.

By registers of AVX-512 or AVX2 (`wide_decoding.py`), and on other CPUs by loops of which LLVM makes vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from layerscope_jax.formats.small_floats import E2M1_VALUES, E4M3_VALUES
from layerscope_jax.kernels import wide_codes, wide_decoding
from layerscope_jax.kernels.encodings import (
    ALONG,
    CHUNK,
    CODE,
    DEPTH,
    ENTRIES,
    FP8,
    INT4_BFLOAT16,
    INT4_FLOAT16,
    INT8,
    MXFP4,
    NVFP4,
    SCALES,
    SHARED,
    TABLE,
    THIRD,
    row_of,
)
from layerscope_jax.kernels.numbers import as_float32, float_of, pointer, rounded
from layerscope_jax.kernels.scales import prepare_rows
from layerscope_jax.kernels.tiles import ask
from layerscope_jax.support.njit import njit


@njit(cache=True, nogil=True)
def write_tables_anywhere(scales, to):
    """Writes `ENTRIES` bfloat16 for each of some scales, which the codes of 4 bits stand for."""
    words = carray(pointer(to), ENTRIES * len(scales), np.uint16)
    for code in range(len(scales)):
        for index in range(ENTRIES):
            words[ENTRIES * code + index] = rounded(E2M1_VALUES[index] * scales[code], words)


write_tables: Any = wide_decoding.write_tables if wide_codes.able() else write_tables_anywhere


@njit(cache=True, nogil=True)
def prepare_matrix(matrix, room, kind):
    """Writes the table of an NVFP4 matrix: of bfloat16, or for float32 its scales."""
    if matrix[CODE] != NVFP4:
        return
    whole = carray(pointer(matrix[THIRD]), 1, np.float32)[0]
    scales = carray(pointer(room), 256, np.float32) if as_float32(kind) else np.empty(256, np.float32)
    for code in range(np.uint64(256)):
        scales[code] = E4M3_VALUES[code] * whole
    if not as_float32(kind):
        write_tables(scales, room)
    matrix[TABLE] = room


@njit(cache=True, nogil=True)
def of_float16(bits):
    """The float32 of a float16, which comes as its bits in uint32."""
    size = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    number = float_of(size + np.uint32(112 << 23))
    if size < np.uint32(1 << 23):
        number = np.float32(np.int32(bits & np.uint32(0x3FF))) * np.float32(2.0**-24)
    if size >= np.uint32(31 << 23):
        number = float_of(size + np.uint32(224 << 23))
    return -number if bits & np.uint32(0x8000) else number


@njit(cache=True, nogil=True)
def of_e4m3(bits):
    """The same of an E4M3 number."""
    size = bits & np.uint32(0x7F)
    number = float_of((size << np.uint32(20)) + np.uint32(120 << 23))
    if size < np.uint32(8):
        number = np.float32(np.int32(size)) * np.float32(2.0**-9)
    if size == np.uint32(0x7F):
        number = np.float32(np.nan)
    return -number if bits & np.uint32(0x80) else number


@njit(cache=True, nogil=True)
def of_e8m0(bits):
    """The same of an E8M0 number; of 0, 2 ** -127, which has leading zeros in its fraction."""
    return float_of(max(bits << np.uint32(23), np.uint32(0x00400000)))


@njit(cache=True, nogil=True)
def of_e2m1(code):
    """The same of an E2M1 number, which comes as its code in int32."""
    size = code & np.int32(7)
    twice = size if size < 4 else 2 * size - 4 if size < 6 else 4 * size - 16
    number = np.float32(np.int32(twice)) * np.float32(0.5)
    return -number if code & np.int32(8) else number


@njit(cache=True, nogil=True)
def scale_of(matrix, row, index):
    """A 4-bit row's scale of a number, in float32."""
    code, at = matrix[CODE], matrix[ALONG] * row + index
    if code in (INT4_FLOAT16, INT4_BFLOAT16):
        bits = np.uint32(carray(pointer(matrix[SCALES] + 2 * at), 1, np.uint16)[0])
        return of_float16(bits) if code == INT4_FLOAT16 else float_of(bits << np.uint32(16))
    bits = np.uint32(carray(pointer(matrix[SCALES] + at), 1, np.uint8)[0])
    if code == MXFP4:
        return of_e8m0(bits)
    return of_e4m3(bits) * carray(pointer(matrix[THIRD]), 1, np.float32)[0]


@njit(cache=True, nogil=True)
def decode_anywhere(matrix, first, rows, k, chunks, scales, to, far, apart, ahead, beyond, kind):
    """Writes what chunks of some rows of a matrix stand for, from column `k` on.

    Args:
        matrix: [MATRIX] of it (`prepare_matrix`).
        chunks: at most `SPAN`.
        scales: as `prepare_rows` returns them.
        to: address of the first number.
        far: bytes from one row to the next.
        apart: bytes from one chunk to the next.
        ahead: address of what is to be asked for meanwhile, as many bytes for each row as it has.
        beyond: bytes from one row's to the next one's.
        kind: an array of the type that is written: float32, bfloat16 as its bits, or of uint32, bfloat16 as
            the bits of the same float32.
    """
    code, begin, half = matrix[CODE], k // CHUNK, np.uint64(CHUNK // 2)
    at, size = row_of(matrix, matrix[DEPTH], first)
    wide = CHUNK * size // matrix[DEPTH]  # bytes of a chunk
    where, along, shared, _ = scales
    for row in range(rows):
        for byte in range(0, wide * chunks, 64):
            ask(ahead + beyond * row + byte)
        for chunk in range(chunks):
            codes = carray(pointer(at + size * row + wide * (begin + chunk)), CHUNK, np.uint8)
            out = carray(pointer(to + far * row + apart * chunk), CHUNK, kind.dtype)
            if code in (INT8, FP8):
                place = where + along * row + 4 * ((begin + chunk) >> shared)
                scale = carray(pointer(place), 1, np.float32)[0]
            if code == INT8:
                for index in range(np.uint64(CHUNK)):
                    out[index] = rounded(np.float32(np.int8(codes[index])) * scale, kind)
                continue
            if code == FP8:
                for index in range(np.uint64(CHUNK)):
                    out[index] = rounded(of_e4m3(np.uint32(codes[index])) * scale, kind)
                continue
            if code in (INT4_FLOAT16, INT4_BFLOAT16):
                number, point = (begin + chunk) >> matrix[SHARED], np.float32(8)
                scale = scale_of(matrix, first + row, number)
                if matrix[THIRD] != 0:
                    place = matrix[THIRD] + matrix[ALONG] * (first + row) + number
                    point = np.float32(carray(pointer(place), 1, np.uint8)[0])
                for index in range(half):
                    pair = np.int32(codes[index])
                    low, high = np.float32(pair & np.int32(15)), np.float32(pair >> np.int32(4))
                    out[2 * index] = rounded((low - point) * scale, kind)
                    out[2 * index + np.uint64(1)] = rounded((high - point) * scale, kind)
                continue
            if code == MXFP4:
                scale = scale_of(matrix, first + row, begin + chunk)
                upper = scale
            else:
                scale = scale_of(matrix, first + row, 2 * (begin + chunk))
                upper = scale_of(matrix, first + row, 2 * (begin + chunk) + 1)
            for index in range(half):
                factor = scale if index < half // np.uint64(2) else upper
                pair = np.int32(codes[index])
                low, high = of_e2m1(pair), of_e2m1(pair >> np.int32(4))
                out[2 * index] = rounded(low * factor, kind)
                out[2 * index + np.uint64(1)] = rounded(high * factor, kind)


prepare: Any = wide_decoding.prepare if wide_codes.able() else prepare_rows
decode: Any = wide_decoding.decode if wide_codes.able() else decode_anywhere
