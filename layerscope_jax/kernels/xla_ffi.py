"""XLA's foreign function interface, by which it calls compiled functions at their place in a program.

Its binary form is stable (`xla/ffi/api/c_api.h`): a call is a structure, read here at fixed distances, and
only after its sizes and kinds were compared with what is expected.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from layerscope_jax.kernels.numbers import pointer
from layerscope_jax.support import target
from layerscope_jax.support.njit import cfunc, njit

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
FLAG, INT32, UINT32, FLOAT32, BFLOAT16 = 1, 4, 8, 11, 16

MAJOR, MINORS = 0, range(1, 4)
"""Versions of the interface whose structures were compared with those above; later ones are tried first."""

TABLE = 2
"""Fewest numbers of a table, the last argument of every call: an address of 64 bits (`Inside.table`)."""


class Unavailable(Exception):
    """Why XLA cannot call a function."""


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
    told = carray(pointer(long_at(extension + METADATA) + VERSION), 2, np.int32)
    told[0], told[1] = version >> 32, version & 0xFFFFFFFF
    return True


@njit(cache=True, nogil=True)
def description(call, buffers, index):
    """Address of the structure that describes one of a call's arguments or results."""
    return long_at(long_at(call + buffers) + 8 * index)


@njit(cache=True, nogil=True)
def buffer(call, buffers, index):
    """Address of the numbers, and of the sizes, of one of a call's arguments or results."""
    found = description(call, buffers, index)
    return long_at(found + DATA), long_at(found + SIZES)


@njit(cache=True, nogil=True)
def fits(call, kind):
    """Whether a call has arguments and results at all: inputs of a type first, a table last, results of the type.

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
        one = description(call, begin, at)
        if long_at(one) < BUFFER:
            return False
        if index == number - 1:
            if (
                int_at(one + TYPE) != UINT32
                or long_at(one + RANK) != 1
                or long_at(long_at(one + SIZES)) < TABLE
            ):
                return False
        elif (index == 0 or index >= number) and int_at(one + TYPE) != kind:
            return False
    return True


LETTERS = 8
"""Sizes that a layout may name."""


def layout(arguments: str, results: str) -> np.ndarray:
    """What a call's arguments, but for the table, and results must be, for `matches`.

    Args:
        arguments: a type and sizes each: "x T D, int32 T K". `x` is the type of the first one. A letter stands for
            the same size wherever it is.
        results: in the same way.

    Returns:
        [N, 2 + ranks] int64: of each whether it is a result, its type (0 for `x`), and its sizes by the places
        of their letters in the alphabet of the layout, -1 where there are no more.
    """
    types_of = {"x": 0, "int32": INT32, "flag": FLAG, "float32": FLOAT32}
    parts = [(0, one.split()) for one in arguments.split(",")] + [
        (1, one.split()) for one in results.split(",")
    ]
    letters = sorted({letter for _, (_, *sizes) in parts for letter in sizes})
    assert len(letters) <= LETTERS
    found = np.full((len(parts), 6), -1, np.int64)
    for row, (is_result, (kind, *sizes)) in zip(found, parts, strict=True):
        row[:2] = is_result, types_of[kind]
        row[2 : 2 + len(sizes)] = [letters.index(letter) for letter in sizes]
    return found


@njit(cache=True, nogil=True)
def matches(call, expected):
    """Whether a call that `fits` has the layout; and the sizes of the letters, in their order."""
    sizes, number = np.full(LETTERS, -1, np.int64), 0
    for index in range(len(expected)):
        number += 1 - expected[index, 0]
    if long_at(call + ARGUMENTS_NUMBER) != number + 1 or long_at(call + NUMBER) != len(expected) - number:
        return False, sizes
    for index in range(len(expected)):
        one = (
            description(call, ARGUMENTS, index)
            if index < number
            else description(call, RESULTS, index - number)
        )
        kind = expected[index, 1] if expected[index, 1] else int_at(description(call, ARGUMENTS, 0) + TYPE)
        rank = long_at(one + RANK)
        if int_at(one + TYPE) != kind or rank > 4 or (rank < 4 and expected[index, 2 + rank] >= 0):
            return False, sizes
        for axis in range(rank):
            letter, size = expected[index, 2 + axis], long_at(long_at(one + SIZES) + 8 * axis)
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


@intrinsic
def ask_at(typing: Any, function: Any, argument: Any) -> Any:
    """What the C function at an address answers to an address."""

    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.int64, types.int64), build


@njit(cache=True, nogil=True)
def refuse(call, message):
    """An error of XLA's for a call, with the text at an address."""
    request = np.zeros(4, np.int64)
    request[0], request[2], request[3] = 32, message, INVALID_ARGUMENT
    found = ask_at(long_at(long_at(call + INTERFACE) + MAKES_ERROR), request.ctypes.data)
    request[0] = 0  # kept until here
    return found


