"""Experts computed by our own loops inside a jitted program: a layer is no dispatch, no read-back, no Python.

XLA calls a compiled function at the place of a layer's experts, by its foreign function interface (its binary
form is stable, `xla/ffi/api/c_api.h`). Threads that wait at a semaphore, outside of Python, help it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

import jax
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from layerscope_jax.experts import amx, kernels
from layerscope_jax.experts import cpu as outside
from layerscope_jax.experts.cpu import AMX, CpuExperts, InMemory, Kernel
from layerscope_jax.experts.numbers import pointer

# What the threads of one engine share, int64: how many help, for how many bytes of weights each, whether they
# are to end, experts and assignments computed so far; then one job, the arguments of `kernels.run_experts`;
# then two semaphores for each helper.
HELPERS, WORTH, ENDED, EXPERTS, TOKENS = range(5)
COUNT, ADDRESSES, FIRSTS, LASTS, ORDER, LENGTH, CHOICES = range(5, 12)
INPUTS, HIDDEN, OUTPUTS, ROWS, WIDTH, TAKEN = range(12, 18)
SEMAPHORES, SEMAPHORE = 18, 4

# Where in XLA's structures: a call's extension, arguments and results; a buffer's numbers and sizes; in the
# extension that asks for the version of the interface, its kind and where to write the version.
EXTENSION, ARGUMENTS, RESULTS, DATA, SIZES = 8, 72, 112, 24, 40
KIND, METADATA, VERSION = 8, 24, 24
ASKS_VERSION, MAJOR, MINOR = 1, 0, 1


def semaphore(name: str) -> Any:
    """One of libc's functions of a semaphore."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(number, [byte]), name)
        return builder.call(function, [builder.inttoptr(arguments[0], byte)])

    return intrinsic(lambda typing, address: (types.int32(types.int64), build))


post, wait = semaphore("sem_post"), semaphore("sem_wait")


@njit(nogil=True)
def long_at(address):
    return carray(pointer(address), 1, np.int64)[0]


@njit(nogil=True)
def buffer(buffers, index):
    """Address of the numbers, and of the sizes, of one of a call's buffers."""
    one = long_at(buffers + 8 * index)
    return long_at(one + DATA), long_at(one + SIZES)


@njit(nogil=True)
def sort(experts, active, count, piece):
    """Slots by expert [A], as `Assignments`, and pieces of at most so many: [N] expert, first and last."""
    choices = experts.shape[1]
    starts = np.zeros(count + 1, np.int64)
    for token in range(len(experts)):
        if active[token]:
            for choice in range(choices):
                starts[experts[token, choice] + 1] += 1
    pieces = 0
    for expert in range(count):
        pieces += (starts[expert + 1] + piece - 1) // piece
        starts[expert + 1] += starts[expert]
    order, ends = np.empty(starts[count], np.int64), starts.copy()
    for token in range(len(experts)):
        if active[token]:
            for choice in range(choices):
                expert = experts[token, choice]
                order[ends[expert]] = token * choices + choice
                ends[expert] += 1
    whose, firsts, lasts = np.empty(pieces, np.int64), np.empty(pieces, np.int64), np.empty(pieces, np.int64)
    found = 0
    for expert in range(count):
        for first in range(starts[expert], starts[expert + 1], piece):
            whose[found], firsts[found] = expert, first
            lasts[found] = min(first + piece, starts[expert + 1])
            found += 1
    return order, whose, firsts, lasts


def words_of(kernel: Kernel, dtype: np.dtype) -> Any:
    """The type of the numbers that a kernel takes for those of `dtype`."""
    return kernel.words.type if dtype.itemsize == 2 else np.float32


