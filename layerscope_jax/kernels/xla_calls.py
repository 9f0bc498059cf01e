"""What lies where in a call of XLA's: read at fixed distances, after sizes and kinds were compared.

The binary form of XLA's foreign function interface is stable (`xla/ffi/api/c_api.h`): a call is a structure,
whose parts say how long they are.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from layerscope_jax.kernels.numbers import pointer
from layerscope_jax.support.njit import njit

# Where in XLA's structures: a call's extension, interface, arguments and results, of both their number, the
# kind of each and the size of the structure that lies within the call; a buffer's size as a structure, type,
# numbers, rank and sizes; in the interface, how errors are made; in the extension that asks for the version
# of the interface, its kind and where to write the version.
EXTENSION, INTERFACE, ARGUMENTS, NUMBER, RESULTS = 8, 16, 72, 96, 112
ARGUMENTS_PART, ARGUMENTS_NUMBER, ARGUMENTS_KINDS, RESULTS_PART, RESULTS_KINDS = 40, 56, 64, 80, 104
PART, BUFFER = 40, 48
TYPE, DATA, RANK, SIZES = 16, 24, 32, 40
MAKES_ERROR = 48
KIND, METADATA, VERSION = 8, 24, 24
ASKS_VERSION = 1
IS_BUFFER, INVALID_ARGUMENT = 1, 3
FLAG, INT8, INT32, UINT8, UINT32, FLOAT16, FLOAT32, BFLOAT16 = 1, 2, 4, 6, 8, 10, 11, 16
TYPES = {
    "int8": INT8,
    "uint8": UINT8,
    "float16": FLOAT16,
    "float32": FLOAT32,
    "bfloat16": BFLOAT16,
}
"""Types of numbers that a function's first argument may have, by the names of their dtypes."""

TABLE = 2
"""Fewest numbers of a table, the last argument of every call: an address of 64 bits (`Inside.table`)."""


@njit(cache=True, nogil=True)
def long_at(address):
    return carray(pointer(address), 1, np.int64)[0]


@njit(cache=True, nogil=True)
def int_at(address):
    return carray(pointer(address), 1, np.int32)[0]


@njit(cache=True, nogil=True, inline="always")
def asks_version(call, version):
    """Whether XLA only wants to know which version of the interface this is; tells it.

    Args:
        version: major version times 2^32, plus the minor one.
    """
    extension = long_at(call + EXTENSION)
    if extension == 0 or int_at(extension + KIND) != ASKS_VERSION:
        return False
    version_at = carray(pointer(long_at(extension + METADATA) + VERSION), 2, np.int32)
    version_at[0], version_at[1] = version >> 32, version & 0xFFFFFFFF
    return True


@njit(cache=True, nogil=True)
def description(call, buffers, index):
    """Address of the structure that describes one of a call's arguments or results."""
    return long_at(long_at(call + buffers) + 8 * index)


@njit(cache=True, nogil=True)
def buffer(call, buffers, index):
    """Address of the numbers, and of the sizes, of one of a call's arguments or results."""
    result = description(call, buffers, index)
    return long_at(result + DATA), long_at(result + SIZES)


@njit(cache=True, nogil=True)
def fits(call, kind):
    """Whether a call has inputs of a type first, a table last, and results of the type.

    Nothing of a buffer but its description is read.
    """
    if long_at(call + ARGUMENTS_PART) != PART or long_at(call + RESULTS_PART) != PART:
        return False
    number, results = long_at(call + ARGUMENTS_NUMBER), long_at(call + NUMBER)
    if number < 3 or results < 1:
        return False
    for index in range(number + results):
        begin, kinds = (ARGUMENTS, ARGUMENTS_KINDS) if index < number else (RESULTS, RESULTS_KINDS)
        at = index if index < number else index - number
        if int_at(long_at(call + kinds) + 4 * at) != IS_BUFFER:
            return False
        item = description(call, begin, at)
        if long_at(item) < BUFFER:
            return False
        if index == number - 1:
            if (
                int_at(item + TYPE) != UINT32
                or long_at(item + RANK) != 1
                or long_at(long_at(item + SIZES)) < TABLE
            ):
                return False
        elif (index == 0 or index >= number) and int_at(item + TYPE) != kind:
            return False
    return True


LETTERS = 12
"""Sizes that a layout may name."""


def layout(arguments: str, results: str) -> np.ndarray:
    """What a call's arguments, but for the table, and results must be, for `matches`.

    Args:
        arguments: a type and sizes each: "x T D, int32 T K". `x` is the type of the first one. A letter
            stands for the same size wherever it is.
        results: in the same way.

    Returns:
        [N, 2 + 4] int64: of each whether it is a result, its type (0 for `x`), and its sizes, as places of
        their letters in alphabetical order; -1 where there are no more.

    >>> layout("x T D", "x T T").tolist()
    [[0, 0, 1, 0, -1, -1], [1, 0, 1, 1, -1, -1]]
    """
    codes = {"x": 0, "int32": INT32, "flag": FLAG, "float32": FLOAT32}
    parts = [(0, part.split()) for part in arguments.split(",")]
    parts += [(1, part.split()) for part in results.split(",")]
    letters = sorted({letter for _, (_, *sizes) in parts for letter in sizes})
    assert len(letters) <= LETTERS
    table = np.full((len(parts), 6), -1, np.int64)
    for row, (is_result, (kind, *sizes)) in zip(table, parts, strict=True):
        row[:2] = is_result, codes[kind]
        row[2 : 2 + len(sizes)] = [letters.index(letter) for letter in sizes]
    return table


@njit(cache=True, nogil=True)
def matches(call, expected):
    """Whether a call that `fits` has the layout; and the sizes of the letters, in their order."""
    sizes, number = np.full(LETTERS, -1, np.int64), 0
    for index in range(len(expected)):
        number += 1 - expected[index, 0]
    if long_at(call + ARGUMENTS_NUMBER) != number + 1 or long_at(call + NUMBER) != len(expected) - number:
        return False, sizes
    for index in range(len(expected)):
        item = (
            description(call, ARGUMENTS, index)
            if index < number
            else description(call, RESULTS, index - number)
        )
        kind = expected[index, 1] if expected[index, 1] else int_at(description(call, ARGUMENTS, 0) + TYPE)
        rank = long_at(item + RANK)
        if int_at(item + TYPE) != kind or rank > 4 or (rank < 4 and expected[index, 2 + rank] >= 0):
            return False, sizes
        for axis in range(rank):
            letter, size = expected[index, 2 + axis], long_at(long_at(item + SIZES) + 8 * axis)
            if letter < 0 or (sizes[letter] >= 0 and sizes[letter] != size):
                return False, sizes
            sizes[letter] = size
    return True, sizes


@njit(cache=True, nogil=True)
def within(call, index, count, most):
    """Whether the int32 numbers of an argument, `count` of them, all lie from 0 to `most`."""
    numbers, _ = buffer(call, ARGUMENTS, index)
    low = high = np.int32(0)
    for number in carray(pointer(numbers), count, np.int32):
        low, high = min(low, number), max(high, number)
    return low >= 0 and high <= most
