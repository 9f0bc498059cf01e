"""A few rows of a matrix, times inputs of a few tokens, added to their sums: a step of attention for LLVM.

Numba leaves it to LLVM to find vectors in loops; here they are named, as are the registers' uses: weights are
read once for up to eight tokens, sums once for as many rows as registers hold, and the rows that come next
are asked for, which the CPU by itself does too late. All numbers are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from layerscope_jax.support.target import features

WIDE = "avx512f" in features()
LANES, ROWS = (16, 8) if WIDE else (8, 4)
"""Numbers in a register, and rows of a matrix that are added at once."""

COLUMNS = 2 * LANES
"""Columns that are added at once."""

TOKENS = 8
"""Most at once: for so many, reading weights takes about as long as multiplying."""

BYTE, WORD, INT, LONG = (ir.IntType(size) for size in (8, 16, 32, 64))
NUMBERS, BITS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(INT, LANES)

binding.initialize_native_asmparser()


@functools.cache
def suit(dtype: np.dtype, *sizes: int) -> bool:
    """Whether matrices of these sizes can be multiplied in pairs, without a rest, as numba compiles here."""
    able = WIDE and {"avx512bw", "avx512bf16"} <= features()
    return able and dtype.name == "bfloat16" and not any(size % COLUMNS for size in sizes)


def adding(tokens: int) -> Callable:
    """A function that adds `ROWS` by `COLUMNS` of a matrix, times inputs, to the sums of so many tokens.

    It takes addresses and distances in bytes: of the first weight, from one row to the next, and to the
    weight whose rows are to be asked for; of the first sum, and from one token's to the next one's; of the
    first input, and from one token's to the next one's.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, row, ahead, sums, far, x, depth = arguments
        moved = lambda base, distance, times: builder.add(base, builder.mul(distance, LONG(times)))  # noqa: E731
        rows = [moved(weights, row, k) for k in range(ROWS)]
        for at in rows:
            fetch(builder, builder.add(at, ahead))
        steps = [
            [read(builder, builder.add(begin, LONG(4 * half)), NUMBERS, 4) for half in (0, LANES)]
            for begin in rows
        ]
        for first in range(0, tokens, 2):  # four sums at a time, so that none waits for itself
            pair = range(first, min(first + 2, tokens))
            places = [
                builder.inttoptr(builder.add(moved(sums, far, token), LONG(4 * half)), NUMBERS.as_pointer())
                for token in pair
                for half in (0, LANES)
            ]
            totals = [builder.load(place, align=4) for place in places]
            for step, halves in enumerate(steps):
                for index, token in enumerate(pair):
                    at = builder.add(moved(x, depth, token), LONG(4 * step))
                    value = everywhere(builder, at)
                    for half in range(2):
                        place = 2 * index + half
                        totals[place] = add_product(builder, halves[half], value, totals[place])
            for place, total in zip(places, totals, strict=True):
                builder.store(total, place, align=4)
        return context.get_dummy_value()

    def typed(typing, weights, row, ahead, sums, far, x, depth):
        return types.void(*[types.int64] * 7), build

    return intrinsic(typed)


def external(builder: Any, name: str, result: Any, kinds: list[Any]) -> Any:
    """A function that LLVM or the process knows by its name."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, kinds), name)


def fetch(builder: Any, address: Any) -> None:
    """Asks for a line of memory into the second-level cache; the address may be nobody's."""
    place = builder.inttoptr(address, BYTE.as_pointer())
    function = external(builder, "llvm.prefetch.p0", ir.VoidType(), [place.type, INT, INT, INT])
    builder.call(function, [place, INT(0), INT(2), INT(1)])


def read(builder: Any, address: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def everywhere(builder: Any, address: Any) -> Any:
    """The number that lies there, in all lanes."""
    nothing = ir.Constant(NUMBERS, ir.Undefined)
    value = builder.insert_element(nothing, read(builder, address, NUMBERS.element, 4), INT(0))
    return builder.shuffle_vector(value, nothing, ir.VectorType(INT, LANES)([0] * LANES))


def add_product(builder: Any, weights: Any, x: Any, sums: Any) -> Any:
    function = external(builder, f"llvm.fmuladd.v{LANES}f32", NUMBERS, [NUMBERS] * 3)
    return builder.call(function, [weights, x, sums])


def add_pairs(builder: Any, weights: Any, x: Any, sums: Any) -> Any:
    # By its assembler name: what LLVM calls it, and of which types, changes with LLVM's version.
    kind = ir.FunctionType(NUMBERS, [BITS, BITS, NUMBERS])
    function = ir.InlineAsm(kind, "vdpbf16ps $1, $2, $0", "=v,v,v,0", side_effect=False)
    return builder.call(function, [weights, x, sums])
