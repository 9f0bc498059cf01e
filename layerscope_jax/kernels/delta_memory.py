"""The memory of gated DeltaNet inside a jitted program: token by token, as it is defined.

Columns of a state do not depend on each other. So as many as fill some registers go through all tokens of a
row, one after the other, and stay in the nearest cache meanwhile. With a token's correction a row of the
state is written, and at once read for the token's query and the next one's key: the state is gone through
once a token. XLA's way for many tokens (`delta_net.scan`) takes as many multiplications, systems of equations
besides, and memory for both.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from layerscope_jax.kernels import crew
from layerscope_jax.kernels.inside import pool_at
from layerscope_jax.kernels.numbers import pointer, taken
from layerscope_jax.kernels.registry import Kernel, Work, built_in, choose
from layerscope_jax.kernels.strips import repeat
from layerscope_jax.kernels.vectors import LANES, LONG, NUMBERS, WIDE, add_product, everywhere, read
from layerscope_jax.kernels.xla_calls import ARGUMENTS, RESULTS, buffer, layout, long_at, matches
from layerscope_jax.kernels.xla_ffi import Unavailable, register
from layerscope_jax.support.njit import cfunc, njit

# Of a job (`crew`): INPUTS are queries, WEIGHTS keys, OUTPUTS what is read; ROWS are B, DEPTH is D_k, WIDTH
# D_v.
KEY_HEADS, HEADS, TOKENS, VALUES, LEFT, RATES, BEFORE, AFTER = range(9, 17)

MOST = 4 if WIDE else 2
"""Registers of a state's row that go through the tokens together. Each needs two more for its sums and one
for what is added, of the 32, or 16, that a CPU has."""

COLUMNS = MOST * LANES


def remembering(count: int) -> Any:
    """A function that takes so many registers of each row of a state through some tokens, at least one.

    It takes addresses, and distances in bytes from one row's or token's to the next one's: of the first row
    of the state, as it is found and as it is left, and rows; of a room for it meanwhile; tokens; of the first
    query and key; of the first value and of what is read; of what the first token leaves of the state, and of
    its rate.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before, state, row, depth, room, narrow, tokens, query, key, *others = arguments
        near, value, output, far, left, rate, apart = others
        registers, nothing = range(count), ir.Constant(NUMBERS, [0.0] * LANES)

        def at(begin: Any, distance: Any, times: Any) -> Any:
            return builder.add(begin, builder.mul(distance, times))

        def lanes(begin: Any, one: int) -> Any:
            return builder.add(begin, LONG(4 * LANES * one))

        def store(numbers: Any, place: Any) -> None:
            builder.store(numbers, builder.inttoptr(place, NUMBERS.as_pointer()), align=4)

        def corrected(token: Any, held: list[Any]) -> list[Any]:
            """What a token adds to where its key says, given what the state held there before it faded."""
            faded, share = (everywhere(builder, at(begin, apart, token)) for begin in (left, rate))
            values_at = at(value, far, token)
            values = [read(builder, lanes(values_at, one), NUMBERS, 4) for one in registers]
            pairs = zip(values, held, strict=True)
            return [builder.fmul(builder.fsub(new, builder.fmul(old, faded)), share) for new, old in pairs]

        def look(turn: Any, held: list[Any]) -> list[Any]:
            begin, number = at(before, row, turn), everywhere(builder, at(key, LONG(4), turn))
            rows = [read(builder, lanes(begin, one), NUMBERS, 4) for one in registers]
            return [add_product(builder, number, *pair) for pair in zip(rows, held, strict=True)]

        def take(token: Any, added: list[Any]) -> list[Any]:
            follows = builder.icmp_signed("<", builder.add(token, LONG(1)), tokens)
            after = builder.add(token, builder.zext(follows, LONG))
            faded = everywhere(builder, at(left, apart, token))
            begins = at(key, near, token), at(query, near, token), at(key, near, after)
            first, last = builder.icmp_signed("==", token, LONG(0)), builder.not_(follows)
            source, source_row = builder.select(first, before, room), builder.select(first, row, narrow)
            goal, goal_row = builder.select(last, state, room), builder.select(last, row, narrow)

            def write(turn: Any, sums: list[Any]) -> list[Any]:
                begin, end = at(source, source_row, turn), at(goal, goal_row, turn)
                says, asks, coming = (everywhere(builder, at(number, LONG(4), turn)) for number in begins)
                asked, held = [], []
                for one in registers:
                    kept = builder.fmul(read(builder, lanes(begin, one), NUMBERS, 4), faded)
                    kept = add_product(builder, says, added[one], kept)
                    store(kept, lanes(end, one))
                    asked.append(add_product(builder, asks, kept, sums[one]))
                    held.append(add_product(builder, coming, kept, sums[count + one]))
                return asked + held

            sums = repeat(builder, depth, [nothing] * (2 * count), write)
            output_at = at(output, far, token)
            for one in registers:
                store(sums[one], lanes(output_at, one))
            return corrected(after, sums[count:])

        held = repeat(builder, depth, [nothing] * count, look)
        repeat(builder, tokens, corrected(LONG(0), held), take)
        return context.get_dummy_value()

    def typed(typing, before, state, row, depth, room, narrow, tokens, query, key, n, v, o, f, w, r, a):
        return types.void(*[types.int64] * 16), build

    return intrinsic(typed)


