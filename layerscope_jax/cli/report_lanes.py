"""Lanes of timelines as one SVG picture, and the colours of slices in pictures and pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from layerscope_jax.cli.report_runs import Range, Run, drawn, window
from layerscope_jax.runtime.timeline import LANES
from layerscope_jax.runtime.timeline_figures import Event, lane_and_kind

COLORS = {
    "prefill": "#c9d3e0",
    "decode": "#dde4ec",
    "layer": "#b4c1d1",
    "plan": "#5d6b7c",
    "wait for link": "#f2b8b5",
    "wait for host": "#cfe3c3",
    "attention": "#4c78a8",
    "experts": "#54a24b",
    "experts, attention": "#3b8f8c",
    "logits": "#8fb0d3",
    "experts, logits": "#7fbfbc",
    "whole step": "#4c78a8",
    "demand": "#d6453d",
    "prefetch": "#f2a23a",
    "read": "#7b4ea3",
    "read ahead": "#c3a6dc",
}
"""Colour of each kind of slice."""

ROWS = {"prefill": 0, "decode": 0, "layer": 1}
"""Row of a slice in the scheduler's lane, in which slices lie within each other; 2 for all others."""

WIDTH, ROW, LEFT, GAP = 1000, 16, 80, 6
MOST_SLICES = 20_000


def lanes_svg(runs: Sequence[Run], steps: Range, layers: Range) -> str:
    """Returns a picture of the lanes of runs, one below the other, on one scale.

    Args:
        runs: the runs.
        steps, layers: what to draw; None for everything.

    Raises:
        ValueError: if that is nothing, or more than a picture can show.
    """
    chosen = [drawn(run, steps, MOST_SLICES)[0] for run in runs]
    if not all(chosen):
        raise ValueError(f"there are no steps {steps} to draw in every run; choose others with --steps")
    windows = [window(slices, layers) for slices in chosen]
    inside = [
        [event for event in slices if event["ts"] + event["dur"] >= begin and event["ts"] <= end]
        for slices, (begin, end) in zip(chosen, windows, strict=True)
    ]
    if sum(map(len, inside)) > MOST_SLICES:
        raise ValueError(f"more than {MOST_SLICES} slices; choose fewer with --steps and --layers")
    scale = WIDTH / max(end - begin for begin, end in windows)
    parts: list[str] = []
    top = 0
    for run, slices, (begin, end) in zip(runs, inside, windows, strict=True):
        parts.append(_text(0, top + 13, f"{run.title}, {1e-3 * (end - begin):,.1f} ms", "bold"))
        top += 22
        for lane in LANES:
            own = [event for event in slices if lane_and_kind(event)[0] == lane]
            if not own:
                continue
            parts.append(_text(0, top + 12, lane))
            parts += [_rect(event, begin, end, scale, top) for event in own]
            top += ROW * (3 if lane == "scheduler" else 1) + GAP
        top += 12
    kinds = {lane_and_kind(event)[1] for slices in inside for event in slices}
    legend, height = _legend([kind for kind in COLORS if kind in kinds], top)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join([*parts, *legend])
        + "\n</svg>\n"
    )


def _rect(event: Event, begin: float, end: float, scale: float, top: int) -> str:
    """Returns a slice, cut to the window."""
    lane, kind = lane_and_kind(event)
    first, last = max(begin, event["ts"]), min(end, event["ts"] + event["dur"])
    y = top + ROW * (ROWS.get(kind, 2) if lane == "scheduler" else 0)
    x, width = LEFT + scale * (first - begin), max(0.3, scale * (last - first))
    place = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 2}"'
    title = f"<title>{escape(str(event['name']))}</title>"
    return f'<rect {place} fill="{COLORS.get(kind, "#999999")}">{title}</rect>'


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-weight="{weight}">{escape(text)}</text>'


def _legend(kinds: Sequence[str], top: int) -> tuple[list[str], int]:
    """Returns the parts of a legend, and the height of the picture with it."""
    parts, x, y = [], 0.0, top
    for kind in kinds:
        width = 34 + 7.5 * len(kind)
        if x + width > LEFT + WIDTH:
            x, y = 0.0, y + 20
        parts.append(f'<rect x="{x:g}" y="{y}" width="14" height="14" fill="{COLORS[kind]}"/>')
        parts.append(_text(x + 18, y + 12, kind))
        x += width
    return parts, y + 24
