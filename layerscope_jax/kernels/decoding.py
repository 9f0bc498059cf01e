"""What packed weights stand for, written where products read it: for any CPU, in loops that LLVM vectorises.

On CPUs with AVX-512 `wide_decoding` does the same several times as fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from layerscope_jax.kernels import wide_decoding
from layerscope_jax.kernels.encodings import (
    APART,
    CHUNK,
    CODE,
    DEPTH,
    FP8,
    INT4,
    INT8,
    NVFP4,
    SPAN,
    THIRD,
    of_e4m3,
    row_of,
)
from layerscope_jax.kernels.numbers import pointer, rounded
from layerscope_jax.support.njit import njit


@njit(cache=True, nogil=True, inline="always")
def of_e2m1(code):
    """The float32 of an E2M1 number, which comes as its code in int32."""
    size = code & np.int32(7)
    twice = size if size < 4 else 2 * size - 4 if size < 6 else 4 * size - 16
    number = np.float32(np.int32(twice)) * np.float32(0.5)
    return -number if code & np.int32(8) else number


@njit(cache=True, nogil=True)
def decode_anywhere(matrix, first, rows, k, chunks, scales, to, far, apart, kind):
    """Writes what chunks of some rows of a matrix stand for, from column `k` on.

    Args:
        matrix: [MATRIX] of it.
        chunks: at most `SPAN`.
        scales: address of their scales (`encodings.write_scales`).
        to: address of the first number.
        far: bytes from one row to the next.
        apart: bytes from one chunk to the next.
        kind: an array of the type that is written: float32, or bfloat16 as its bits.
    """
    code, zeros = matrix[CODE], matrix[THIRD] != 0
    at, size = row_of(matrix, matrix[DEPTH], first)
    wide = CHUNK * size // matrix[DEPTH]  # bytes of a chunk
    at += k // CHUNK * wide
    for row in range(rows):
        line = carray(pointer(scales + 4 * APART * row), APART, np.float32)
        for chunk in range(chunks):
            codes = carray(pointer(at + size * row + wide * chunk), CHUNK, np.uint8)
            out = carray(pointer(to + far * row + apart * chunk), CHUNK, kind.dtype)
            scale = line[chunk]
            if code == INT8:
                for index in range(np.uint64(CHUNK)):
                    out[index] = rounded(np.float32(np.int8(codes[index])) * scale, kind)
            elif code == FP8:
                for index in range(np.uint64(CHUNK)):
                    out[index] = rounded(of_e4m3(np.uint32(codes[index])) * scale, kind)
            elif code == INT4:
                point = np.float32(8) if not zeros else line[SPAN + chunk]
                for index in range(np.uint64(CHUNK // 2)):
                    pair = np.int32(codes[index])
                    low, high = np.float32(pair & np.int32(15)), np.float32(pair >> np.int32(4))
                    out[2 * index] = rounded((low - point) * scale, kind)
                    out[2 * index + np.uint64(1)] = rounded((high - point) * scale, kind)
            else:
                upper = scale
                if code == NVFP4:
                    scale, upper = line[2 * chunk], line[2 * chunk + 1]
                for index in range(np.uint64(CHUNK // 2)):
                    factor = scale if index < np.uint64(CHUNK // 4) else upper
                    pair = np.int32(codes[index])
                    low, high = of_e2m1(pair), of_e2m1(pair >> np.int32(4))
                    out[2 * index] = rounded(low * factor, kind)
                    out[2 * index + np.uint64(1)] = rounded(high * factor, kind)


decode: Any = wide_decoding.decode if wide_decoding.able() else decode_anywhere