_handlers: list[Any] = []
"""Compiled functions and texts: XLA, or they, know their addresses alone."""


@functools.cache
def entry(compute: Callable, accepts: Callable) -> Any:
    """A C function: what a function that XLA knows does with a call, given the rest of `register`'s facts.

    It knows no address, and so is kept from process to process.
    """

    @cfunc(types.int64(*[types.int64] * 6), cache=True)
    def enter(call, do, size, kind, message, version):
        if asks_version(call, version):
            return np.int64(0)
        if not fits(call, kind) or not accepts(call):
            return refuse(call, message)
        compute(call, do, size)
        return np.int64(0)

    return enter


@intrinsic
def enter_at(
    typing: Any, function: Any, call: Any, do: Any, size: Any, kind: Any, message: Any, version: Any
) -> Any:
    """What an `entry` at an address answers."""

    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)] * 6)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 7), build


_registering = threading.Lock()
"""XLA takes a name once: threads that trace at the same time are not to give it one twice."""

_known: dict[str, str | None] = {}
"""Names that XLA was asked to take, and why it, or numba, could not; None where it has."""


def register(
    name: str, compute: Callable, share: Callable[[], Any], dtype: np.dtype, accepts: Callable
) -> str:
    """Lets XLA know a function under a name, once a process; returns the name.

    Args:
        compute: compiled: of a call, the address of a function and the bytes of a number.
        share: makes that function, of a thread's share of a job.
        dtype: of the first argument and of results, float32 or bfloat16.
        accepts: compiled: whether a call that `fits` has the arguments that `compute` reads. XLA gets an error
            for one that does not.

    Raises:
        Unavailable: if XLA does not take it, or if it cannot be compiled, with the reason.
    """
    with _registering:
        if name not in _known:
            try:
                _register(name, compute, share, dtype, accepts)
                _known[name] = None
            except Unavailable as error:
                _known[name] = str(error)
        reason = _known[name]
    if reason is not None:
        raise Unavailable(reason)
    return name


def _register(
    name: str, compute: Callable, share: Callable[[], Any], dtype: np.dtype, accepts: Callable
) -> None:
    refusal = target.refusal()
    if refusal is not None:
        raise Unavailable(refusal)
    major, minor = version_to_tell()
    text = ctypes.create_string_buffer(
        f"{name}: arguments of other types, ranks or sizes than it takes".encode()
    )
    message, kind, size = ctypes.addressof(text), FLOAT32 if dtype == np.float32 else BFLOAT16, dtype.itemsize
    told = major << 32 | minor
    try:
        do, enter = share().address, entry(compute, accepts).address

        @cfunc(types.int64(types.int64))
        def handler(call):  # compiled in each process, for the addresses in it
            return enter_at(
                np.int64(enter),
                call,
                np.int64(do),
                np.int64(size),
                np.int64(kind),
                np.int64(message),
                np.int64(told),
            )

    except Exception as error:  # whatever numba and LLVM raise
        raise Unavailable(f"{name}: {type(error).__name__}: {error}") from error
    _handlers.extend([handler, text])
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    try:
        jax.ffi.register_ffi_target(name, capsule(handler.address, b"xla._CUSTOM_CALL_TARGET", None), "cpu")
    except Exception as error:  # another version of the interface, or a JAX that registers otherwise
        raise Unavailable(f"XLA does not take {name}: {error}") from error


@functools.cache
def interface() -> tuple[int, int] | None:
    """Version of XLA's foreign function interface, by the header that comes with it; None without one."""
    try:
        text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    except (OSError, AttributeError):
        return None
    found = [
        re.search(rf"^#define XLA_FFI_API_{part} (\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR")
    ]
    numbers = [int(one[1]) for one in found if one is not None]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def version_to_tell() -> tuple[int, int]:
    """The version that functions are announced at: that of the installed header.

    Without a header it is the oldest known; XLA then says when it takes a function whether that fits.

    Raises:
        Unavailable: if the structures of that version are not known to be those read here.
    """
    version = interface()
    if version is None:
        return MAJOR, MINORS[0]
    if version[0] != MAJOR or version[1] not in MINORS:
        known = f"{MAJOR}.{MINORS[0]} to {MAJOR}.{MINORS[-1]}"
        raise Unavailable(f"XLA's interface is of version {version[0]}.{version[1]}, where {known} are known")
    return version
