"""Products of many tokens: a matrix passes panel by panel, the next one laid out while one is multiplied.

With few tokens reading takes the time, and a matrix is best read in whole rows (`loops`). With many it is
arithmetic: a panel is a few strips (`strips`), each small enough to stay in the nearest cache until all
tokens had it. Sums run over the same rows in the same order, so that their bits are the same.
"""

from __future__ import annotations

import numpy as np

from layerscope_jax.kernels.activations import activate, add_bias
from layerscope_jax.kernels.numbers import room, round_row
from layerscope_jax.kernels.strips import (
    APART,
    COLUMNS,
    DEEP,
    LINE,
    PANEL,
    STRIP,
    TOKENS,
    add_strip,
    ask,
    lay_out,
    rows_of_step,
)
from layerscope_jax.support.njit import njit

WIDE = PANEL * COLUMNS
"""Columns of a panel."""

AHEAD = 2
"""Calls of `add_strip` between asking for rows and laying them out: what is asked for has come by then."""


@njit(cache=True, nogil=True)
def shared_out(tokens):
    """Where groups of at most `TOKENS` begin and end, as even as may be."""
    groups = (tokens + TOKENS - 1) // TOKENS
    ends = np.empty(groups + 1, np.int64)
    for group in range(groups + 1):
        ends[group] = tokens * group // groups
    return ends


@njit(cache=True, nogil=True)
def packed(x, ends, kind):
    """Inputs in the order in which `add_strip` reads them: by `DEEP` steps, group, step, token.

    Places that may be negative would take twice as long.
    """
    depth, step = x.shape[1], rows_of_step(kind)
    result = np.empty(x.size, x.dtype)
    begin = 0
    for k in range(0, depth, DEEP * step):
        end = min(k + DEEP * step, depth)
        for group in range(len(ends) - 1):
            first, last = ends[group], ends[group + 1]
            for m in range(first, last):
                row, to = x[m], np.uint64(begin + step * (m - first))
                for j in range(np.uint64(k), np.uint64(end), np.uint64(step)):
                    for i in range(np.uint64(step)):
                        result[to + i] = row[j + i]
                    to += np.uint64(step * (last - first))
            begin += (last - first) * (end - k)
    return result


