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

from layerscope_jax.kernels.cpu import say_it_is_slower
from layerscope_jax.kernels.numbers import pointer
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
ASKS_VERSION, MAJOR, MINOR = 1, 0, 1
IS_BUFFER, INVALID_ARGUMENT = 1, 3
FLAG, INT32, UINT32, FLOAT32, BFLOAT16 = 1, 4, 8, 11, 16

TABLE = 2
"""Fewest numbers of a table, the last argument of every call: an address of 64 bits (`Inside.table`)."""


@njit(cache=True, nogil=True)
def long_at(address):
    return carray(pointer(address), 1, np.int64)[0]


@njit(cache=True, nogil=True, inline="always")
def asks_version(call):
    """Whether XLA only wants to know which version of the interface this is; tells it."""
    extension = long_at(call + EXTENSION)
    if extension == 0 or carray(pointer(extension + KIND), 1, np.int32)[0] != ASKS_VERSION:
        return False
    version = carray(pointer(long_at(extension + METADATA) + VERSION), 2, np.int32)
    version[0], version[1] = MAJOR, MINOR
    return True


@njit(cache=True, nogil=True)
def buffer(call, buffers, index):
    """Address of the numbers, and of the sizes, of one of a call's arguments or results."""
    one = long_at(long_at(call + buffers) + 8 * index)
    return long_at(one + DATA), long_at(one + SIZES)


@njit(cache=True, nogil=True)
def int_at(address):
    return carray(pointer(address), 1, np.int32)[0]


@njit(cache=True, nogil=True)
def is_of(one, kind, rank):
    """Whether a buffer has numbers of a type, and as many sizes."""
    return int_at(one + TYPE) == kind and long_at(one + RANK) == rank


@njit(cache=True, nogil=True)
def fits(call, kind):
    """Whether a call is one: inputs of a type first, a table last, and results of the type.

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
        one = long_at(long_at(call + begin) + 8 * at)
        if long_at(one) < BUFFER:
            return False
        if index == number - 1:
            if not is_of(one, UINT32, 1) or long_at(long_at(one + SIZES)) < TABLE:
                return False
        elif (index == 0 or index >= number) and (int_at(one + TYPE) != kind or long_at(one + RANK) < 2):
            return False
    return True


@njit(cache=True, nogil=True)
def any_call(call):
    return True


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
    """A C function: what a function that XLA knows does with a call, given the rest of `target`'s facts.

    It knows no address, and so is kept from process to process.
    """

    @cfunc(types.int64(*[types.int64] * 5), cache=True)
    def enter(call, do, size, kind, message):
        if asks_version(call):
            return np.int64(0)
        if not fits(call, kind) or not accepts(call):
            return refuse(call, message)
        compute(call, do, size)
        return np.int64(0)

    return enter


@intrinsic
def enter_at(typing: Any, function: Any, call: Any, do: Any, size: Any, kind: Any, message: Any) -> Any:
    """What an `entry` at an address answers."""

    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)] * 5)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 6), build


_registering = threading.Lock()
"""XLA takes a name once: threads that trace at the same time are not to give it one twice."""


def target(
    name: str,
    compute: Callable,
    share: Callable[[Any], Any],
    words: Any,
    accepts: Callable = any_call,
) -> str | None:
    """Lets XLA know a function under a name; None if it does not take it, or if it cannot be compiled.

    Args:
        compute: of a call, the address of a function and the bytes of a number.
        share: that function, of a thread's share, of numbers of a type.
        words: the type.
        accepts: whether a call that `fits` has the arguments that `compute` reads. XLA gets an error for
            one that does not.
    """
    with _registering:
        return _registered(name, compute, share, words, accepts)


@functools.cache
def _registered(
    name: str, compute: Callable, share: Callable[[Any], Any], words: Any, accepts: Callable
) -> str | None:
    if not is_known(interface()):
        return None
    text = ctypes.create_string_buffer(
        f"{name}: arguments of other types, ranks or sizes than it takes".encode()
    )
    message, kind = ctypes.addressof(text), FLOAT32 if words == np.float32 else BFLOAT16
    try:
        do, size = share(words).address, np.dtype(words).itemsize
        enter = entry(compute, accepts).address

        @cfunc(types.int64(types.int64))
        def handler(call):  # compiled in each process, for the addresses in it
            return enter_at(
                np.int64(enter), call, np.int64(do), np.int64(size), np.int64(kind), np.int64(message)
            )

    except Exception as error:  # whatever numba and LLVM raise
        say_it_is_slower(f"{name}: {type(error).__name__}: {error}")
        return None
    _handlers.extend([handler, text])
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    try:
        jax.ffi.register_ffi_target(name, capsule(handler.address, b"xla._CUSTOM_CALL_TARGET", None), "cpu")
    except (RuntimeError, ValueError) as error:  # another version of the interface
        say_it_is_slower(f"XLA does not take {name}: {error}")
        return None
    return name


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


def is_known(version: tuple[int, int] | None) -> bool:
    """Whether XLA's structures are those read here; says so if not.

    A minor version adds to them. Without a header XLA is asked when it takes a function.
    """
    if version is None or (version[0] == MAJOR and version[1] >= MINOR):
        return True
    say_it_is_slower(
        f"XLA's interface is of version {version}, where {(MAJOR, MINOR)} or a later minor one is known"
    )
    return False
