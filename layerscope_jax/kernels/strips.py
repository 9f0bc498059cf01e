"""A matrix times inputs of many tokens: strips of it stay in the nearest cache until all tokens had them.

With few tokens reading takes the time, and a matrix is best read in whole rows (`weighted_sums`). With many
it is arithmetic: here the sums of some tokens stay in registers for all rows of a strip, and a weight,
loaded once, is used for all of them. Sums run over the same rows in the same order, so that their bits are
the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from layerscope_jax.kernels.vectors import (
    COLUMNS,
    LANES,
    LONG,
    NUMBERS,
    WIDE,
    add_product,
    everywhere,
    fetch,
    read,
)

MANY = 25
"""Tokens from which on strips are faster than whole rows."""

TOKENS = 12 if WIDE else 6
"""Most tokens whose sums are in registers at once: two registers each, of 32 or 16."""

FEWEST = min(tokens // -(-tokens // TOKENS) for tokens in range(MANY, MANY + TOKENS))
"""Least of them: from `MANY` on, tokens are shared out evenly."""

DEEP = 2048 // COLUMNS
"""Steps of a strip, which takes 8 KB: a quarter of a first-level cache, whose other threads want some too."""

PANEL = 8
"""Strips that are laid out at once, so that some neighbouring lines of each row are read together."""

STRIP = (DEEP + 1) * COLUMNS
"""Floats from one strip to the next: one row more, as caches confuse what lies a multiple of a page apart."""

APART = (PANEL + 1) * COLUMNS
"""Floats from one token's sums of a panel to the next one's: one strip more, for the same reason."""

LINE = 64
"""Bytes that caches fetch at once."""


def repeat(builder: Any, times: Any, starts: list[Any], body: Callable) -> list[Any]:
    """A loop of at least one turn, whose `body(turn, values)` gives the next turn's values; the last ones."""
    before, after = builder.block, builder.append_basic_block("after")
    loop = builder.append_basic_block("loop")
    builder.branch(loop)
    builder.position_at_end(loop)
    turn = builder.phi(LONG)
    values = [builder.phi(start.type) for start in starts]
    results = body(turn, values)
    following = builder.add(turn, LONG(1))
    for phi, start, value in zip([turn, *values], [LONG(0), *starts], [following, *results], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, times), loop, after)
    builder.position_at_end(after)
    return results


def place(builder: Any, base: Any, number: Any, distance: Any, kind: Any) -> Any:
    """Where the vector lies that is so many distances behind an address."""
    at = builder.add(base, builder.mul(number, distance))
    return builder.inttoptr(at, kind.as_pointer())


@intrinsic
def lay_out(typing: Any, weights: Any, row: Any, steps: Any, panel: Any, strips: Any) -> Any:
    """Writes strips as they are multiplied: two registers for each step.

    Takes the first weight's address and the distance in bytes from one row to the next; steps; where the
    first strip is to lie; strips.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, row, steps, panel, strips = arguments

        def step(turn: Any, _: list[Any]) -> list[Any]:
            at = builder.add(weights, builder.mul(turn, row))
            to = builder.add(panel, builder.mul(turn, LONG(4 * COLUMNS)))

            def strip(number: Any, _: list[Any]) -> list[Any]:
                first = builder.add(at, builder.mul(number, LONG(4 * COLUMNS)))
                strip_at = builder.add(to, builder.mul(number, LONG(4 * STRIP)))
                for half in range(2):
                    numbers = read(builder, builder.add(first, LONG(4 * LANES * half)), NUMBERS, 4)
                    where = place(builder, strip_at, LONG(half), LONG(4 * LANES), numbers.type)
                    builder.store(numbers, where, align=4 * LANES)
                return []

            repeat(builder, strips, [], strip)
            return []

        repeat(builder, steps, [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build


@intrinsic
def ask(typing: Any, begin: Any, row: Any, rows: Any, lines: Any) -> Any:
    """Asks for lines that lie side by side in each of some rows, whose distance in bytes is `row`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, row, rows, lines = arguments

        def of_row(turn: Any, _: list[Any]) -> list[Any]:
            at = builder.add(begin, builder.mul(turn, row))

            def line(number: Any, _: list[Any]) -> list[Any]:
                fetch(builder, builder.add(at, builder.mul(number, LONG(LINE))))
                return []

            return repeat(builder, lines, [], line)

        repeat(builder, rows, [], of_row)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@intrinsic
def add_strip(typing: Any, strip: Any, steps: Any, sums: Any, x: Any, tokens: Any) -> Any:
    """Adds a strip, times inputs, to the sums of `FEWEST` to `TOKENS` tokens.

    Takes the strip's address and its steps; the addresses of the first sum, and of the inputs as `panels`
    packs them; tokens.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        strip, steps, sums, x, tokens = arguments

        def add_tokens(count: int) -> None:
            places = [
                place(builder, builder.add(sums, LONG(4 * half)), LONG(token), LONG(4 * APART), NUMBERS)
                for token in range(count)
                for half in (0, LANES)
            ]

            def step(turn: Any, totals: list[Any]) -> list[Any]:
                at = builder.add(strip, builder.mul(turn, LONG(4 * COLUMNS)))
                inputs_at = builder.add(x, builder.mul(turn, LONG(4 * count)))
                halves = [
                    read(builder, builder.add(at, LONG(4 * half)), NUMBERS, align=4 * LANES)
                    for half in (0, LANES)
                ]
                results = []
                for token in range(count):
                    value = everywhere(builder, builder.add(inputs_at, LONG(4 * token)))
                    results += [
                        add_product(builder, halves[half], value, totals[2 * token + half]) for half in (0, 1)
                    ]
                return results

            starts = [builder.load(where, align=4) for where in places]
            for where, total in zip(places, repeat(builder, steps, starts, step), strict=True):
                builder.store(total, where, align=4)

        end = builder.append_basic_block("end")
        counts = range(FEWEST, TOKENS + 1)
        cases = [builder.append_basic_block(f"tokens{count}") for count in counts]
        switch = builder.switch(tokens, cases[-1])
        for count, case in zip(counts, cases, strict=True):
            switch.add_case(LONG(count), case)
            builder.position_at_end(case)
            add_tokens(count)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build
