"""Timelines on disk: Chrome's trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A file holds one process per run, measured or simulated, and one thread per lane. What a trace has no place
for (statistics, the number of spans that were left out) stands in "otherData".
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.runtime.statistics import RunStats
from layerscope_jax.runtime.timeline import LANES, Decided, Recording
from layerscope_jax.scheduling.plan import LayerPlan
from layerscope_jax.support.files import read_json, write_file
from layerscope_jax.support.spans import NO_LAYER, Moved, Span

FORMAT = "layerscope timeline"

COLORS = {
    "attention": "thread_state_running",
    "experts": "good",
    "demand": "terrible",
    "prefetch": "rail_response",
    "read": "bad",
    "read ahead": "rail_animation",
    "plan": "grey",
}
"""Chrome's names of colours, by kind of span; Perfetto has colours of its own, by the names of slices."""

MOVES = ("load", "prefetch", "evict", "read", "read_ahead")


def write_timeline(path: str | Path, recordings: Sequence[Recording]) -> None:
    """Writes recordings to a file, each as a process of its own; whole or not at all.

    Raises:
        ValueError: if the file cannot be written.
    """
    processes: list[dict[str, Any]] = [
        {
            "pid": pid,
            "name": recording.name,
            "clock": recording.clock,
            "left_out": recording.left_out,
            "outcomes": list(recording.outcomes),
            "about": dict(recording.about),
        }
        for pid, recording in enumerate(recordings, 1)
    ]

    def events() -> Iterator[Mapping[str, Any]]:
        for process, recording in zip(processes, recordings, strict=True):
            yield from _names(process)
            yield from _slices(process["pid"], recording.spans)

    _write(Path(path), processes, events())


def of_call(recording: Recording, stats: RunStats, model: Model) -> Recording:
    """Returns the recording of a call with what it was of: name, statistics and numbers of the model."""
    config, bank = model.config, model.bank
    return replace(
        recording,
        name=f"{stats.policy}, {stats.budget_bytes / 1e6:,.1f} MB of experts on the device",
        outcomes=[stats.to_json()],
        about={
            "family": config.family,
            "moe_layers": config.num_moe_layers,
            "experts": config.num_experts,
            "expert_bytes": bank.expert_bytes,
            "device": model.device.device_kind,
        },
    )


def check_place(path: str | Path) -> None:
    """Refuses a path that cannot be a timeline's.

    Raises:
        ValueError: if it is no path, or that of a folder.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"timeline must be the name of a file or None, got {str(path)[:40]!r}")
    if Path(path).is_dir() or not Path(path).name:
        raise ValueError(f"timeline must be the name of a file, got the folder {str(path)!r}")


def check_timeline(path: str | Path, model: Model) -> None:
    """Refuses a timeline of an engine that records none; otherwise as `check_place`.

    Raises:
        ValueError: if several devices share the model's experts.
    """
    check_place(path)
    if model.partition is not None:
        count = len(model.partition.devices)
        raise ValueError(f"a timeline is of one device, and {count} share the experts; leave timeline out")


def read_timeline(path: str | Path) -> dict[str, Any]:
    """Returns the content of a file that `write_timeline` or `join_timelines` wrote.

    Raises:
        ValueError: if the file is missing or is no such file.
    """
    content = read_json(Path(path), "write it again with --timeline")
    about = content.get("otherData")
    processes = about.get("processes") if isinstance(about, dict) else None
    events = content.get("traceEvents")
    if (
        not isinstance(about, dict)
        or about.get("format") != FORMAT
        or not isinstance(events, list)
        or not isinstance(processes, list)
        or not all(isinstance(process, dict) and {"pid", "name"} <= process.keys() for process in processes)
    ):
        raise ValueError(
            f"{path}: expected a timeline that `layerscope generate --timeline FILE` wrote, or demo or "
            "simulate; got other JSON"
        )
    known = {process["pid"] for process in processes}
    for number, event in enumerate(events):
        if not (isinstance(event, dict) and event.get("pid") in known and _is_whole(event)):
            raise ValueError(
                f"{path}: traceEvents[{number}] is no event of a timeline: {str(event)[:80]}; write it again "
                "with --timeline"
            )
    return content


def _is_whole(event: Mapping[str, Any]) -> bool:
    """Whether an event has what is read of it."""
    if event.get("ph") != "X":
        return True
    numbers = [event.get("ts"), event.get("dur")]
    args, lane = event.get("args"), str(event.get("cat")).partition(",")[0]
    return (
        all(isinstance(number, int | float) for number in numbers)
        and lane in LANES
        and isinstance(args, dict)
        and isinstance(args.get("step"), int)
        and isinstance(args.get("layer", 0), int)
        and (lane not in ("link", "disk") or isinstance(args.get("bytes"), int))
    )


def join_timelines(path: str | Path, sources: Iterable[str | Path]) -> None:
    """Writes the processes of several timelines into one file, in order.

    Raises:
        ValueError: if one of them is no timeline, or the file cannot be written.
    """
    processes: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for source in sources:
        content = read_timeline(source)
        first = len(processes)
        numbers = {}
        for number, process in enumerate(content["otherData"]["processes"], first + 1):
            numbers[process["pid"]] = number
            processes.append(process | {"pid": number})
        events += [event | {"pid": numbers[event["pid"]]} for event in content["traceEvents"]]
    _write(Path(path), processes, events)


def _write(path: Path, processes: Sequence[Any], events: Iterable[Mapping[str, Any]]) -> None:
    head = {"format": FORMAT, "version": 1, "processes": processes}

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8") as out:
            out.write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(head)}, "traceEvents": [')
            for number, event in enumerate(events):
                out.write(
                    (",\n" if number else "\n")
                    + json.dumps(event, separators=(",", ":"), default=operator.index)
                )
            out.write("\n]}\n")

    check_place(path)
    write_file(path, write)


def _names(process: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the events that name a process and its lanes, and order them."""
    pid, clock = process["pid"], process["clock"]
    meta = {"ph": "M", "pid": pid}
    yield {**meta, "name": "process_name", "args": {"name": f"{process['name']} ({clock} clock)"}}
    yield {**meta, "name": "process_sort_index", "args": {"sort_index": pid}}
    for tid, lane in enumerate(LANES, 1):
        yield {**meta, "name": "thread_name", "tid": tid, "args": {"name": lane}}
        yield {**meta, "name": "thread_sort_index", "tid": tid, "args": {"sort_index": tid}}


