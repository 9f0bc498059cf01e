"""The page of a report: HTML with everything in it, which needs no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from layerscope_jax.cli.report_lanes import COLORS, ROWS
from layerscope_jax.cli.report_runs import Range, Run, drawn, unknown
from layerscope_jax.runtime.timeline import LANES
from layerscope_jax.runtime.timeline_figures import BUSY, LayerFigures, lane_and_kind

TEMPLATE = Path(__file__).with_name("report.html")

MOST_SLICES = 40_000
"""Slices of a run that a page draws well."""

BUSY_COLORS = ("#3b8f8c", "#54a24b", "#4c78a8", "#d6453d", "#7b4ea3", "#8a95a3", "#d3d9e0")

RUN_COLORS = ("#4c78a8", "#f2a23a", "#54a24b", "#d6453d", "#7b4ea3", "#3b8f8c", "#8a95a3")

NOT_KNOWN = "-"

Format = Callable[[Any], str]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:,.2f} ms"


STATISTICS: tuple[tuple[str, str, Format], ...] = (
    ("policy", "policy", str),
    ("predictor", "predictor", str),
    ("phase", "phase", str),
    ("mode", "mode", str),
    ("budget_bytes", "device memory for experts", _megabytes),
    ("total_s", "total time", _milliseconds),
    ("ttft_s", "time to first token", _milliseconds),
    ("tpot_s", "time per output token", _milliseconds),
    ("tokens_per_s", "tokens/s", lambda value: f"{value:,.1f}"),
    ("device_share", "device busy", _share),
    ("host_share", "host busy", _share),
    ("link_share", "link busy", _share),
    ("disk_share", "disk busy", _share),
    ("hit_rate", "hit rate", _share),
    ("token_hit_rate", "hit rate, weighted by tokens", _share),
    ("forecast_recall", "forecast recall", _share),
    ("prefetch_on_time", "used prefetches that were on time", _share),
    ("share_of_bound", "share of the lower bound", _share),
)
"""Statistics of the first table: field of `Outcome`, what to call it, how to write it."""

BYTES: tuple[tuple[str, str], ...] = (
    ("bytes_demand", "on-demand loads"),
    ("bytes_prefetch", "prefetches"),
    ("bytes_wasted", "of them never used"),
    ("bytes_read", "read from the disk"),
    ("bytes_read_ahead", "of them ahead of time"),
    ("bytes_read_wasted", "read ahead and never used"),
)


def page(runs: Sequence[Run], steps: Range, layers: Range) -> str:
    """Returns the page of some runs.

    Args:
        runs: the runs, from left to right.
        steps: steps whose lanes are drawn; None for as many as a page draws well.
        layers: layers that are shown at first; None for all.
    """
    pictures = [_picture(run, steps) for run in runs]
    data = {"runs": pictures, "colors": COLORS, "rows": ROWS, "lanes": LANES, "layers": layers}
    parts = {
        "RUNS": _statistics(runs),
        "TIME": "".join(_time(run) for run in runs),
        "HITS": _by_layer(runs, "hit rate", lambda layer: layer.hit_rate),
        "RECALL": _by_layer(runs, "forecast recall", lambda layer: layer.recall),
        "BYTES": _bytes(runs),
        "UNKNOWN": "".join(
            _unknown(run, str(picture["left"])) for run, picture in zip(runs, pictures, strict=True)
        ),
        # "<" is escaped, so that no text of a file can end the script.
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    before, *marked = text.split("@@")
    pieces = [before]
    for name, rest in zip(marked[::2], marked[1::2], strict=True):
        pieces += [parts[name], rest]
    return "".join(pieces)


def _picture(run: Run, steps: Range) -> dict[str, Any]:
    """Returns what the page's script draws of a run."""
    slices, left = drawn(run, steps, MOST_SLICES)
    kinds: dict[str, int] = {}
    rows = []
    for event in slices:
        (lane, kind), args = lane_and_kind(event), event["args"]
        detail = {key: value for key, value in args.items() if key not in ("step", "layer", "plan", "phase")}
        number = kinds.setdefault(kind, len(kinds))
        place = [LANES.index(lane), number, event["ts"], event["dur"], args["step"], args.get("layer", -1)]
        rows.append([*place, detail] if detail else place)
    return {"title": run.title, "kinds": list(kinds), "slices": rows, "left": left}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; the first cell of each row names it."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(first)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _columns(runs: Sequence[Run]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns a column for each part of each run of which there are statistics."""
    return [
        (run.title + (f", {outcome['phase']}" if len(run.outcomes) > 1 else ""), outcome)
        for run in runs
        for outcome in run.outcomes
    ]


