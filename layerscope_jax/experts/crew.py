"""Threads that help with a job inside a compiled program: outside of Python, they wait at semaphores.

A job is an array of int64, below, whose parts the threads take one after the other: experts, or columns of a
product. One job at a time has helpers; whoever comes meanwhile does its own alone.
"""

from __future__ import annotations

import ctypes
from threading import Thread
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from layerscope_jax.experts import amx, cpu, kernels
from layerscope_jax.experts.cpu import AMX, Kernel
from layerscope_jax.experts.numbers import pointer, taken
from layerscope_jax.experts.vectors import BYTE, INT, external
from layerscope_jax.njit import njit

# Of all jobs: what is to be done, in how many parts, and how many were taken; then what it reads and writes.
KIND, PARTS, TAKEN, INPUTS, WEIGHTS, OUTPUTS, ROWS, DEPTH, WIDTH = range(9)
# Of a product: columns of a part. Of experts: as `kernels.run_experts`; WEIGHTS are addresses, DEPTH is F.
COLUMNS = 9
FIRSTS, LASTS, ORDER, LENGTH, CHOICES = range(9, 14)
SIZE = 14
EXPERTS, FLOATS, WIDENED, PAIRS = range(4)

# What the threads share: how many help, for how many bytes of weights each, whether they are to end, how many
# have a job, the address of it; counts; then two semaphores for each helper, of 32 bytes.
HELPERS, WORTH, ENDED, BUSY, JOB, COUNTED, ASSIGNED, SEMAPHORES = range(8)
SEMAPHORE = 4


def words_of(kernel: Kernel, dtype: np.dtype) -> Any:
    """The type of the numbers that a kernel takes for those of `dtype`."""
    return kernel.words.type if dtype.itemsize == 2 else np.float32


def semaphore(name: str) -> Any:
    """One of libc's functions of a semaphore."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], BYTE.as_pointer())
        return builder.call(external(builder, name, INT, [place.type]), [place])

    return intrinsic(lambda typing, address: (types.int32(types.int64), build))


post, wait = semaphore("sem_post"), semaphore("sem_wait")


@njit(cache=True, nogil=True)
def wait_for(address):
    """Until it was posted: a signal may come before."""
    while wait(address) != 0:
        pass


@njit(cache=True, nogil=True)
def multiply(job, kind):
    """Columns of a product, of the type of `kind`."""
    x = carray(pointer(job[INPUTS]), (job[ROWS], job[DEPTH]), kind.dtype)
    weights = carray(pointer(job[WEIGHTS]), (job[DEPTH], job[WIDTH]), kind.dtype)
    outputs = carray(pointer(job[OUTPUTS]), (job[ROWS], job[WIDTH]), kind.dtype)
    while True:
        part = taken(job.ctypes.data + 8 * TAKEN)
        if part >= job[PARTS]:
            break
        first = part * job[COLUMNS]
        kernels.multiply(x, weights, outputs, first, min(first + job[COLUMNS], job[WIDTH]))


@njit(cache=True, nogil=True)
def multiply_by_kind(job):
    """A thread's share of a product."""
    if job[KIND] == FLOATS:
        multiply(job, np.zeros(1, np.float32))
    elif job[KIND] == WIDENED:
        multiply(job, np.zeros(1, np.uint16))
    else:
        multiply(job, np.zeros(1, np.int16))


@njit(cache=True, nogil=True)
def experts_by_loops(job, kind):
    """A thread's share of experts, by `kernels`, in numbers of the type of `kind`."""
    kernels.run_experts(
        carray(pointer(job[WEIGHTS]), (job[PARTS], 3), np.int64),
        carray(pointer(job[FIRSTS]), job[PARTS], np.int64),
        carray(pointer(job[LASTS]), job[PARTS], np.int64),
        carray(pointer(job[ORDER]), job[LENGTH], np.int64),
        job[CHOICES],
        job[INPUTS],
        job[DEPTH],
        carray(pointer(job[OUTPUTS]), (job[ROWS], job[WIDTH]), kind.dtype),
        job.ctypes.data + 8 * TAKEN,
    )