def _slices(pid: int, spans: Iterable[Span]) -> Iterator[dict[str, Any]]:
    """Yields an event for each span, in the order of their beginnings."""
    spans = sorted(spans, key=lambda span: (span.begin, -span.end, LANES.index(span.lane)))
    start = spans[0].begin if spans else 0.0
    decided = {(span.step, span.layer): span.what for span in spans if isinstance(span.what, Decided)}
    planned: dict[tuple[int, int], tuple[int, int]] = {}  # (layer, expert) -> step, layer of its last plan
    for span in spans:
        if isinstance(span.what, Decided):
            plan = span.what.plan
            for expert in (*plan.load, *plan.prefetch, *plan.read, *plan.read_ahead):
                planned[expert] = (span.step, span.layer)
        event: dict[str, Any] = {
            "name": name_of(span),
            "cat": f"{span.lane},{span.kind}",
            "ph": "X",
            "ts": round(1e6 * (span.begin - start), 3),
            "dur": round(1e6 * (span.end - span.begin), 3),
            "pid": pid,
            "tid": 1 + LANES.index(span.lane),
            "args": _args(span, decided, planned),
        }
        if span.kind in COLORS:
            event["cname"] = COLORS[span.kind]
        yield event


def name_of(span: Span) -> str:
    """Returns the name of a span's slice.

    >>> name_of(Span("host", "experts", 0.0, 1.0, step=3, layer=5, what=(1, 2), items=2))
    'experts, step 3, layer 5'
    >>> name_of(Span("link", "prefetch", 0.0, 1.0, step=3, layer=6, what=Moved(9, 300), items=0))
    'prefetch of layer 6, expert 9'
    >>> name_of(Span("scheduler", "decode", 0.0, 1.0, step=3, layer=NO_LAYER, what=None, items=0))
    'decode, step 3'
    """
    if isinstance(span.what, Moved):
        return f"{span.kind} of layer {span.layer}, expert {span.what.expert}"
    return f"{span.kind}, step {span.step}" + (f", layer {span.layer}" if span.layer != NO_LAYER else "")


def _args(
    span: Span,
    decided: Mapping[tuple[int, int], Decided],
    planned: Mapping[tuple[int, int], tuple[int, int]],
) -> dict[str, Any]:
    """Returns the details of a slice, with the plan behind it.

    Args:
        span: the span.
        decided: decisions by step and layer.
        planned: (layer, expert) -> step and layer of the plan that last asked for a copy or read.
    """
    args: dict[str, Any] = {"step": span.step}
    if span.layer != NO_LAYER:
        args["layer"] = span.layer
    what = span.what
    if isinstance(what, Decided):
        args |= {"phase": what.phase, **_moves(what.plan), "hits": what.hits}
        args["demand"] = {int(expert): tokens for expert, tokens in what.demand.items()}
        if what.expected is not None:
            args["expected"] = {expert: round(tokens, 3) for expert, tokens in what.expected.items()}
    elif isinstance(what, Moved):
        args |= what._asdict()
        if (plan_of := planned.get((span.layer, what.expert))) is not None:
            args["planned"] = {"step": plan_of[0], "layer": plan_of[1]}
    elif what:
        args["experts"] = what
        # A device that works on while Python goes on to the next layer's attention ends both at once.
        behind = decided.get((span.step, span.layer - (span.kind == "experts, attention")))
        if behind is not None:
            args["plan"] = _moves(behind.plan)
    return args


def _moves(plan: LayerPlan) -> dict[str, Any]:
    """Returns where a plan computes experts, and what it moves, if anything."""
    moves = {name: getattr(plan, name) for name in MOVES}
    return {
        "device": plan.device,
        "host": plan.host,
        **{name: moved for name, moved in moves.items() if moved},
    }
