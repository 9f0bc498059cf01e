"""Arithmetic of compiled loops: addresses, bfloat16 and its rounding, `exp` and `silu`.

bfloat16 comes as its 16 bits: of activations as uint16; of weights as uint16, or as int16 where they are
multiplied in pairs (`dots.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from layerscope_jax.support.njit import njit


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer that `carray` takes."""

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def taken(typing: Any, counter: Any) -> Any:
    """The next number of a counter that threads share, given its address."""

    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), build


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def bits_of(typing: Any, number: Any) -> Any:
    """The bits of a float32."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


def widened(word):
    """A weight or input as float32; bfloat16 comes as its 16 bits."""


@overload(widened)
def _widened(word):
    if word in (types.uint16, types.int16):
        return lambda word: float_of(np.uint32(word) << np.uint32(16))
    return lambda word: word


def rounded(number, kind):
    """A float32 to the nearest value of the type of the array `kind`, ties to even."""


@overload(rounded)
def _rounded(number, kind):
    if kind.dtype is types.uint16:

        def nearest(number, kind):
            bits = bits_of(number)
            return np.uint16(
                (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )

        return nearest
    if kind.dtype is types.uint32:

        def widened_again(number, kind):
            bits = bits_of(number)
            nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            return nearest & np.uint32(0xFFFF0000)

        return widened_again
    return lambda number, kind: number


def as_float32(kind: Any) -> Any:
    """Whether the array `kind` is of float32, whose numbers are not rounded."""


@overload(as_float32)
def _as_float32(kind):
    answer = kind.dtype is types.float32
    return lambda kind: answer


# e^x = 2^n e^r with |r| <= ln 2 / 2, and a polynomial for e^r (as in Cephes' expf): the library's function is
# called number by number. ROUND's last bit counts ones.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND, LOWEST, HIGHEST, ONE = np.float32(1.5 * 2**23), np.float32(-87), np.float32(88), np.float32(1)
P0, P1, P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
P3, P4, P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


@njit(cache=True, nogil=True, fastmath={"contract"})
def exp(x):
    """`e^x` of a float32, in steps that the compiler takes for many numbers at once."""
    if x < LOWEST:
        x = LOWEST
    if x > HIGHEST:
        x = HIGHEST
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ((((P0 * r + P1) * r + P2) * r + P3) * r + P4) * r + P5
    power = float_of((bits_of(shifted) + np.uint32(127)) << np.uint32(23))
    return (p * r * r + r + ONE) * power


# With Python's way of dividing, which raises, the compiler makes no vectors.
@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def silu(x):
    """`x / (1 + e^-x)` of a float32."""
    return x / (ONE + exp(-x))


@njit(cache=True, nogil=True)
def round_row(sums, outputs):
    """Sums in the type of `outputs`. Of an index that may be negative the compiler makes no vectors."""
    for d in range(np.uint64(len(outputs))):
        outputs[d] = rounded(sums[d], outputs)


def as_input(word: Any, weights: Any) -> Any:
    """An activation in the form in which products with an array of weights take it (`dots.py`)."""


@overload(as_input)
def _as_input(word, weights):
    if weights.dtype is types.int16:
        return lambda word, weights: word
    return lambda word, weights: widened(word)


def room(tokens: int, width: int, weights: Any) -> Any:
    """[tokens, width and more] of activations in that form, which begin where a line of the caches does.

    Were a row a multiple of a page, caches would confuse what lies in the same place of several rows. Were
    registers read across two lines each, products of many tokens would take a sixth to a third longer.
    """


@overload(room)
def _room(tokens, width, weights):
    dtype, size = (np.int16, 2) if weights.dtype is types.int16 else (np.float32, 4)
    line = 64 // size

    def allocate(tokens, width, weights):
        count = tokens * (width + line)
        memory = np.empty(count + line, dtype)
        first = -memory.ctypes.data % 64 // size
        return memory[first : first + count].reshape(tokens, width + line)

    return allocate