remember_most, remember_one = remembering(MOST), remembering(1)


@njit(cache=True, nogil=True)
def remember_head(query, key, value, left, rate, before, after, read_of, room):
    """Takes one head of a row through its tokens, at least one, some columns at a time.

    Args:
        query, key: [S, D_k]; value, read_of: [S, D_v]; left, rate: [S].
        before, after: [D_k, D_v], which may be the same.
        room: [D_k, COLUMNS], for the columns: side by side they are all in the nearest cache.
    """
    depth, width = before.shape
    begin = 0
    while begin < width:
        columns = COLUMNS if begin + COLUMNS <= width else LANES
        arguments = (
            before.ctypes.data + 4 * begin,
            after.ctypes.data + 4 * begin,
            np.int64(before.strides[0]),
            np.int64(depth),
            room.ctypes.data,
            np.int64(room.strides[0]),
            np.int64(len(query)),
            query.ctypes.data,
            key.ctypes.data,
            np.int64(query.strides[0]),
            value.ctypes.data + 4 * begin,
            read_of.ctypes.data + 4 * begin,
            np.int64(value.strides[0]),
            left.ctypes.data,
            rate.ctypes.data,
            np.int64(left.strides[0]),
        )
        if columns == COLUMNS:
            remember_most(*arguments)
        else:
            remember_one(*arguments)
        begin += columns


@functools.cache
def heads() -> Any:
    """A C function: a thread's share of a job, as of `crew.products`."""

    @cfunc(types.void(types.int64), cache=True)
    def remember_heads(address):
        job = carray(pointer(address), crew.SIZE, np.int64)
        count, depth, width = job[crew.ROWS], job[crew.DEPTH], job[crew.WIDTH]
        tokens, number, of_keys = job[TOKENS], job[HEADS], job[KEY_HEADS]
        keys, values = (count, tokens, of_keys, depth), (count, tokens, number, width)
        query = carray(pointer(job[crew.INPUTS]), keys, np.float32)
        key = carray(pointer(job[crew.WEIGHTS]), keys, np.float32)
        value = carray(pointer(job[VALUES]), values, np.float32)
        read_of = carray(pointer(job[crew.OUTPUTS]), values, np.float32)
        left = carray(pointer(job[LEFT]), (count, tokens, number), np.float32)
        rate = carray(pointer(job[RATES]), (count, tokens, number), np.float32)
        before = carray(pointer(job[BEFORE]), (count, number, depth, width), np.float32)
        after = carray(pointer(job[AFTER]), (count, number, depth, width), np.float32)
        room = np.empty((depth, COLUMNS), np.float32)
        while True:
            part = taken(address + 8 * crew.TAKEN)
            if part >= job[crew.PARTS]:
                break
            row, head = part // number, part % number
            shared = head // (number // of_keys)
            remember_head(
                query[row, :, shared],
                key[row, :, shared],
                value[row, :, head],
                left[row, :, head],
                rate[row, :, head],
                before[row, head],
                after[row, head],
                read_of[row, :, head],
                room,
            )

    return remember_heads


