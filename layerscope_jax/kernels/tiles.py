"""Tiles of Intel's server CPUs (AMX): the instructions, and how rows become tiles and sums become rows."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from layerscope_jax.kernels.numbers import pointer, rounded
from layerscope_jax.kernels.vectors import LONG, external, fetch
from layerscope_jax.support.njit import njit
from layerscope_jax.support.target import features

TILE, DEPTH = 16, 32
"""Rows of a tile, of weights or of sums; inputs that one instruction takes."""


@functools.cache
def available() -> bool:
    """Whether numba may compile the instructions, and Linux lets this process use them if asked."""
    if platform.system() != "Linux" or not {"amx-tile", "amx-bf16", "avx512f"} <= features():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


BYTE, NOTHING = ir.IntType(8), ir.VoidType()
ADDRESS = BYTE.as_pointer()


def emit(builder: Any, name: str, tiles: Sequence[int], memory: Sequence[Any] = ()) -> None:
    """Adds an instruction to what is built: of fixed tiles, and of an address and a stride, if any."""
    kinds = [BYTE] * len(tiles) + [ADDRESS, LONG][: len(memory)]
    values = [builder.inttoptr(memory[0], ADDRESS), *memory[1:]] if memory else []
    function = external(builder, "llvm.x86." + name, NOTHING, kinds)
    builder.call(function, [BYTE(tile) for tile in tiles] + values)


def instruction(name: str, *tiles: int, memory: int = 0) -> Any:
    """One of the tiles' instructions: of fixed `tiles`, and of an address and a stride where it has them."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(builder, name, tiles, list(arguments)[:memory])
        return context.get_dummy_value()

    if memory == 2:
        return intrinsic(lambda typing, address, stride: (types.void(types.int64, types.int64), build))
    if memory == 1:
        return intrinsic(lambda typing, address: (types.void(types.int64), build))
    return intrinsic(lambda typing: (types.void(), build))


# Sums are tiles 0 to 3. With few tokens weights are 4 to 6 and inputs 7; else weights 4, 5 and inputs 6, 7.
clear0, clear1, clear2, clear3 = (instruction("tilezero", tile) for tile in range(4))
load0, load1, load2, load3, load4, load5, load6, load7 = (
    instruction("tileloadd64", tile, memory=2) for tile in range(8)
)
store0, store1, store2, store3 = (instruction("tilestored64", tile, memory=2) for tile in range(4))
few0, few1, few2, few3 = (
    instruction("tdpbf16ps", sums, weights, 7) for sums, weights in ((0, 4), (1, 5), (2, 6), (3, 4))
)
many0, many1, many2, many3 = (
    instruction("tdpbf16ps", sums, weights, inputs)
    for sums, weights, inputs in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))
)
load_shapes, store_shapes = instruction("ldtilecfg", memory=1), instruction("sttilecfg", memory=1)


