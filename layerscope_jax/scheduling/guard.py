"""Never slower than the simple way: a watch over what moving and splitting gain on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.demand import answer
from layerscope_jax.scheduling.plan import Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.presched import PreSched, PreSchedState


class Way(NamedTuple):
    """A way to run a layer: with the forecast or without, with transfers or without, on both sides or one."""

    name: str
    forecast: bool
    move: bool
    device: bool


WAYS = (
    Way("full", True, True, True),
    Way("no forecast", False, True, True),
    Way("no transfers", False, False, True),
    Way("host only", False, False, False),
)

TRIAL = {"prefill": 1, "decode": 2}
"""Steps of a trial; the last is measured. In decode the first one clears what the way before left behind."""

FIRST_WAIT, LONGEST_WAIT = 16, 1024
"""Steps between trials: the wait doubles with each that changes nothing."""

SLACK = 0.15
"""Part by which measured times may exceed the planned ones before other ways are tried."""

HOPELESS = 1.25
"""The host alone is not tried where, by the costs, it takes so many times what is measured now."""

MARGIN, LAYER_MARGIN = 0.05, 0.15
"""Part of its time by which another way must be faster to be taken, by all layers and by one alone: the few
samples of a single layer's time say little."""

SAMPLES = 5
"""Measurements of a layer's turn that are kept; their median counts, so that one stall decides nothing."""


@dataclass(frozen=True)
class Watch:
    """What is known of one phase at about one number of tokens.

    Attributes:
        ms: [ways, L, samples] newest measured times of a layer's turn, infinite where there are fewer.
        chosen: [L] the way of each layer.
        planned_ms: [L, samples] what the costs said of the newest measured turns of the chosen way.
        host_ms: [L] what they say of the host alone.
        wait: steps until the next round of trials.
        trial: the way that is tried in this step, in all layers; None outside of trials.
        left: steps of the trial, this one included.
        untried: ways that are still to be tried in this round.
        pause: steps between the last round and the next.
        turns: of layers, by way, for the statistics.
    """

    ms: np.ndarray
    chosen: np.ndarray
    planned_ms: np.ndarray
    host_ms: np.ndarray
    wait: int
    trial: int | None = None
    left: int = 0
    untried: tuple[int, ...] = ()
    pause: int = FIRST_WAIT
    turns: tuple[int, ...] = (0,) * len(WAYS)


class Turn(NamedTuple):
    """A layer's turn whose time the next observation tells; `way` -1 where it does not count."""

    key: tuple[str, int]
    way: int
    layer: int
    planned_ms: float


@dataclass(frozen=True)
class GuardState:
    """PreSched's state, and what the guard knows.

    Attributes:
        inner: the policy's own.
        forecasts: whether there has been one.
        watches: by phase and power of two of the tokens.
        turn: that is under way.
    """

    inner: PreSchedState
    forecasts: bool = False
    watches: Mapping[tuple[str, int], Watch] = field(default_factory=dict)
    turn: Turn | None = None


