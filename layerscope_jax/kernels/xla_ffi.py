"""XLA's foreign function interface, by which it calls compiled functions at their place in a program."""

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
from numba import types
from numba.extending import intrinsic

from layerscope_jax.kernels.xla_calls import (
    INTERFACE,
    INVALID_ARGUMENT,
    MAKES_ERROR,
    TYPES,
    asks_version,
    fits,
    long_at,
)
from layerscope_jax.support import target
from layerscope_jax.support.njit import cfunc, njit

MAJOR, MINORS = 0, range(1, 4)
"""Versions of the interface whose structures were compared with those above; later ones are tried first."""


class Unavailable(Exception):
    """Why XLA cannot call a function."""


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
    result = ask_at(long_at(long_at(call + INTERFACE) + MAKES_ERROR), request.ctypes.data)
    request[0] = 0  # kept until here
    return result


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
        dtype: of the first argument and of results, one of `TYPES`.
        accepts: compiled: whether a call that `fits` has the arguments that `compute` reads. XLA gets an
            error for one that does not.

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
    version = version_to_tell()
    try:
        do = share().address
    except Exception as error:  # whatever numba and LLVM raise
        raise Unavailable(f"{name}: {type(error).__name__}: {error}") from error
    announce(name, compute, do, dtype, accepts, version)


def announce(
    name: str, compute: Callable, do: int, dtype: np.dtype, accepts: Callable, version: tuple[int, int]
) -> str:
    """Compiles the function of a name and gives it to XLA, as one for a version of the interface.

    Raises:
        Unavailable: if it cannot be compiled, or is not taken.
    """
    text = ctypes.create_string_buffer(
        f"{name}: arguments of other types, ranks or sizes than it takes".encode()
    )
    message, kind, size = ctypes.addressof(text), TYPES[dtype.name], dtype.itemsize
    told = version[0] << 32 | version[1]
    try:
        enter = entry(compute, accepts).address

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
    return name


@functools.cache
def interface() -> tuple[int, int] | None:
    """Version of XLA's foreign function interface, by the header that comes with it; None without one."""
    try:
        text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    except (OSError, AttributeError):
        return None
    result = [
        re.search(rf"^#define XLA_FFI_API_{part} (\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR")
    ]
    numbers = [int(item[1]) for item in result if item is not None]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def version_to_tell() -> tuple[int, int]:
    """The version that functions are announced at: that of the installed header.

    A minor version adds to the structures. Without a header it is the oldest known; XLA says, when it takes a
    function, whether that fits.

    Raises:
        Unavailable: if the structures of that version are not those read here.
    """
    version = interface()
    if version is None:
        return MAJOR, MINORS[0]
    if version[0] != MAJOR or version[1] < MINORS[0]:
        raise Unavailable(
            f"XLA's interface is of version {version[0]}.{version[1]}, where {MAJOR}.{MINORS[0]} or a later "
            "minor one is known"
        )
    if version[1] not in MINORS:
        try_out(version)
    return version


@functools.cache
def try_out(version: tuple[int, int]) -> None:
    """Lets XLA call a function that only looks at its arguments, at a version that nobody has compared.

    Raises:
        Unavailable: if it could not.
    """
    failures: list[BaseException] = []

    def call() -> None:
        try:
            name = announce(
                "layerscope_trial", looked_at, no_share().address, np.dtype(np.float32), any_call, version
            )
            row = jax.ShapeDtypeStruct((1, 1), np.float32)
            call = jax.ffi.ffi_call(name, row)
            jax.block_until_ready(
                call(np.ones((1, 1), np.float32), np.zeros(1, np.float32), np.zeros(2, np.uint32))
            )
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="layerscope-trial")  # which is at no tracing
    thread.start()
    thread.join()
    if failures:
        said = f"{type(failures[0]).__name__}: {failures[0]}"
        raise Unavailable(
            f"XLA's interface is of version {version[0]}.{version[1]}, and a trial failed: {said}"
        )


@njit(cache=True, nogil=True)
def looked_at(call, do, size):
    pass


@njit(cache=True, nogil=True)
def any_call(call):
    return True


@functools.cache
def no_share() -> Any:
    @cfunc(types.void(types.int64), cache=True)
    def nothing(job):
        pass

    return nothing