def _statistics(runs: Sequence[Run]) -> str:
    columns = _columns(runs)
    rows = []
    for field, name, written in STATISTICS:
        values = [_known(field, outcome) for _, outcome in columns]
        if any(value is not None for value in values):
            rows.append([name, *(NOT_KNOWN if value is None else written(value) for value in values)])
    return _table(["", *(title for title, _ in columns)], rows) if rows else "<p>No statistics.</p>"


def _known(field: str, outcome: Mapping[str, Any]) -> Any:
    """Returns a statistic; None if it is not known, or a zero that stands for that (see `Outcome`)."""
    value = outcome.get(field)
    if field in ("ttft_s", "tpot_s") or (field == "disk_share" and outcome.get("host_hit_rate") is None):
        return value or None
    return value


def _bytes(runs: Sequence[Run]) -> str:
    columns = _columns(runs)
    rows = []
    for field, name in BYTES:
        values = [outcome.get(field) for _, outcome in columns]
        if any(values):
            rows.append([name, *(NOT_KNOWN if value is None else _megabytes(value) for value in values)])
    if not rows:
        return "<p>No expert was moved.</p>"
    return _table(["", *(title for title, _ in columns)], rows)


def _time(run: Run) -> str:
    """Returns a bar and a table of where the time of a run went."""
    busy, total = run.figures.busy_s, run.figures.drawn_s
    if not total:
        return ""
    bars, x = [], 0.0
    for name, color in zip(BUSY, BUSY_COLORS, strict=True):
        width = 100 * busy[name] / total
        bars.append(
            f'<rect x="{x:.3f}%" width="{width:.3f}%" height="22" fill="{color}"><title>{name} '
            f"{width:.1f}%</title></rect>"
        )
        x += width
    items = "".join(
        f'<li><i style="background:{color}"></i>{name}: {_milliseconds(busy[name])}, '
        f"{busy[name] / total:.1%}</li>"
        for name, color in zip(BUSY, BUSY_COLORS, strict=True)
        if busy[name] > 1e-6 * total
    )
    steps = ", ".join(f"{count} {phase}" for phase, count in run.figures.steps.items())
    return (
        f"<h3>{escape(run.title)}</h3><p>{_milliseconds(total)}; steps: {escape(steps)}</p>"
        f'<svg class="bar" width="100%" height="22">{"".join(bars)}</svg><ul class="key">{items}</ul>'
    )


def _by_layer(runs: Sequence[Run], what: str, value: Callable[[LayerFigures], float | None]) -> str:
    """Returns a chart of a share by layer, with a line for each run of which it is known."""
    lines: list[tuple[str, list[tuple[int, float]]]] = []
    for run in runs:
        points = [(layer.layer, share) for layer in run.figures.layers if (share := value(layer)) is not None]
        if points:
            lines.append((run.title, points))
    if not lines:
        return f"<p>No {what} is known.</p>"
    last = max(1, *(layer for _, points in lines for layer, _ in points))
    width, height = 720, 180

    def place(layer: int, share: float) -> tuple[float, float]:
        return 40 + (width - 60) * layer / last, 10 + (height - 40) * (1 - share)

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = place(0, share)[1]
        parts.append(f'<line x1="40" x2="{width - 20}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="34" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
    for layer in sorted({0, last // 2, last}):
        parts.append(
            f'<text x="{place(layer, 0)[0]:.1f}" y="{height - 12}" text-anchor="middle">{layer}</text>'
        )
    keys = []
    for number, (title, points) in enumerate(lines):
        color = RUN_COLORS[number % len(RUN_COLORS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for layer, share in points:
            x, y = place(layer, share)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"><title>layer {layer}: {share:.1%}'
                "</title></circle>"
            )
        keys.append(f'<li><i style="background:{color}"></i>{escape(title)}</li>')
    return (
        f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="{what} by layer">'
        f'{"".join(parts)}</svg><ul class="key">{"".join(keys)}</ul>'
    )


def _unknown(run: Run, left: str) -> str:
    sentences = [*unknown(run), *([f"Of the lanes, {left}."] if left else [])]
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h3>{escape(run.title)}</h3><ul>{items}</ul>" if items else ""
