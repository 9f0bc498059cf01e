"""Products of many queries: a matrix passes panel by panel, the next one laid out while one is multiplied.

With few tokens reading takes the time, and a matrix is best read in whole rows (`weighted_sums`). With many
it is arithmetic: a panel is a few strips (`strips`), each small enough to stay in the nearest cache until
all tokens had it. Sums run over the same rows in the same order, so that their bits are the same.
"""

from __future__ import annotations

import numpy as np

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
def packed(x, ends):
    """Inputs in the order in which `add_strip` reads them: by `DEEP` steps, group, step, token.

    Places that may be negative would take twice as long.
    """
    depth = x.shape[1]
    result = np.empty(x.size, x.dtype)
    begin = 0
    for k in range(0, depth, DEEP):
        end = min(k + DEEP, depth)
        for group in range(len(ends) - 1):
            first, last = ends[group], ends[group + 1]
            for m in range(first, last):
                row, to = x[m], np.uint64(begin + m - first)
                for j in range(np.uint64(k), np.uint64(end)):
                    result[to] = row[j]
                    to += np.uint64(last - first)
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
def lay_first(panel, current):
    """Lays out the first steps of a panel, which nothing went before."""
    begin, row, depth, strips = panel
    lay_out(begin, row, min(DEEP, depth), current, strips)


@njit(cache=True, nogil=True)
def add_panel(inputs, ends, panel, after, current, spare, sums):
    """Adds packed inputs times a panel.

    Args:
        inputs, ends: as `packed` and `shared_out`.
        panel: as `panel_of`, its first steps laid out.
        after: the next one, whose first steps will be laid out; without strips if there is none.
        current, spare: addresses of room for what is laid out, and for what will be.
        sums: [M, APART] of which the panel's columns are begun anew.

    Returns:
        where the next panel's first steps are, and where there is room.
    """
    begin, row, depth, strips = panel
    groups = len(ends) - 1
    at, calls = inputs.ctypes.data, strips * groups
    for m in range(len(sums)):
        sums[m, : strips * COLUMNS] = 0
    for k in range(0, depth, DEEP):
        steps = min(DEEP, depth - k)
        left = depth - k - steps
        if left > 0:
            ahead, stride, coming, wide = begin + row * (k + steps), row, min(DEEP, left), strips
        else:
            ahead, stride, coming, wide = after[0], after[1], min(DEEP, after[2]), after[3]
            if wide == 0:
                coming = 0
        lines = (4 * wide * COLUMNS + LINE - 1) // LINE
        asked = done = call = 0
        for strip in range(strips):
            for group in range(groups):
                call += 1
                until = min(coming, coming * (call + AHEAD) // calls)
                if until > asked:
                    ask(ahead + stride * asked, stride, until - asked, lines)
                    asked = until
                until = coming * call // calls
                if until > done:
                    to = spare + 4 * COLUMNS * done
                    lay_out(ahead + stride * done, stride, until - done, to, wide)
                    done = until
                first = ends[group]
                to = sums.ctypes.data + 4 * (APART * first + COLUMNS * strip)
                add_strip(
                    current + 4 * STRIP * strip,
                    steps,
                    to,
                    at + 4 * steps * first,
                    ends[group + 1] - first,
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
