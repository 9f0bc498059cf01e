"""Timeline of a run: what device, host, link, disk and scheduler did when, and the plan behind it.

A `Timeline` is filled by the engine from the wall clock and by the simulator from its virtual clock;
`layerscope_jax.runtime.timeline_files` writes both to one kind of file. A run without one pays for a
comparison with None per span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from layerscope_jax.scheduling.plan import LayerPlan, Observation, Phase
from layerscope_jax.support.spans import Span, Spans

LANES = ("scheduler", "device", "host", "link", "disk")
"""Lanes of a timeline, from the top down."""


class Decided(NamedTuple):
    """What was known and decided when a layer was planned; details of its spans "layer".

    Attributes:
        phase: "prefill" or "decode".
        plan: the layer's plan.
        demand: tokens of each active expert, by expert.
        hits: active experts that were resident.
        expected: of n active experts, tokens of the n that were thought likeliest one layer earlier, by
            expert; None without a forecast.
    """

    phase: Phase
    plan: LayerPlan
    demand: Mapping[int, int]
    hits: tuple[int, ...]
    expected: Mapping[int, float] | None

    @property
    def items(self) -> int:
        """Number of experts that it names."""
        plan = self.plan
        named = (plan.device, plan.host, plan.evict, plan.load, plan.prefetch, plan.read, plan.read_ahead)
        return sum(map(len, named)) + len(self.demand) + len(self.hits) + len(self.expected or ())


class Timeline(Spans):
    """Spans of a run, with the plans behind them.

    Args:
        most_bytes: see `Spans`.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._decided: Decided | None = None
        self._given: list[int] = []  # experts that the device was given since its last span

    def decide(self, seen: Observation, plan: LayerPlan, forecast: Sequence[float]) -> None:
        """Enters the plan of a layer, before it is carried out.

        Args:
            seen: the observation from which the layer was planned.
            plan: the plan.
            forecast: [E] tokens of each expert that were expected one layer earlier; empty without a
                forecast.
        """
        layer, resident = seen.layer, seen.resident
        hits = tuple([expert for expert in seen.demand if (layer, expert) in resident])
        expected: dict[int, float] | None = None
        if forecast:
            likeliest = sorted(range(len(forecast)), key=forecast.__getitem__, reverse=True)
            expected = {expert: float(forecast[expert]) for expert in likeliest[: len(seen.demand)]}
        self._decided = Decided(seen.phase, plan, dict(seen.demand), hits, expected)

    def end_step(self, length: int, began: float, ended: float) -> None:
        """Adds the span of a step that ran `length` tokens of each row: 1 in decode."""
        self.add("scheduler", "decode" if length == 1 else "prefill", began, ended)

    def whole_step(self, step: int, length: int, began: float, ended: float) -> None:
        """Adds the spans of a step that was one program, whose layers nobody saw."""
        self.step = step
        self.add("device", "whole step", began, ended)
        self.end_step(length, began, ended)

    def end_layer(self, layer: int, began: float, ended: float) -> None:
        """Adds the span of a layer, with what `decide` was told last."""
        decided = self._decided
        self.add("scheduler", "layer", began, ended, layer, decided, 0 if decided is None else decided.items)

    def give(self, experts: Sequence[int]) -> None:
        """Enters that the device got experts to compute, which the device's next span includes."""
        self._given += experts

    def device(self, since: float, until: float, layer: int, also: str = "") -> None:
        """Adds a span of the device, which ends when its work is known to be done.

        Args:
            since: when it got its work (s).
            until: when the work was done (s).
            layer: layer of the last part of the work.
            also: work that followed the experts, such as "attention".
        """
        kind = "experts, " * bool(self._given) + also if also else "experts"
        self.add("device", kind, since, until, layer, tuple(self._given), len(self._given))
        self._given = []


@dataclass(frozen=True)
class Recording:
    """A recorded run, to be written.

    Attributes:
        name: what to call it.
        clock: "real" or "virtual".
        spans: its spans, in any order.
        left_out: number of spans that were not kept for lack of memory.
        outcomes: statistics of its parts (`Outcome.to_json`), such as the whole call, or prefill and decode.
        about: other facts, by name.
    """

    name: str = ""
    clock: Literal["real", "virtual"] = "real"
    spans: Sequence[Span] = ()
    left_out: int = 0
    outcomes: Sequence[Mapping[str, Any]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