@functools.cache
def compiled(kernel: Kernel, dtype: Any) -> tuple[Any, Callable]:
    """XLA's handler, and what a helper does until the end."""
    piece, size, by_amx = kernel.piece, np.dtype(dtype).itemsize, kernel is AMX
    run_loops, run_tiles, tiles_need = kernels.run_experts, amx.run_experts, amx.scratch_bytes
    if by_amx:

        @njit(nogil=True)
        def run(addresses, firsts, lasts, order, choices, inputs, hidden, outputs, counter):
            memory = np.empty(tiles_need(firsts, lasts, outputs.shape[1], hidden) + 64, np.uint8)
            scratch = (memory.ctypes.data + 63) // 64 * 64
            run_tiles(addresses, firsts, lasts, order, choices, inputs, hidden, outputs, counter, scratch)
            memory[0] = 0  # Numba gives an array up after its last use
    else:
        run = run_loops

    @njit(nogil=True)
    def work(pool):
        """This thread's share of the job."""
        count = pool[COUNT]
        run(
            carray(pointer(pool[ADDRESSES]), (count, 3), np.int64),
            carray(pointer(pool[FIRSTS]), count, np.int64),
            carray(pointer(pool[LASTS]), count, np.int64),
            carray(pointer(pool[ORDER]), pool[LENGTH], np.int64),
            pool[CHOICES],
            pool[INPUTS],
            pool[HIDDEN],
            carray(pointer(pool[OUTPUTS]), (pool[ROWS], pool[WIDTH]), dtype),
            pool.ctypes.data + 8 * TAKEN,
        )

    @njit("void(int64[::1], int64)", nogil=True)
    def help_until_the_end(pool, number):
        begin = pool.ctypes.data + 8 * (SEMAPHORES + 2 * SEMAPHORE * number)
        while True:
            while wait(begin) != 0:  # a signal came
                pass
            if pool[ENDED]:
                break
            work(pool)
            post(begin + 8 * SEMAPHORE)

    @njit(nogil=True)
    def compute(arguments, results):
        inputs, sizes = buffer(arguments, 0)
        width = long_at(sizes + 8)
        chosen, sizes = buffer(arguments, 1)
        tokens, choices = long_at(sizes), long_at(sizes + 8)
        flags, _ = buffer(arguments, 2)
        known, sizes = buffer(arguments, 3)
        count = (long_at(sizes) // 2 - 2) // 3
        table = carray(pointer(known), 2 + 3 * count, np.int64)
        pool = carray(pointer(table[0]), SEMAPHORES + 2 * SEMAPHORE * long_at(table[0]), np.int64)
        active = carray(pointer(flags), tokens, np.uint8)
        experts = carray(pointer(chosen), (tokens, choices), np.int32)
        order, whose, firsts, lasts = sort(experts, active, count, piece)
        addresses = np.empty((len(whose), 3), np.int64)
        for index in range(len(whose)):
            for matrix in range(3):
                addresses[index, matrix] = table[2 + 3 * whose[index] + matrix]
            if index == 0 or whose[index] != whose[index - 1]:
                pool[EXPERTS] += 1
        pool[TOKENS] += len(order)
        rows, _ = buffer(results, 0)
        outputs = carray(pointer(rows), (tokens * choices, width), dtype)
        for token in range(tokens):
            if not active[token]:  # nobody writes these
                outputs[token * choices : (token + 1) * choices] = 0
        pool[COUNT], pool[ADDRESSES], pool[FIRSTS] = len(firsts), addresses.ctypes.data, firsts.ctypes.data
        pool[LASTS], pool[ORDER], pool[LENGTH] = lasts.ctypes.data, order.ctypes.data, len(order)
        pool[CHOICES], pool[INPUTS], pool[HIDDEN] = choices, inputs, table[1]
        pool[OUTPUTS], pool[ROWS], pool[WIDTH], pool[TAKEN] = rows, tokens * choices, width, 0
        shares = min(len(firsts), 3 * width * table[1] * size * len(firsts) // pool[WORTH])
        helpers = max(0, min(pool[HELPERS], shares - 1))
        for number in range(helpers):
            post(pool.ctypes.data + 8 * (SEMAPHORES + 2 * SEMAPHORE * number))
        work(pool)
        for number in range(helpers):
            while wait(pool.ctypes.data + 8 * (SEMAPHORES + SEMAPHORE * (2 * number + 1))) != 0:
                pass
        # Numba gives an array up after its last use; the helpers had only their addresses.
        pool[LENGTH] = len(addresses) + len(firsts) + len(lasts) + len(order)

    @cfunc(types.int64(types.int64))
    def handler(call):
        extension = long_at(call + EXTENSION)
        if extension != 0 and carray(pointer(extension + KIND), 1, np.int32)[0] == ASKS_VERSION:
            version = carray(pointer(long_at(extension + METADATA) + VERSION), 2, np.int32)
            version[0], version[1] = MAJOR, MINOR
        else:
            compute(long_at(call + ARGUMENTS), long_at(call + RESULTS))
        return 0

    return handler, help_until_the_end


@functools.cache
def target(kernel: Kernel, dtype: Any) -> str | None:
    """The name by which XLA knows the handler; None if it does not take it."""
    name = f"layerscope_experts_{kernel.name}_{np.dtype(dtype).name}"
    handler, _ = compiled(kernel, dtype)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    try:
        jax.ffi.register_ffi_target(name, capsule(handler.address, b"xla._CUSTOM_CALL_TARGET", None), "cpu")
    except (RuntimeError, ValueError):  # another version of the interface
        return None
    return name


class Inside:
    """What a program needs to compute the experts of one model.

    Args:
        cpu: what would compute them outside: how, and by how many threads.
        dtype: of the experts.
        layers: every expert of every layer.

    Attributes:
        target: XLA's name for the function.
        tables: [layer][2 * (2 + 3 E)] uint32, int64 in two words each: where the shared memory is, F, and
            where each matrix lies.
    """

    def __init__(self, cpu: CpuExperts, dtype: np.dtype, layers: Sequence[Sequence[InMemory]]):
        assert cpu.kernel is not None
        words = words_of(cpu.kernel, dtype)
        found = target(cpu.kernel, words)
        assert found is not None
        self.target = found
        helpers = cpu.threads - 1
        self._pool = np.zeros(SEMAPHORES + 2 * SEMAPHORE * helpers, np.int64)
        self._pool[[HELPERS, WORTH]] = helpers, outside.SHARE_BYTES
        first = self._pool.ctypes.data + 8 * SEMAPHORES
        self._semaphores = [first + 8 * SEMAPHORE * index for index in range(2 * helpers)]
        libc = ctypes.CDLL(None)
        for one in self._semaphores:
            libc.sem_init(ctypes.c_void_p(one), 0, 0)
        self._layers = layers  # whose memory the tables name
        self.tables = []
        for experts in layers:
            addresses = np.frombuffer(b"".join(expert.addresses for expert in experts), np.int64)
            hidden = experts[0].arrays.gate.shape[1]
            table = np.array([self._pool.ctypes.data, hidden, *addresses], np.int64)
            self.tables.append(table.view(np.uint32))
        _, helping = compiled(cpu.kernel, words)
        self._threads = [
            Thread(target=helping, args=(self._pool, number), name=f"layerscope-inside_{number}", daemon=True)
            for number in range(helpers)
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def is_possible(cpu: CpuExperts, dtype: np.dtype) -> bool:
        """Whether this system and this version of XLA can."""
        if cpu.kernel is None or platform.system() != "Linux":
            return False
        return target(cpu.kernel, words_of(cpu.kernel, dtype)) is not None

    def take_counts(self) -> tuple[int, int]:
        """Experts and assignments computed since the last time."""
        found = int(self._pool[EXPERTS]), int(self._pool[TOKENS])
        self._pool[[EXPERTS, TOKENS]] = 0
        return found

    def check_open(self) -> None:
        """Raises a ValueError if it was closed: nobody would help."""
        if self._pool[ENDED]:
            raise ValueError("the engine was closed, and the threads that compute with it; make a new Engine")

    def close(self) -> None:
        """Ends the threads."""
        self._pool[ENDED] = 1
        for one in self._semaphores[::2]:
            ctypes.CDLL(None).sem_post(ctypes.c_void_p(one))
        for thread in self._threads:
            thread.join()
        self._semaphores = []


def rows(name: str, inputs: jax.Array, experts: jax.Array, active: jax.Array, table: jax.Array) -> jax.Array:
    """Unweighted rows of a layer's experts, inside a jitted program.

    Args:
        name: `Inside.target`.
        inputs: [T, D].
        experts: [T, K] int32.
        active: [T] bool: the rows of the others are zeros.
        table: of the layer.

    Returns:
        [T, K, D].
    """
    shape = jax.ShapeDtypeStruct((experts.size, inputs.shape[1]), inputs.dtype)
    found = jax.ffi.ffi_call(name, shape)(inputs, experts, active, table)
    return found.reshape(*experts.shape, -1)
