"""Threads that help with a job inside a compiled program: outside of Python, they wait at semaphores.

A job is an array of int64, below, whose parts the threads take one after the other: experts, or columns of a
product. One job at a time has helpers; whoever comes meanwhile does its own alone.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from threading import Thread
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from layerscope_jax.kernels.numbers import float_of, pointer, taken
from layerscope_jax.kernels.vectors import BYTE, INT, LONG, external
from layerscope_jax.support import numa
from layerscope_jax.support.njit import cfunc, njit
from layerscope_jax.support.threads import PATIENCE_S

# Of all jobs: the address of a thread's share of it (`products`, `experts`), how many parts there
# are, and how many were taken; then what is read and written.
DO, PARTS, TAKEN, INPUTS, WEIGHTS, OUTPUTS, ROWS, DEPTH, WIDTH = range(9)
# Of products: columns and rows of a part, and how many parts these rows have; WEIGHTS are COUNT times an
# address of weights, their columns and the address of the outputs.
COLUMNS, HEIGHT, BESIDE, COUNT = range(9, 13)
# Of experts: as `loops.run_experts`; WEIGHTS are addresses, DEPTH is F, LIMIT the bits of a float32. Parts
# are sorted by NUMA nodes: STARTS says where those of each begin, COUNTERS how many of each were taken, NEAR
# which node each core belongs to.
FIRSTS, LASTS, ORDER, LENGTH, CHOICES, ACTIVATION, LIMIT, NODES, STARTS, COUNTERS, NEAR = range(9, 20)
SIZE = 21

# What the threads share: how many help, for how many bytes of weights each, whether they are to end, how many
# have a job, the address of it; counts; how many NUMA nodes there are, and where it is said which of them
# each core belongs to; then two semaphores for each helper, of 32 bytes.
HELPERS, WORTH, ENDED, BUSY, JOB, COUNTED, ASSIGNED, OF_NODES, OF_CORES, SEMAPHORES = range(10)
SEMAPHORE = 4

WORTH_BYTES = 1 << 18
"""Bytes of weights that make another thread's help worth while: some 20 us of reading."""

PATIENCE = 6000
"""Looks at a semaphore before a thread sleeps, some 150 us on a Zen 3: it is not to sleep within a step."""

NO_DENORMALS = 0x1F80 | 0x8000 | 0x0040
"""Of x86's register of floating point: no exceptions, results flushed to zero, and inputs taken for it."""

PAUSE = {"x86_64": "pause", "aarch64": "yield"}.get(platform.machine(), "")