@intrinsic
def ask(typing: Any, address: Any) -> Any:
    """Asks for the line of memory at an address, which may be nobody's."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), build


@njit(cache=True, nogil=True)
def clear():
    """Begins four tiles of sums anew."""
    clear0()
    clear1()
    clear2()
    clear3()


@njit(cache=True, nogil=True)
def store_few(to, stride, tiles):
    """Stores tiles of sums that lie below each other."""
    store0(to, stride)
    if tiles > 1:
        store1(to + TILE * stride, stride)
    if tiles > 2:
        store2(to + 2 * TILE * stride, stride)
    if tiles > 3:
        store3(to + 3 * TILE * stride, stride)


@njit(cache=True, nogil=True)
def add_few(inputs, wide, weights, stride, distance, tiles):
    """Adds the products of a tile of inputs with tiles of weights to the tiles of sums.

    Args:
        inputs: address of up to 16 tokens' inputs, `wide` bytes from one pair to the next.
        weights: address of the first tile, `stride` bytes from one row to the next.
        distance: bytes from one tile to the next.
        tiles: of weights, 1 to 4.
    """
    load7(inputs, wide)
    load4(weights, stride)
    few0()
    if tiles > 1:
        load5(weights + distance, stride)
        few1()
    if tiles > 2:
        load6(weights + 2 * distance, stride)
        few2()
    if tiles > 3:
        load4(weights + 3 * distance, stride)
        few3()


WORDS, HALVES = ir.VectorType(ir.IntType(32), TILE), ir.VectorType(ir.IntType(16), TILE)


def moved(builder: Any, base: Any, distance: Any, number: int, kind: Any) -> Any:
    """Where something of a kind lies that is so many distances behind an address."""
    return builder.inttoptr(builder.add(base, builder.mul(distance, LONG(number))), kind.as_pointer())


def columns_of(builder: Any, begin: Any, row: Any) -> list[Any]:
    """The columns of 16 rows of 16 words of 32 bits, given the first row's address and the rows' distance."""
    rows = [builder.load(moved(builder, begin, row, number, WORDS), align=4) for number in range(TILE)]
    for size in (1, 2, 4, 8):  # blocks of so many words change places across the diagonal
        upper = [index // size % 2 * (TILE - size) + index for index in range(TILE)]
        orders = [WORDS(order) for order in (upper, [index + size for index in upper])]
        pairs = [(first, first + size) for first in range(TILE) if first // size % 2 == 0]
        swapped = list(rows)
        for first, second in pairs:
            for number, order in zip((first, second), orders, strict=True):
                swapped[number] = builder.shuffle_vector(rows[first], rows[second], order)
        rows = swapped
    return rows


@intrinsic
def transpose(typing: Any, begin: Any, row: Any, to: Any) -> Any:
    """Writes the columns of 16 rows of 16 words one after the other.

    Takes the first row's address, the distance in bytes from one to the next, and where to write.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, row, to = arguments
        for number, column in enumerate(columns_of(builder, begin, row)):
            builder.store(column, moved(builder, to, LONG(64), number, WORDS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), build


@intrinsic
def write_columns(typing: Any, begin: Any, row: Any, rows: Any, offset: Any) -> Any:
    """Writes the columns of 16 rows of 16 float32 as bfloat16, rounded as `numbers.rounded` does.

    Takes the first row's address and the distance in bytes from one to the next; where 16 addresses lie, and
    how far in bytes behind each a column is to be written.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, row, rows, offset = arguments
        for number, bits in enumerate(columns_of(builder, begin, row)):
            shift = WORDS([16] * TILE)
            odd = builder.and_(builder.lshr(bits, shift), WORDS([1] * TILE))
            nearest = builder.add(builder.add(bits, WORDS([0x7FFF] * TILE)), odd)
            output = builder.load(moved(builder, rows, LONG(8), number, LONG))
            to = moved(builder, builder.add(output, offset), LONG(0), 0, HALVES)
            builder.store(builder.trunc(builder.lshr(nearest, shift), HALVES), to, align=2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@njit(cache=True, nogil=True)
def shape_tiles(at, tokens):
    """Palette 1: tiles of 16 rows; those of inputs and sums as wide as the tokens, at most 16."""
    shapes = carray(pointer(at), 64, np.uint8)
    shapes[:] = 0
    shapes[0] = 1
    for tile in range(8):
        weights = 4 <= tile < 7 if tokens <= TILE else 4 <= tile < 6
        shapes[16 + 2 * tile] = 64 if weights else 4 * min(tokens, TILE)
        shapes[48 + tile] = TILE
    load_shapes(at)


@njit(cache=True, nogil=True)
def columns(tokens):
    """Tokens with those added that fill the last tile: none where one tile is enough."""
    return tokens if tokens <= TILE else (tokens + TILE - 1) // TILE * TILE


@njit(cache=True, nogil=True)
def weave(rows, tokens, depth, to):
    """Writes inputs as tiles: pairs of a token's inputs below each other.

    Args:
        rows: [tokens] addresses of [depth] bfloat16.
        to: address of [tokens / 16, depth / 2, 16, 2], or of [depth / 2, tokens, 2] for up to 16 tokens.
    """
    wide, room = min(tokens, TILE), np.empty((TILE, TILE), np.uint32)
    for first in range(0, tokens, TILE):
        count, tile = min(TILE, tokens - first), to + 2 * first * depth
        if count < TILE:
            pairs = carray(pointer(tile), (depth // 2, wide), np.uint32)
            for m in range(count):
                row = carray(pointer(rows[first + m]), depth // 2, np.uint32)
                for k in range(np.uint64(depth // 2)):
                    pairs[k, m] = row[k]
            continue
        for k in range(0, 2 * depth, 64):
            for m in range(TILE):
                room[m] = carray(pointer(rows[first + m] + k), TILE, np.uint32)
            transpose(room.ctypes.data, 64, tile + 16 * k)


@njit(cache=True, nogil=True)
def write_rows(sums, outputs, slots, first, last):
    """Sums [last - first, columns], rounded, into the columns `first` to `last` of `outputs[slots]`."""
    wide, rows = sums.strides[0], np.empty(len(slots), np.int64)
    for m in range(len(slots)):
        rows[m] = outputs.ctypes.data + outputs.strides[0] * slots[m] + 2 * first
    whole = len(slots) - len(slots) % TILE
    for m in range(0, whole, TILE):
        for n in range(0, last - first, TILE):
            write_columns(sums.ctypes.data + wide * n + 4 * m, wide, rows.ctypes.data + 8 * m, 2 * n)
    for m in range(whole, len(slots)):
        output = outputs[slots[m], first:last]
        for n in range(np.uint64(len(output))):
            output[n] = rounded(sums[n, m], output)
    rows[0] = 0  # kept until here
