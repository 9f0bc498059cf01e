"""bfloat16 experts by the matrix instructions of Intel's server CPUs (AMX), for any number of tokens.

`TDPBF16PS` multiplies 16 rows of 32 inputs with 32 rows of 16 weights. It wants two rows of weights woven
into one, which a checkpoint does not have: a block of a matrix is read in order, as memory is fastest, and
woven on the way into scratch that stays in the cache, where the tiles read it as often as there are tokens.
Sums are float32 and run over the depth in one order: a row has the same bits in any company and thread.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from layerscope_jax.kernels.activations import SILU, add_bias, biases, gate_row
from layerscope_jax.kernels.numbers import pointer, round_row, rounded, silu, taken
from layerscope_jax.support.njit import njit
from layerscope_jax.support.target import features

TILE, DEPTH = 16, 32
"""Rows and columns of a tile of sums; inputs of a row that one instruction takes."""

PIECE = 256
"""Most rows at a time, so that their sums stay in the cache."""

# Of a matrix, what is woven at once: with few rows the order of reading counts, whole rows; with many the
# sums, which are read and written once for each block. Their order, and so the bits, are the same.
FEW_TILES, LONG_ROWS, LOW = 4, 4096, 128
SHORT_ROWS, HIGH = 512, 256


@functools.cache
def suit(dtype: np.dtype, width: int, hidden: int) -> bool:
    """Whether experts [width, hidden] can be computed here."""
    return dtype.name == "bfloat16" and width % DEPTH == 0 == hidden % DEPTH and available()


@functools.cache
def available() -> bool:
    """Whether numba may compile the instructions, and Linux lets this process use them if asked."""
    if platform.system() != "Linux" or not {"amx-tile", "amx-bf16"} <= features():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


BYTE, LONG, NOTHING = ir.IntType(8), ir.IntType(64), ir.VoidType()
ADDRESS = BYTE.as_pointer()


def instruction(name: str, *tiles: int, memory: int = 0) -> Any:
    """One of the tiles' instructions: of fixed `tiles`, and of an address and a stride where it has them."""
    kinds = [BYTE] * len(tiles) + [ADDRESS, LONG][:memory]

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.globals.get("llvm.x86." + name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(NOTHING, kinds), "llvm.x86." + name)
        values = list(arguments)
        if memory:
            values[0] = builder.inttoptr(values[0], ADDRESS)
        builder.call(function, [BYTE(tile) for tile in tiles] + values)
        return context.get_dummy_value()

    if memory == 2:
        return intrinsic(lambda typing, address, stride: (types.void(types.int64, types.int64), build))
    if memory == 1:
        return intrinsic(lambda typing, address: (types.void(types.int64), build))
    return intrinsic(lambda typing: (types.void(), build))


# Sums of two tiles of rows by two of columns are tiles 0 to 3; inputs are 4 and 5, weights 6 and 7.
clear0, clear1, clear2, clear3 = (instruction("tilezero", tile) for tile in range(4))
load0, load1, load2, load3, rows0, rows1, weights0, weights1 = (
    instruction("tileloadd64", tile, memory=2) for tile in range(8)
)
store0, store1, store2, store3 = (instruction("tilestored64", tile, memory=2) for tile in range(4))
add0, add1, add2, add3 = (
    instruction("tdpbf16ps", sums, rows, weights)
    for sums, rows, weights in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))
)
load_shapes, store_shapes = instruction("ldtilecfg", memory=1), instruction("sttilecfg", memory=1)