@njit(cache=True, nogil=True)
def experts_by_tiles(job, kind):
    """The same by `amx`."""
    firsts = carray(pointer(job[FIRSTS]), job[PARTS], np.int64)
    lasts = carray(pointer(job[LASTS]), job[PARTS], np.int64)
    memory = np.empty(amx.scratch_bytes(firsts, lasts, job[WIDTH], job[DEPTH]) + 64, np.uint8)
    amx.run_experts(
        carray(pointer(job[WEIGHTS]), (job[PARTS], 3), np.int64),
        firsts,
        lasts,
        carray(pointer(job[ORDER]), job[LENGTH], np.int64),
        job[CHOICES],
        job[INPUTS],
        job[DEPTH],
        carray(pointer(job[OUTPUTS]), (job[ROWS], job[WIDTH]), kind.dtype),
        job.ctypes.data + 8 * TAKEN,
        (memory.ctypes.data + 63) // 64 * 64,
    )
    memory[0] = 0  # Numba gives an array up after its last use


@njit(cache=True, nogil=True)
def help_by_loops(pool, number, kind):
    """What a helper does until the end, where experts are computed by `kernels`."""
    place = pool.ctypes.data + 8 * (SEMAPHORES + 2 * SEMAPHORE * number)
    while True:
        wait_for(place)
        if pool[ENDED]:
            break
        job = carray(pointer(pool[JOB]), SIZE, np.int64)
        if job[KIND] == EXPERTS:
            experts_by_loops(job, kind)
        else:
            multiply_by_kind(job)
        post(place + 8 * SEMAPHORE)


@njit(cache=True, nogil=True)
def help_by_tiles(pool, number, kind):
    """The same by `amx`: apart, as other CPUs cannot even compile it."""
    place = pool.ctypes.data + 8 * (SEMAPHORES + 2 * SEMAPHORE * number)
    while True:
        wait_for(place)
        if pool[ENDED]:
            break
        job = carray(pointer(pool[JOB]), SIZE, np.int64)
        if job[KIND] == EXPERTS:
            experts_by_tiles(job, kind)
        else:
            multiply_by_kind(job)
        post(place + 8 * SEMAPHORE)


@intrinsic
def add_at(typing: Any, address: Any, number: Any) -> Any:
    """Adds to a number that threads share; what it was before."""

    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


@njit(cache=True, nogil=True)
def begin(pool, job, size):
    """Gives a job worth reading `size` bytes to helpers: to how many; -1 where none is worth it or free."""
    helpers = min(pool[HELPERS], job[PARTS] - 1, size // pool[WORTH] - 1)
    if helpers < 1:
        return -1
    if add_at(pool.ctypes.data + 8 * BUSY, 1) != 0:
        add_at(pool.ctypes.data + 8 * BUSY, -1)
        return -1
    pool[JOB] = job.ctypes.data
    for number in range(helpers):
        post(pool.ctypes.data + 8 * (SEMAPHORES + 2 * SEMAPHORE * number))
    return helpers


@njit(cache=True, nogil=True)
def end(pool, helpers):
    """Waits until they are done."""
    for number in range(helpers):
        wait_for(pool.ctypes.data + 8 * (SEMAPHORES + SEMAPHORE * (2 * number + 1)))
    if helpers > 0:
        add_at(pool.ctypes.data + 8 * BUSY, -1)


class Crew:
    """Threads that help until they are closed.

    Args:
        count: beside whoever has the job.
        kernel: by which experts are computed.
        kind: an array of the type of their numbers.

    Attributes:
        pool: what they share.
    """

    def __init__(self, count: int, kernel: Kernel, kind: np.ndarray):
        self.pool = np.zeros(SEMAPHORES + 2 * SEMAPHORE * count, np.int64)
        self.pool[[HELPERS, WORTH]] = count, cpu.SHARE_BYTES
        first = self.pool.ctypes.data + 8 * SEMAPHORES
        self._semaphores = [first + 8 * SEMAPHORE * index for index in range(2 * count)]
        for one in self._semaphores:
            ctypes.CDLL(None).sem_init(ctypes.c_void_p(one), 0, 0)

        helping = help_by_tiles if kernel is AMX else help_by_loops
        self._threads = [
            Thread(target=helping, args=(self.pool, n, kind), name=f"layerscope-crew_{n}", daemon=True)
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def check_open(self) -> None:
        """Raises a ValueError if it was closed: nobody would help."""
        if self.pool[ENDED]:
            raise ValueError("the engine was closed, and the threads that compute with it; make a new Engine")

    def close(self) -> None:
        """Ends the threads."""
        self.pool[ENDED] = 1
        for one in self._semaphores[::2]:
            ctypes.CDLL(None).sem_post(ctypes.c_void_p(one))
        for thread in self._threads:
            thread.join()
