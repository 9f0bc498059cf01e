"""bfloat16 products by the matrix instructions of Intel's server CPUs (AMX), for any number of tokens.

`TDPBF16PS` multiplies a tile of 16 rows of 32 weights, as they lie in memory, with a tile of 32 inputs of up to
16 tokens, which are woven in pairs once for all matrices that take them. So sums come by output and token, a
row of a matrix with all tokens, and each is summed over the inputs in one order, in float32: a token's result
has the same bits in any company and on any thread.
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

from layerscope_jax.kernels.activations import SILU, biases, gate_row
from layerscope_jax.kernels.numbers import pointer, rounded, silu, taken, widened
from layerscope_jax.kernels.vectors import LONG, fetch
from layerscope_jax.support.njit import njit
from layerscope_jax.support.target import features

TILE, DEPTH = 16, 32
"""Rows of a tile, of weights or of sums; inputs that one instruction takes."""

PIECE = 256
"""Most tokens at a time, so that their sums stay in the cache."""

FEW_ROWS, MANY_ROWS = 64, 32
"""Rows of a matrix at once, for up to 16 tokens and for more: four tiles of sums in either case."""

HIGH = 512
"""Inputs at once for more than 16 tokens: so much of the rows stays in the nearest cache for all tokens."""

STAGED = 2 * MANY_ROWS * HIGH
"""Bytes of that."""


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


BYTE, NOTHING = ir.IntType(8), ir.VoidType()
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


# Sums are tiles 0 to 3. With few tokens weights are 4 to 6 and inputs 7; else weights are 4 and 5, inputs 6 and 7.
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
def product_of_few(inputs, depth, weights, first, last, tokens, sums, ahead):
    """`weights[first:last] @ inputs` of at most 16 tokens, all but sizes as addresses.

    Args:
        inputs: [depth / 2, tokens, 2] bfloat16.
        weights: [N, depth] bfloat16.
        sums: [last - first, tokens] float32, overwritten.
        ahead: address of the matrix that is read next, or of any memory.
    """
    row, wide = 2 * depth, 4 * tokens
    for start in range(first, last, FEW_ROWS):
        tiles, at, to = min(FEW_ROWS, last - start) // TILE, weights + row * start, sums + wide * (start - first)
        coming = at + FEW_ROWS * row if start + FEW_ROWS < last else ahead
        clear0()
        clear1()
        clear2()
        clear3()
        for k in range(0, depth, DEPTH):
            begin = at + 2 * k
            load7(inputs + wide * (k // 2), wide)
            for line in range(TILE * tiles):  # in the order in which memory is fastest
                ask(coming + 2 * TILE * tiles * k + 64 * line)
            load4(begin, row)
            few0()
            if tiles > 1:
                load5(begin + TILE * row, row)
                few1()
            if tiles > 2:
                load6(begin + 2 * TILE * row, row)
                few2()
            if tiles > 3:
                load4(begin + 3 * TILE * row, row)
                few3()
        store0(to, wide)
        if tiles > 1:
            store1(to + TILE * wide, wide)
        if tiles > 2:
            store2(to + 2 * TILE * wide, wide)
        if tiles > 3:
            store3(to + 3 * TILE * wide, wide)


@njit(cache=True, nogil=True)
def stage(weights, row, rows, steps, to):
    """Copies rows of a matrix, `steps` times `DEPTH` weights of each, into tiles that lie one after the other."""
    for line in range(rows):
        source = carray(pointer(weights + row * line), (steps, 8), np.uint64)
        tiles = carray(pointer(to + line // TILE * (steps * 1024) + line % TILE * 64), (steps, 128), np.uint64)
        for k in range(np.uint64(steps)):
            for word in range(np.uint64(8)):
                tiles[k, word] = source[k, word]


@njit(cache=True, nogil=True)
def product_of_many(inputs, depth, weights, first, last, tokens, sums, staged, ahead):
    """The same of more tokens.

    Args:
        inputs: [tokens / 16, depth / 2, 16, 2].
        staged: scratch of `STAGED` bytes.
    """
    row, wide, tiles = 2 * depth, 4 * columns(tokens), (tokens + TILE - 1) // TILE
    for start in range(first, last, MANY_ROWS):
        rows = min(MANY_ROWS, last - start)
        at, to = weights + row * start, sums + wide * (start - first)
        coming = at + MANY_ROWS * row if start + MANY_ROWS < last else ahead
        for begin in range(0, depth, HIGH):
            steps = (min(begin + HIGH, depth) - begin) // DEPTH
            stage(at + 2 * begin, row, rows, steps, staged)
            line = coming + 2 * MANY_ROWS * begin
            for tile in range(0, tiles, 2):
                pair = tile + 1 < tiles and rows > TILE
                upper, x = to + 4 * TILE * tile, inputs + 2 * TILE * depth * tile + 2 * TILE * begin
                lower, y = upper + TILE * wide, x + 2 * TILE * depth
                if begin == 0:
                    clear0()
                    clear1()
                    clear2()
                    clear3()
                else:
                    load0(upper, wide)
                    if tile + 1 < tiles:
                        load1(upper + 64, wide)
                    if rows > TILE:
                        load2(lower, wide)
                    if pair:
                        load3(lower + 64, wide)
                if pair:
                    for k in range(steps):
                        load4(staged + 1024 * k, 64)
                        load6(x + 1024 * k, 64)
                        many0()
                        load7(y + 1024 * k, 64)
                        many1()
                        load5(staged + 1024 * (steps + k), 64)
                        many2()
                        many3()
                        if tile == 0:
                            for _ in range(MANY_ROWS):
                                ask(line)
                                line += 64
                else:
                    for k in range(steps):
                        load4(staged + 1024 * k, 64)
                        load6(x + 1024 * k, 64)
                        many0()
                        if tile + 1 < tiles:
                            load7(y + 1024 * k, 64)
                            many1()
                        if rows > TILE:
                            load5(staged + 1024 * (steps + k), 64)
                            many2()
                        if tile == 0:
                            for _ in range(MANY_ROWS):
                                ask(line)
                                line += 64
                store0(upper, wide)
                if tile + 1 < tiles:
                    store1(upper + 64, wide)
                if rows > TILE:
                    store2(lower, wide)
                if pair:
                    store3(lower + 64, wide)


@njit(cache=True, nogil=True)
def product(inputs, depth, weights, first, last, tokens, sums, staged, ahead):
    if tokens <= TILE:
        product_of_few(inputs, depth, weights, first, last, tokens, sums, ahead)
    else:
        product_of_many(inputs, depth, weights, first, last, tokens, sums, staged, ahead)


@njit(cache=True, nogil=True)
def rows_at_once(tokens):
    """Rows of a matrix whose sums stay in the cache."""
    return max(FEW_ROWS, (1 << 16) // columns(tokens) // FEW_ROWS * FEW_ROWS)


@njit(cache=True, nogil=True)
def scratch_parts(tokens, width, hidden):
    """Where in scratch: staged weights, inputs, inner activations, two blocks of sums, its end."""
    wide = columns(tokens)
    most = min(rows_at_once(tokens), max(width, hidden))
    inputs = 128 + STAGED
    inner = inputs + 2 * wide * width
    sums = inner + 2 * wide * hidden
    more = sums + 4 * wide * most
    return 128, inputs, inner, sums, more, more + 4 * wide * most


@njit(cache=True, nogil=True)
def scratch_bytes(firsts, lasts, width, hidden):
    """That `run_experts` needs for any of these experts."""
    size = 0
    for expert in range(len(firsts)):
        size = max(size, scratch_parts(lasts[expert] - firsts[expert], width, hidden)[5])
    return size


@njit(cache=True, nogil=True)
def add_bias(sums, bias, first):
    """Adds biases, from the first on, to rows of sums; nothing where there are none."""
    if len(bias) > 0:
        for n in range(len(sums)):
            number, row = widened(bias[first + n]), sums[n]
            for m in range(np.uint64(len(row))):
                row[m] += number


@njit(cache=True, nogil=True)
def activate(gates, ups, tokens, hidden, first, to, activation, limit, kind):
    """Gated numbers of some rows of sums [F, columns], woven into tiles of inputs.

    Args:
        first: the row of the whole that they begin with.
        to: address of the tiles.
        kind: an array of bfloat16, as its bits.
    """
    flat, others = gates.reshape(-1), ups.reshape(-1)
    if activation == SILU:
        for index in range(np.uint64(len(flat))):
            flat[index] = silu(flat[index]) * others[index]
    else:
        gate_row(flat, others, len(flat), activation, limit)
    wide = min(tokens, TILE)
    for tile in range(0, gates.shape[1], TILE):
        pairs = carray(pointer(to + 2 * tile * hidden + 2 * wide * first), (len(gates) // 2, wide), np.uint32)
        for f in range(np.uint64(len(pairs))):
            even, odd, pair = gates[2 * f], gates[2 * f + 1], pairs[f]
            for m in range(np.uint64(wide)):
                low, high = rounded(even[tile + m], kind), rounded(odd[tile + m], kind)
                pair[m] = np.uint32(low) | (np.uint32(high) << np.uint32(16))


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
        wide, block = columns(tokens), rows_at_once(tokens)
        parts = scratch_parts(tokens, width, hidden)
        staged, x, y = scratch + parts[0], scratch + parts[1], scratch + parts[2]
        sums, more = scratch + parts[3], scratch + parts[4]
        gate, up, down = addresses[expert, 0], addresses[expert, 1], addresses[expert, 2]
        bias = carray(pointer(addresses[expert, 3]), biases(addresses[expert, 3], width, hidden), kind.dtype)
        shape_tiles(scratch, tokens)
        rows = np.empty(tokens, np.int64)
        for m in range(tokens):
            rows[m] = read[slots[m] // choices].ctypes.data
        weave(rows, tokens, width, x)
        for first in range(0, hidden, block):
            last = min(first + block, hidden)
            coming = gate + 2 * width * last if last < hidden else down
            product(x, width, gate, first, last, tokens, sums, staged, up + 2 * width * first)
            product(x, width, up, first, last, tokens, more, staged, coming)
            gates = carray(pointer(sums), (last - first, wide), np.float32)
            ups = carray(pointer(more), (last - first, wide), np.float32)
            add_bias(gates, bias, first)
            add_bias(ups, bias, hidden + first)
            activate(gates, ups, tokens, hidden, first, y, activation, limit, kind)
        for first in range(0, width, block):
            last = min(first + block, width)
            product(y, hidden, down, first, last, tokens, sums, staged, down + 2 * hidden * min(last, width - 1))
            totals = carray(pointer(sums), (last - first, wide), np.float32)
            add_bias(totals, bias, 2 * hidden + first)
            write_rows(totals, outputs, slots, first, last)
    load_shapes(scratch + 64)


@njit(cache=True, nogil=True)
def multiply(x, weights, outputs, first, last):
    """`x [M, K] @ weights [N, K]^T` into the columns `first` to `last` of `outputs`, all of bfloat16."""
    depth = x.shape[1]
    piece, block = min(len(x), PIECE), rows_at_once(min(len(x), PIECE))
    wide, most = columns(piece), min(block, last - first)
    memory = np.empty(64 + 128 + STAGED + 2 * wide * depth + 4 * wide * most, np.uint8)
    scratch = (memory.ctypes.data + 63) // 64 * 64
    staged = scratch + 128
    inputs = staged + STAGED
    sums = inputs + 2 * wide * depth
    store_shapes(scratch + 64)
    for start in range(0, len(x), PIECE):
        tokens = min(PIECE, len(x) - start)
        shape_tiles(scratch, tokens)
        rows = np.arange(start, start + tokens)
        weave(x.ctypes.data + x.strides[0] * rows, tokens, depth, inputs)
        for begin in range(first, last, most):
            end = min(begin + most, last)
            at = weights.ctypes.data
            product(inputs, depth, at, begin, end, tokens, sums, staged, at + 2 * depth * min(end, last - 1))
            totals = carray(pointer(sums), (end - begin, columns(tokens)), np.float32)
            write_rows(totals, outputs, rows, begin, end)
    load_shapes(scratch + 64)
    memory[0] = 0  # kept until here