@intrinsic
def weave(typing: Any, first: Any, second: Any, to: Any) -> Any:
    """32 columns of two rows of a matrix as a row each of two neighbouring tiles of weights."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(16), 32).as_pointer()
        first, second = (builder.load(builder.inttoptr(at, vector), align=2) for at in arguments[:2])
        for half in range(2):
            order = [16 * half + index // 2 + 32 * (index % 2) for index in range(32)]
            woven = builder.shuffle_vector(first, second, ir.VectorType(ir.IntType(32), 32)(order))
            at = builder.add(arguments[2], LONG(1024 * half))
            builder.store(woven, builder.inttoptr(at, vector), align=64)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@njit(cache=True, nogil=True)
def product(x, depth, weights, width, first, last, tiles, sums, woven, high):
    """`x @ weights[:, first:last]`, all but sizes as addresses.

    Args:
        x: [16 * tiles, depth] bfloat16.
        weights: [depth, width] bfloat16.
        sums: [16 * tiles, last - first] float32, overwritten.
        woven: scratch of `high` rows of `last - first` weights.
        high: rows of weights that are woven at once.
    """
    row, stride, wide = 2 * depth, 4 * (last - first), (last - first) // 32
    for start in range(0, depth, high):
        steps = min(high, depth - start) // DEPTH
        for pair in range(steps * TILE):
            begin = weights + 2 * ((start + 2 * pair) * width + first)
            to = woven + pair // TILE * 2048 + pair % TILE * 64
            for column in range(wide):
                weave(begin + 64 * column, begin + 2 * width + 64 * column, to + column * steps * 2048)
        for column in range(wide):
            for tile in range(0, tiles, 2):
                two_tiles = tile + 1 < tiles
                upper, a = sums + tile * TILE * stride + 128 * column, x + tile * TILE * row + 2 * start
                lower = upper + TILE * stride
                if start == 0:
                    clear0()
                    clear1()
                    clear2()
                    clear3()
                else:
                    load0(upper, stride)
                    load1(upper + 64, stride)
                    if two_tiles:
                        load2(lower, stride)
                        load3(lower + 64, stride)
                for step in range(steps):
                    b = woven + (column * steps + step) * 2048
                    weights0(b, 64)
                    weights1(b + 1024, 64)
                    rows0(a + 64 * step, row)
                    add0()
                    add1()
                    if two_tiles:
                        rows1(a + 64 * step + TILE * row, row)
                        add2()
                        add3()
                store0(upper, stride)
                store1(upper + 64, stride)
                if two_tiles:
                    store2(lower, stride)
                    store3(lower + 64, stride)


@njit(cache=True, nogil=True)
def blocks(tokens):
    """Tiles of rows, and how wide and how high the blocks of a matrix are."""
    tiles = (tokens + TILE - 1) // TILE
    return (tiles, LONG_ROWS, LOW) if tiles <= FEW_TILES else (tiles, SHORT_ROWS, HIGH)


@njit(cache=True, nogil=True)
def scratch_parts(tokens, width, hidden):
    """Where in scratch: inputs, inner activations, two blocks of sums, woven weights, its end."""
    tiles, wide, high = blocks(tokens)
    rows, most = tiles * TILE, min(wide, max(width, hidden))
    inputs = 128
    inner = inputs + 2 * rows * width
    sums = inner + 2 * rows * hidden
    more = sums + 4 * rows * most
    woven = more + 4 * rows * most
    return inputs, inner, sums, more, woven, woven + 2 * high * most


@njit(cache=True, nogil=True)
def scratch_bytes(firsts, lasts, width, hidden):
    """That `run_experts` needs for any of these experts."""
    size = 0
    for expert in range(len(firsts)):
        size = max(size, scratch_parts(lasts[expert] - firsts[expert], width, hidden)[5])
    return size


@njit(cache=True, nogil=True)
def shape_tiles(at, rows):
    """Palette 1: `rows` rows of inputs and of sums, 16 of weights, 64 bytes each."""
    shapes = carray(pointer(at), 64, np.uint8)
    shapes[:] = 0
    shapes[0] = 1
    for tile in range(8):
        shapes[16 + 2 * tile] = 64
        shapes[48 + tile] = TILE if tile >= 6 else rows
    load_shapes(at)


@njit(cache=True, nogil=True)
def run_experts(
    addresses,
    firsts,
    lasts,
    order,
    choices,
    inputs,
    hidden,
    activation,
    limit,
    outputs,
    kind,
    counter,
    scratch,
):
    """As `loops.run_experts`, of weights in bfloat16 alone.

    Args:
        firsts, lasts: at most `PIECE` apart.
        scratch: address of `scratch_bytes` that no other thread uses, aligned to 64.
    """
    width = outputs.shape[1]
    read = carray(pointer(inputs), (len(outputs) // choices, width), outputs.dtype)
    store_shapes(scratch + 64)  # another user of tiles in this thread may count on theirs
    while True:
        expert = taken(counter)
        if expert >= len(firsts):
            break
        slots = order[firsts[expert] : lasts[expert]]
        tokens = len(slots)
        tiles, wide, high = blocks(tokens)
        parts = scratch_parts(tokens, width, hidden)
        x, y, sums = scratch + parts[0], scratch + parts[1], scratch + parts[2]
        more, woven = scratch + parts[3], scratch + parts[4]
        gate, up, down = addresses[expert, 0], addresses[expert, 1], addresses[expert, 2]
        bias = carray(pointer(addresses[expert, 3]), biases(addresses[expert, 3], width, hidden), kind.dtype)
        shape_tiles(scratch, min(tokens, TILE))
        rows = carray(pointer(x), (tokens, width), outputs.dtype)
        for m in range(tokens):
            rows[m] = read[slots[m] // choices]
        inner = carray(pointer(y), (tokens, hidden), outputs.dtype)
        for first in range(0, hidden, wide):
            last = min(first + wide, hidden)
            product(x, width, gate, hidden, first, last, tiles, sums, woven, high)
            product(x, width, up, hidden, first, last, tiles, more, woven, high)
            gates = carray(pointer(sums), (tokens, last - first), np.float32)
            ups = carray(pointer(more), (tokens, last - first), np.float32)
            add_bias(gates, bias, first, last)
            add_bias(ups, bias, hidden + first, hidden + last)
            for m in range(tokens):
                activate(gates[m], ups[m], inner[m, first:last], activation, limit)
        for first in range(0, width, wide):
            last = min(first + wide, width)
            product(y, hidden, down, width, first, last, tiles, sums, woven, high)
            totals = carray(pointer(sums), (tokens, last - first), np.float32)
            add_bias(totals, bias, 2 * hidden + first, 2 * hidden + last)
            for m in range(tokens):
                round_row(totals[m], outputs[slots[m], first:last])
    load_shapes(scratch + 64)


@njit(cache=True, nogil=True)
def activate(gates, ups, inner, activation, limit):
    """As `activations.activate`, of inputs that stay bfloat16."""
    if activation == SILU:
        for f in range(np.uint64(len(inner))):
            inner[f] = rounded(silu(gates[f]) * ups[f], inner)
        return
    gate_row(gates, ups, len(inner), activation, limit)
    round_row(gates, inner)