def semaphore(name: str) -> Any:
    """One of libc's functions of a semaphore."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], BYTE.as_pointer())
        return builder.call(external(builder, name, INT, [place.type]), [place])

    return intrinsic(lambda typing, address: (types.int32(types.int64), build))


post, wait, try_wait = semaphore("sem_post"), semaphore("sem_wait"), semaphore("sem_trywait")


@intrinsic
def core(typing: Any) -> Any:
    """Number of the core that this thread runs on; negative where the system does not say."""

    def build(context, builder, signature, arguments):
        return builder.call(external(builder, "sched_getcpu", INT, []), [])

    return types.int32(), build


@intrinsic
def pause(typing: Any) -> Any:
    """Tells the CPU that this thread only looks."""

    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, PAUSE, "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), build


@njit(cache=True, nogil=True)
def wait_for(address):
    """Until it was posted; a signal may end a sleep before."""
    for _ in range(PATIENCE):
        if try_wait(address) == 0:
            return
        pause()
    while wait(address) != 0:
        pass


@njit(cache=True, nogil=True)
def part_of(job, matrices, part):
    """Of a part of products: which matrix, its first and last columns, and the first and last rows.

    Args:
        job: of products.
        matrices: [COUNT, ...] what each of WEIGHTS is.
    """
    top, first = part // job[BESIDE] * job[HEIGHT], part % job[BESIDE] * job[COLUMNS]
    end, matrix = min(top + job[HEIGHT], job[ROWS]), 0
    while first >= matrices[matrix, 1]:
        first -= (matrices[matrix, 1] + job[COLUMNS] - 1) // job[COLUMNS] * job[COLUMNS]
        matrix += 1
    return matrix, first, min(first + job[COLUMNS], matrices[matrix, 1]), top, end


@njit(cache=True, nogil=True)
def node_of(job):
    """The node of the core that this thread runs on, of those that experts belong to; 0 if none is known."""
    if job[NODES] == 1:
        return 0
    number, count = core(), carray(pointer(job[NEAR]), 1, np.int64)[0]
    if number < 0 or number >= count:
        return 0
    return carray(pointer(job[NEAR]), 1 + count, np.int64)[1 + number]


@functools.cache
def products(multiply: Any, rows: Any, weights_of: Any) -> Any:
    """A C function: a thread's share of products, for the address of a job.

    Args:
        multiply: compiled, as `loops.multiply`.
        rows: type of activations and outputs.
        weights_of: type of weights.
    """

    @cfunc(types.void(types.int64), cache=True)
    def run(address):
        job = carray(pointer(address), SIZE, np.int64)
        x = carray(pointer(job[INPUTS]), (job[ROWS], job[DEPTH]), rows)
        matrices = carray(pointer(job[WEIGHTS]), (job[COUNT], 3), np.int64)
        while True:
            part = taken(address + 8 * TAKEN)
            if part >= job[PARTS]:
                break
            matrix, first, last, top, end = part_of(job, matrices, part)
            width = matrices[matrix, 1]
            weights = carray(pointer(matrices[matrix, 0]), (width, job[DEPTH]), weights_of)
            outputs = carray(pointer(matrices[matrix, 2]), (job[ROWS], width), rows)
            multiply(x[top:end], weights, outputs[top:end], first, last)

    return run


@functools.cache
def experts(run_experts: Any, scratch_bytes: Any, arrays: int, rows: Any, weights_of: Any) -> Any:
    """The same of experts, by what an `AddressKernel` has compiled, each given by so many numbers."""

    @cfunc(types.void(types.int64), cache=True)
    def run(address):
        job = carray(pointer(address), SIZE, np.int64)
        firsts = carray(pointer(job[FIRSTS]), job[PARTS], np.int64)
        lasts = carray(pointer(job[LASTS]), job[PARTS], np.int64)
        addresses = carray(pointer(job[WEIGHTS]), (job[PARTS], arrays), np.int64)
        starts = carray(pointer(job[STARTS]), job[NODES] + 1, np.int64)
        memory = np.empty(scratch_bytes(firsts, lasts, job[WIDTH], job[DEPTH]) + 64, np.uint8)
        own = node_of(job)
        for step in range(job[NODES]):  # those of this thread's node, and then what others have left
            node = (own + step) % job[NODES]
            first, last = starts[node], starts[node + 1]
            run_experts(
                addresses[first:last],
                firsts[first:last],
                lasts[first:last],
                carray(pointer(job[ORDER]), job[LENGTH], np.int32),
                job[CHOICES],
                job[INPUTS],
                job[DEPTH],
                job[ACTIVATION],
                float_of(np.uint32(job[LIMIT])),
                carray(pointer(job[OUTPUTS]), (job[ROWS], job[WIDTH]), rows),
                carray(pointer(job[WEIGHTS]), 1, weights_of),  # of which the type alone counts
                job[COUNTERS] + 8 * node,
                (memory.ctypes.data + 63) // 64 * 64,
            )
        memory[0] = 0  # Numba gives an array up after its last use

    return run


@intrinsic
def do(typing: Any, job: Any) -> Any:
    """A thread's share of the job at an address: compiled once, it is called by its address too."""

    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [LONG])
        place = builder.inttoptr(arguments[0], LONG.as_pointer())
        builder.call(builder.inttoptr(builder.load(place), kind.as_pointer()), arguments)
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def flush_denormals(typing: Any) -> Any:
    """Makes this thread take numbers below 2^-126 for zero, as XLA's threads do, on x86.

    Otherwise what such numbers come to would depend on the thread that has them, and take ten times as long.
    """

    def build(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            place = builder.alloca(INT)
            builder.store(INT(NO_DENORMALS), place)
            address = builder.bitcast(place, BYTE.as_pointer())
            builder.call(external(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [address.type]), [address])
        return context.get_dummy_value()

    return types.void(), build


@njit(cache=True, nogil=True)
def serve(pool, number):
    """What a helper does until the end."""
    flush_denormals()
    place = pool.ctypes.data + 8 * (SEMAPHORES + 2 * SEMAPHORE * number)
    while True:
        wait_for(place)
        if pool[ENDED]:
            break
        do(pool[JOB])
        post(place + 8 * SEMAPHORE)


@intrinsic
def add_at(typing: Any, address: Any, number: Any) -> Any:
    """Adds to a number that threads share; what it was before."""

    def build(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


@njit(cache=True, nogil=True)
def share_out(pool, job, size):
    """Does a job that reads `size` bytes, with helpers where they are worth it and free."""
    address, busy = job.ctypes.data, pool.ctypes.data + 8 * BUSY
    helpers = max(0, min(pool[HELPERS], job[PARTS] - 1, size // pool[WORTH] - 1))
    if helpers > 0 and add_at(busy, 1) != 0:
        add_at(busy, -1)
        helpers = 0
    if helpers > 0:
        pool[JOB] = address
        for number in range(helpers):
            post(pool.ctypes.data + 8 * (SEMAPHORES + 2 * SEMAPHORE * number))
    do(address)
    for number in range(helpers):
        wait_for(pool.ctypes.data + 8 * (SEMAPHORES + SEMAPHORE * (2 * number + 1)))
    if helpers > 0:
        add_at(busy, -1)
    job[TAKEN] = len(job)  # kept until here


@njit(cache=True, nogil=True)
def retire(pool):
    """Ends the helpers' time: waits for the job that has them, and lets no other have them any more."""
    busy = pool.ctypes.data + 8 * BUSY
    while pool[ENDED] == 0:
        if add_at(busy, 1) == 0:
            pool[ENDED] = 1
        else:
            add_at(busy, -1)
            pause()


class Crew:
    """Threads that help until they are closed.

    Args:
        count: beside whoever has the job.

    Attributes:
        pool: what they share.
    """

    def __init__(self, count: int):
        self.pool = np.zeros(SEMAPHORES + 2 * SEMAPHORE * count, np.int64)
        self.pool[[HELPERS, WORTH]] = count, WORTH_BYTES
        self._cores = numa.by_core()
        self.pool[[OF_NODES, OF_CORES]] = max(1, len(numa.nodes())), self._cores.ctypes.data
        first = self.pool.ctypes.data + 8 * SEMAPHORES
        self._semaphores = [first + 8 * SEMAPHORE * index for index in range(2 * count)]
        for place in self._semaphores:
            ctypes.CDLL(None).sem_init(ctypes.c_void_p(place), 0, 0)

        def help_out(number: int) -> None:
            numa.join_node(number + 1)  # whoever has the job is the first
            serve(self.pool, number)

        self._threads = [
            Thread(target=help_out, args=(n,), name=f"layerscope-crew_{n}", daemon=True) for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def check_open(self) -> None:
        """Raises a ValueError if it was closed: nobody would help."""
        if self.pool[ENDED]:
            raise ValueError("the engine was closed, and the threads that compute with it; make a new Engine")

    def close(self) -> None:
        """Ends the threads, after the job that they are at. May be called again."""
        retire(self.pool)  # in one call, which no interrupt divides
        for place in self._semaphores[::2]:
            ctypes.CDLL(None).sem_post(ctypes.c_void_p(place))
        for thread in self._threads:
            thread.join(PATIENCE_S)
