"""Floating point numbers of 4 and 8 bits: what their codes stand for, and the codes nearest to a number.

E2M1, E4M3 and E8M0 of the OCP Microscaling Formats (MX) 1.0; E4M3 without infinities, as OCP's 8-bit floating
point (OFP8) has it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What each code of E2M1 stands for."""

E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
"""What each code of E4M3 stands for."""

E8M0_BIAS = 127
"""A code `s` of E8M0 stands for `2 ** (s - E8M0_BIAS)`."""


def e2m1(codes: Any) -> Any:
    """Returns what codes of E2M1 (uint8, below 16) stand for, in float32.

    >>> e2m1(np.array([1, 7, 10], np.uint8)), e2m1(jnp.array([1, 7, 10], jnp.uint8))
    (array([ 0.5,  6. , -1. ], dtype=float32), Array([ 0.5,  6. , -1. ], dtype=float32))
    """
    if not isinstance(codes, jax.Array):
        return E2M1_VALUES[codes]
    # By arithmetic, which XLA fuses with what follows; looking up takes a pass of its own.
    codes = codes.astype(jnp.int32)
    exponent, odd = (codes >> 1) & 3, codes & 1
    halves = jnp.where(exponent == 0, odd, (2 + odd) << jnp.maximum(exponent - 1, 0))
    values = halves.astype(jnp.float32) * jnp.float32(0.5)
    return jnp.where(codes >= 8, -values, values)


def e2m1_codes(values: np.ndarray) -> np.ndarray:
    """Returns the nearest codes of E2M1 (of two equally near, the even one), as uint8; saturates at 6."""
    sizes = np.minimum(np.abs(values), np.float32(LARGEST_E2M1))
    # The numbers lie 1/2 apart below 2, 1 apart below 4, and 2 apart above.
    codes = np.where(sizes < 4, np.rint(sizes) + 2, np.rint(sizes / 2) + 4)
    codes = np.where(sizes < 2, np.rint(2 * sizes), codes).astype(np.uint8)
    return codes | (np.signbit(values).view(np.uint8) << np.uint8(3))


def e4m3(codes: Any) -> Any:
    """Returns what codes of E4M3 (uint8) stand for, in float32.

    >>> e4m3(np.array([0x38, 0x7E], np.uint8)), e4m3(jnp.array([0x38, 0x7E], jnp.uint8))
    (array([  1., 448.], dtype=float32), Array([  1., 448.], dtype=float32))
    """
    if not isinstance(codes, jax.Array):
        return E4M3_VALUES[codes]
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def e4m3_codes(values: np.ndarray) -> np.ndarray:
    """Returns the nearest codes of E4M3 (of two equally near, the even one), as uint8; saturates at 448."""
    return np.clip(values, -LARGEST_E4M3, LARGEST_E4M3).astype(E4M3).view(np.uint8)


def e8m0(codes: Any) -> Any:
    """Returns what codes of E8M0 (uint8) stand for, in float32; the largest, which stands for no number,
    becomes infinity.

    >>> e8m0(np.array([127, 130, 126], np.uint8))
    array([1. , 8. , 0.5], dtype=float32)
    """
    smallest = 0x00400000  # 2 ** -127, a number with leading zeros in its fraction
    if not isinstance(codes, jax.Array):
        bits = codes.astype(np.int32) << 23
        return np.where(codes == 0, np.int32(smallest), bits).view(np.float32)
    bits = jnp.where(codes == 0, jnp.int32(smallest), codes.astype(jnp.int32) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