_, VALUE_SIZE, OF_KEYS, KEY_SIZE, LENGTH, OF_VALUES = range(6)  # letters, in their order
MEMORY = layout("x B S H K, x B S H K, x B S V D, x B S V, x B S V, x B V K D", "x B S V D, x B V K D")


@njit(cache=True, nogil=True)
def fit_memory(call):
    """Whether a call that `fits` is one of `compute_memory`, with whole registers and shared key heads."""
    like, sizes = matches(call, MEMORY)
    if not like or sizes[OF_KEYS] < 1 or sizes[OF_VALUES] % sizes[OF_KEYS] != 0:
        return False
    return sizes[VALUE_SIZE] % LANES == 0 and sizes[LENGTH] > 0 and sizes[KEY_SIZE] > 0


@njit(cache=True, nogil=True)
def compute_memory(call, do, size):
    """Of the arguments of `delta_memory`, but for what is left in place of its logarithm, and the table last,
    into what is read, as values, and states."""
    query, sizes = buffer(call, ARGUMENTS, 0)
    key, _ = buffer(call, ARGUMENTS, 1)
    value, of_values = buffer(call, ARGUMENTS, 2)
    left, _ = buffer(call, ARGUMENTS, 3)
    rate, _ = buffer(call, ARGUMENTS, 4)
    before, _ = buffer(call, ARGUMENTS, 5)
    table_at, _ = buffer(call, ARGUMENTS, 6)
    outputs, _ = buffer(call, RESULTS, 0)
    after, _ = buffer(call, RESULTS, 1)
    job = np.zeros(crew.SIZE, np.int64)
    job[crew.DO], job[crew.INPUTS], job[crew.WEIGHTS], job[crew.OUTPUTS] = do, query, key, outputs
    job[crew.ROWS], job[TOKENS] = long_at(sizes), long_at(sizes + 8)
    job[KEY_HEADS], job[crew.DEPTH] = long_at(sizes + 16), long_at(sizes + 24)
    job[HEADS], job[crew.WIDTH] = long_at(of_values + 16), long_at(of_values + 24)
    job[VALUES], job[LEFT], job[RATES], job[BEFORE], job[AFTER] = value, left, rate, before, after
    job[crew.PARTS] = job[crew.ROWS] * job[HEADS]
    # A state is read and written once; a token's arithmetic with it takes as long as reading a quarter.
    numbers = job[crew.PARTS] * job[crew.DEPTH] * job[crew.WIDTH]
    crew.share_out(pool_at(long_at(table_at)), job, numbers * size * (2 + job[TOKENS] // 4))


def delta_memory(
    table: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    fade: jax.Array,
    rate: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array] | None:
    """`delta_net.step` and `delta_net.scan`, inside a jitted program; None where no kernel suits.

    Args:
        table: any layer's (`Inside`).
        query, key, value, fade, rate, state: as of `delta_net.scan`.
    """
    if not query.shape[1]:
        return None
    kernel = choose(Work("delta_memory", state.dtype.name, np.dtype(value.dtype), state.shape[2:]))
    return None if kernel is None else kernel.run(table, query, key, value, fade, rate, state)


def suits(work: Work) -> bool:
    return work.format == work.dtype.name == "float32" and work.sizes[1] % LANES == 0


def memory_target() -> str:
    """XLA's name for the function.

    Raises:
        Unavailable: if there can be none.
    """
    return register("layerscope_delta_memory", compute_memory, heads, np.dtype(np.float32), fit_memory)


def obstacle(work: Work) -> str | None:
    try:
        memory_target()
    except Unavailable as error:
        return str(error)
    return None


def remember_by_loops(
    table: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    fade: jax.Array,
    rate: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`delta_memory` by our own loop."""
    results = [jax.ShapeDtypeStruct(like.shape, like.dtype) for like in (value, state)]
    call = jax.ffi.ffi_call(memory_target(), results, input_output_aliases={5: 1})
    read_of, after = call(query, key, value, jnp.exp(fade), rate, state, table)
    return read_of, after


built_in(Kernel("loops", "delta_memory", suits, remember_by_loops, obstacle))