class Guard:
    """PreSched, layer by layer as far as it pays: it is compared with itself with parts of it left out.

    PreSched says of each layer how long it will take. Where the clock agrees, its choice of all possible ways
    is as good as its word. Where steps take longer, or longer than the host alone should, some are run in the
    other `WAYS` (the tokens are the same), and the measured time of each layer remembered; what is faster by
    a margin is taken. Trials become rare as long as they change nothing. Phases, and steps of other numbers
    of tokens, are watched apart.

    What it knows of time comes with the observation (`Observation.elapsed_ms`), so that it too is a pure
    function, and runs in the simulator.
    """

    name = "auto"
    uses_costs = True

    def __init__(self) -> None:
        self._policy = PreSched()

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> GuardState:
        return GuardState(self._policy.init(geometry, profile))

    def plan(self, state: GuardState, seen: Observation) -> tuple[GuardState, LayerPlan]:
        state = self._measured(state, seen)
        tokens = sum(seen.demand.values()) // state.inner.geometry.experts_per_token
        key = (seen.phase, tokens.bit_length())
        watches = dict(state.watches)
        layers = state.inner.geometry.num_layers
        watch = watches.get(key) or Watch(
            np.full((len(WAYS), layers, SAMPLES), np.inf),
            np.zeros(layers, np.int64),
            np.full((layers, SAMPLES), np.inf),
            np.zeros(layers),
            wait=TRIAL[seen.phase] + 1,
        )
        if seen.layer == 0:
            watch = next_step(watch, seen.phase, bool(seen.forecast) or state.forecasts)
        number = int(watch.chosen[seen.layer]) if watch.trial is None else watch.trial
        way = WAYS[number]
        costs, host_ms = state.inner.costs.alone or state.inner.costs, watch.host_ms.copy()
        host_ms[seen.layer] = costs.layer_ms(tokens) + costs.host_ms.total(seen.demand.values())
        inner, planned_ms = state.inner, host_ms[seen.layer]
        if way.device:
            known = seen if way.forecast else replace(seen, forecast=())
            inner, plan = self._policy.decide(inner, known, move=way.move)
            planned_ms = inner.span_ms[seen.layer]
        else:  # nothing to decide, and PreSched remembers what it knew
            plan = answer(seen, ())
        turns = tuple(count + (index == number) for index, count in enumerate(watch.turns))
        watches[key] = replace(watch, turns=turns, host_ms=host_ms)
        # The first step of a trial is not measured where it has more than one.
        counts = watch.trial is None or watch.left == 1
        turn = Turn(key, number if counts else -1, seen.layer, float(planned_ms))
        forecasts = state.forecasts or bool(seen.forecast)
        return replace(state, inner=inner, watches=watches, turn=turn, forecasts=forecasts), plan

    def wants_forecast(self, state: GuardState) -> bool:
        """Whether the coming layers may make use of a forecast; if not, it need not be computed."""
        if state.turn is None:
            return True
        watch = state.watches[state.turn.key]
        if state.turn.layer == len(watch.chosen) - 1 and watch.trial is None and watch.wait <= 1:
            return True  # a trial may begin
        ways = watch.chosen.tolist() if watch.trial is None else [watch.trial, *watch.untried]
        return any(WAYS[way].forecast for way in ways)

    def report(self, state: GuardState) -> dict[str, Any]:
        """Parts of the layers' turns that were run each way, by phase."""
        found: dict[str, Any] = {}
        for phase in ("prefill", "decode"):
            turns = np.sum([w.turns for (p, _), w in state.watches.items() if p == phase], 0)
            total = np.sum(turns)
            if total:
                found[phase] = {
                    way.name: float(count / total) for way, count in zip(WAYS, turns, strict=True)
                }
        return found

    def _measured(self, state: GuardState, seen: Observation) -> GuardState:
        """With the time of the turn before."""
        if state.turn is None or seen.elapsed_ms <= 0:
            return state
        key, way, layer, planned = state.turn
        if way < 0:
            return state
        watch = state.watches[key]
        ms, planned_ms = watch.ms.copy(), watch.planned_ms
        ms[way, layer] = [seen.elapsed_ms, *ms[way, layer, :-1]]
        if way == watch.chosen[layer]:
            planned_ms = planned_ms.copy()
            planned_ms[layer] = [planned, *planned_ms[layer, :-1]]
        watch = replace(watch, ms=ms, planned_ms=planned_ms)
        return replace(state, watches={**state.watches, key: watch})


def next_step(watch: Watch, phase: str, forecasts: bool) -> Watch:
    """What a step that begins is to be: a trial, or each layer's own way."""
    if watch.trial is not None and watch.left > 1:
        return replace(watch, left=watch.left - 1)
    if watch.trial is not None:  # it is over
        watch = replace(watch, trial=None)
        if not watch.untried:
            chosen = choose(watch)
            same = bool((chosen == watch.chosen).all())
            pause = min(LONGEST_WAIT, 2 * watch.pause) if same else FIRST_WAIT
            return replace(watch, chosen=chosen, wait=pause, pause=pause)
    elif watch.wait > 1:
        return replace(watch, wait=watch.wait - 1)
    else:
        ways = [index for index, way in enumerate(WAYS) if forecasts or not way.forecast or index == 0]
        if not forecasts:
            ways.remove(1)  # without a predictor it is the same as the first
        now = medians(watch.ms)[watch.chosen, np.arange(len(watch.chosen))].sum()
        kept = now <= (1 + SLACK) * medians(watch.planned_ms).sum()
        if kept and now <= watch.host_ms.sum() and not watch.chosen.any():
            pause = min(LONGEST_WAIT, 2 * watch.pause)
            return replace(watch, wait=watch.pause, pause=pause)
        if watch.host_ms.sum() > HOPELESS * now:
            ways.remove(len(WAYS) - 1)
        watch = replace(watch, untried=tuple(way for way in ways if (watch.chosen != way).any()))
        if not watch.untried:
            return replace(watch, wait=watch.pause)
    return replace(watch, trial=watch.untried[0], untried=watch.untried[1:], left=TRIAL[phase])


def choose(watch: Watch) -> np.ndarray:
    """[L] the way of each layer: the fastest for all, and another where a layer is much faster by it."""
    known, layers = medians(watch.ms), np.arange(len(watch.chosen))
    totals = known.sum(1)
    chosen = watch.chosen
    if totals.min() < (1 - MARGIN) * known[chosen, layers].sum():
        chosen = np.full_like(chosen, totals.argmin())
    faster = known.min(0) < (1 - LAYER_MARGIN) * known[chosen, layers]
    return np.where(faster, known.argmin(0), chosen)


def medians(samples: np.ndarray) -> np.ndarray:
    """Of [..., samples], the newest first; infinite where there are none."""
    known = np.where(np.isinf(samples), np.nan, samples)
    known[..., 0] = samples[..., 0]  # the newest is there if any is
    return np.nanmedian(known, -1)
