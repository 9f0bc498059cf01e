"""Figures of a timeline: hits and forecasts by layer, bytes by cause, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerscope_jax.runtime.timeline import LANES

Event = Mapping[str, Any]
"""An event of a timeline's file."""

BUSY = (
    "device and host",
    "device alone",
    "host alone",
    "link alone",
    "disk alone",
    "none of them",
    "between steps",
)
"""What was busy at a time, as far as figures tell it apart: a link or a disk counts if nothing computes."""


@dataclass
class LayerFigures:
    """Counts of one MoE layer, over all steps of a timeline that planned it.

    Attributes:
        layer: its number.
        experts, hits: active experts, and those of them that were resident when the layer was planned.
        foreseen, foreseeable: of the active experts of decode steps with a forecast, those that were forecast
            one layer earlier, and all.
        demand_bytes, prefetch_bytes: bytes of the layer's experts that were copied.
    """

    layer: int
    experts: int = 0
    hits: int = 0
    foreseen: int = 0
    foreseeable: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Fraction of active experts that were resident; None if the layer was not planned."""
        return self.hits / self.experts if self.experts else None

    @property
    def recall(self) -> float | None:
        """Fraction of active experts that were forecast; None without a forecast."""
        return self.foreseen / self.foreseeable if self.foreseeable else None


@dataclass
class Figures:
    """Figures of one process of a timeline.

    Attributes:
        layers: by layer, those that were planned or copied to.
        bytes: bytes by cause: "demand" and "prefetch" over the link, "read" and "read ahead" from the disk.
        busy_s: time (s) by what was busy, in the order of `BUSY`; its sum is the time that is drawn.
        steps: number of steps by phase.
    """

    layers: list[LayerFigures]
    bytes: dict[str, int] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    @property
    def drawn_s(self) -> float:
        """Time (s) from the beginning of the first slice to the end of the last."""
        return sum(self.busy_s.values())


def lane_and_kind(event: Event) -> tuple[str, str]:
    """Returns the lane and the kind of a slice.

    >>> lane_and_kind({"cat": "device,experts, attention"})
    ('device', 'experts, attention')
    """
    lane, _, kind = str(event["cat"]).partition(",")
    return lane, kind


def figures_of(slices: Sequence[Event]) -> Figures:
    """Returns the figures of the slices of one process."""
    layers: dict[int, LayerFigures] = {}
    moved: dict[str, int] = {}
    steps: dict[str, int] = {}
    for event in slices:
        (lane, kind), args = lane_and_kind(event), event["args"]
        if kind == "layer" and "demand" in args:
            _count(layers.setdefault(args["layer"], LayerFigures(args["layer"])), args)
        elif lane in ("link", "disk"):
            moved[kind] = moved.get(kind, 0) + args["bytes"]
            layer = layers.setdefault(args["layer"], LayerFigures(args["layer"]))
            layer.demand_bytes += args["bytes"] * (kind == "demand")
            layer.prefetch_bytes += args["bytes"] * (kind == "prefetch")
        elif kind in ("prefill", "decode"):
            steps[kind] = steps.get(kind, 0) + 1
    return Figures([layers[number] for number in sorted(layers)], moved, busy_times(slices), steps)


def _count(layer: LayerFigures, args: Mapping[str, Any]) -> None:
    demand, expected = args["demand"], args.get("expected")
    layer.experts += len(demand)
    layer.hits += len(args["hits"])
    if expected is not None and args["phase"] == "decode":
        layer.foreseen += len(demand.keys() & expected.keys())
        layer.foreseeable += len(demand)


def busy_times(slices: Sequence[Event]) -> dict[str, float]:
    """Returns the time (s) by what was busy, from the first slice to the last; see `BUSY`.

    >>> step = {"cat": "scheduler,decode", "ts": 0, "dur": 6e6}
    >>> device = {"cat": "device,experts", "ts": 0, "dur": 2e6}
    >>> link = {"cat": "link,demand", "ts": 1e6, "dur": 3e6}
    >>> {what: time for what, time in busy_times([step, device, link]).items() if time}
    {'device alone': 2.0, 'link alone': 2.0, 'none of them': 2.0}
    """
    changes: list[tuple[float, int, int]] = []  # time, lane, +1 or -1
    for event in slices:
        lane, kind = lane_and_kind(event)
        if lane == "scheduler" and kind not in ("prefill", "decode"):
            continue
        number = LANES.index(lane)
        changes += [(event["ts"], number, 1), (event["ts"] + event["dur"], number, -1)]
    changes.sort()
    open_slices, total = [0] * len(LANES), dict.fromkeys(BUSY, 0.0)
    before = changes[0][0] if changes else 0.0
    for when, lane_number, change in changes:
        total[_busy(open_slices)] += 1e-6 * (when - before)
        before = when
        open_slices[lane_number] += change
    return total


def _busy(open_slices: Sequence[int]) -> str:
    step, device, host, link, disk = open_slices
    if device or host:
        return "device and host" if device and host else "device alone" if device else "host alone"
    if link or disk:
        return "link alone" if link else "disk alone"
    return "none of them" if step else "between steps"
