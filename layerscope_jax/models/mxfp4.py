"""MXFP4 (OCP Microscaling Formats 1.0): 4-bit floating point numbers, 32 of which share a power of two."""

from __future__ import annotations

import numpy as np

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What each code stands for."""

BIAS = 127
"""A scale `s` stands for `2 ** (s - BIAS)`."""


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the numbers that packed ones stand for.

    Args:
        blocks: [..., N, 16] uint8: 32 codes a block, two a byte, the first of both in the low half.
        scales: [..., N] uint8.

    Returns:
        [..., N * 32] float32.

    >>> unpack(np.array([[0x21] + [0] * 15], np.uint8), np.array([128], np.uint8))[:3]
    array([1., 2., 0.], dtype=float32)
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1)  # [..., N, 16, 2]
    numbers = np.ldexp(VALUES[codes], (scales.astype(np.int32) - BIAS)[..., None, None])
    return numbers.astype(np.float32).reshape(*scales.shape[:-1], -1)