@njit(cache=True, nogil=True, inline="always")
def panel_of(weights, first, last):
    """The panel that begins at a column: its address, bytes from one row to the next, rows and strips.

    Without strips where it would begin behind the last column.
    """
    strips = max(0, min(PANEL, (last - first) // COLUMNS))
    return weights.ctypes.data + weights.itemsize * first, weights.strides[0], weights.shape[0], strips


@njit(cache=True, nogil=True, inline="always")
def lay_first(panel, current, kind):
    """Lays out the first steps of a panel, which nothing went before."""
    begin, row, depth, strips = panel
    lay_out(begin, row, min(DEEP, depth // rows_of_step(kind)), current, strips, kind)


@njit(cache=True, nogil=True)
def add_panel(inputs, ends, panel, after, current, spare, sums, kind):
    """Adds packed inputs times a panel.

    Args:
        inputs, ends: as `packed` and `shared_out`.
        panel: as `panel_of`, its first steps laid out.
        after: the next one, whose first steps will be laid out; without strips if there is none.
        current, spare: addresses of room for what is laid out, and for what will be.
        sums: [M, APART] are begun anew.
        kind: an array of the kind of the weights.

    Returns:
        where the next panel's first steps are, and where there is room.
    """
    begin, row, depth, strips = panel
    step, size, groups = rows_of_step(kind), kind.itemsize, len(ends) - 1
    at, calls = inputs.ctypes.data, strips * groups
    sums.fill(0)
    for k in range(0, depth, DEEP * step):
        steps = min(DEEP, (depth - k) // step)
        left = (depth - k) // step - steps
        if left > 0:
            ahead, stride, coming, wide = begin + row * (k + steps * step), row, min(DEEP, left), strips
        else:
            ahead, stride, coming, wide = after[0], after[1], min(DEEP, after[2] // step), after[3]
            if wide == 0:
                coming = 0
        lines = (wide * COLUMNS * size + LINE - 1) // LINE
        asked = done = call = 0
        for strip in range(strips):
            for group in range(groups):
                call += 1
                until = min(coming, coming * (call + AHEAD) // calls)
                if until > asked:
                    ask(ahead + stride * step * asked, stride, step * (until - asked), lines)
                    asked = until
                until = coming * call // calls
                if until > done:
                    to = spare + 4 * COLUMNS * done
                    lay_out(ahead + stride * step * done, stride, until - done, to, wide, kind)
                    done = until
                first = ends[group]
                to = sums.ctypes.data + 4 * (APART * first + COLUMNS * strip)
                add_strip(
                    current + 4 * STRIP * strip,
                    steps,
                    to,
                    at + 4 * steps * first,
                    ends[group + 1] - first,
                    kind,
                )
        at += 4 * steps * len(sums)
        current, spare = spare, current
    return current, spare


@njit(cache=True, nogil=True, inline="always")
def two_rooms():
    """Memory for two panels, and where they begin."""
    memory = np.empty(2 * PANEL * STRIP + LINE // 4, np.float32)
    current = (memory.ctypes.data + LINE - 1) // LINE * LINE
    return memory, current, current + 4 * PANEL * STRIP


@njit(cache=True, nogil=True, inline="always")
def ffn_of_many(x, gate, up, down, bias, outputs, slots, activation, limit):
    """`loops.ffn` of `MANY` tokens or more; sizes are multiples of `vectors.ROWS` and `COLUMNS`."""
    tokens, width = x.shape
    hidden = gate.shape[1]
    ends, inner = shared_out(tokens), room(tokens, hidden, down)
    gates, ups = np.empty((tokens, APART), np.float32), np.empty((tokens, APART), np.float32)
    memory, current, spare = two_rooms()
    inputs = packed(x, ends, gate)
    lay_first(panel_of(gate, 0, hidden), current, gate)
    for first in range(0, hidden, WIDE):
        last = min(first + WIDE, hidden)
        of_up = panel_of(up, first, hidden)
        after = panel_of(gate, last, hidden) if last < hidden else panel_of(down, 0, width)
        current, spare = add_panel(
            inputs, ends, panel_of(gate, first, hidden), of_up, current, spare, gates, gate
        )
        current, spare = add_panel(inputs, ends, of_up, after, current, spare, ups, gate)
        add_bias(gates, bias, first, last)
        add_bias(ups, bias, hidden + first, hidden + last)
        for m in range(tokens):
            activate(gates[m], ups[m], inner[m, first:last], outputs, down, activation, limit)
    inputs = packed(inner, ends, down)
    for first in range(0, width, WIDE):
        last = min(first + WIDE, width)
        panel, after = panel_of(down, first, width), panel_of(down, last, width)
        current, spare = add_panel(inputs, ends, panel, after, current, spare, gates, down)
        add_bias(gates, bias, 2 * hidden + first, 2 * hidden + last)
        for m in range(tokens):
            round_row(gates[m], outputs[slots[m], first:last])
    memory[0] = 0  # kept until here


@njit(cache=True, nogil=True, inline="always")
def multiply_many(x, weights, outputs, start, first, last):
    """`x [M, K] @ weights [K, N]` into the columns `first` to `last` of `outputs`, from row `start` on."""
    ends, sums = shared_out(len(x)), np.empty((len(x), APART), np.float32)
    memory, current, spare = two_rooms()
    inputs = packed(x, ends, weights)
    lay_first(panel_of(weights, first, last), current, weights)
    for begin in range(first, last, WIDE):
        end = min(begin + WIDE, last)
        panel, after = panel_of(weights, begin, last), panel_of(weights, end, last)
        current, spare = add_panel(inputs, ends, panel, after, current, spare, sums, weights)
        for m in range(len(x)):
            round_row(sums[m], outputs[start + m, begin:end])
    memory[0] = 0
