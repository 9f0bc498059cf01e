"""Policy "auto": PreSched, cut back where measured times show that moving or splitting does not pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from layerscope_jax.scheduling.costs import MOST_MS, HardwareProfile
from layerscope_jax.scheduling.demand import answer
from layerscope_jax.scheduling.plan import Geometry, LayerPlan, Observation
from layerscope_jax.scheduling.policy import PolicyBase
from layerscope_jax.scheduling.presched import PreSched, PreSchedState


class Way(NamedTuple):
    """A way to run a layer: with or without forecast, transfers and the device."""

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

TRIAL = {"prefill": 1, "decode": 3}
"""Steps of a trial. In decode the first one clears the effects of the previous way, and is not measured."""

FIRST_WAIT, LONGEST_WAIT, LONGER = 16, 1024, 4
"""Steps between rounds of trials. The wait grows by `LONGER` after each round that changes nothing, and never
falls, so that trials end on a machine whose times vary a lot."""

SLACK = 0.15
"""Share by which measured times may differ from planned ones before other ways are tried."""

HOPELESS = 1.25
"""The host alone is not tried if its time by the costs is this many times the measured and planned time."""

MARGIN, LAYER_MARGIN = 0.06, 0.45
"""Share of the time by which another way must be faster to be chosen, for all layers and for a single one, if
each was measured once; it falls with the number of measurements. For a single layer, each measured time must
also be below all of its current way."""

SAMPLES = 5
"""Measurements kept for each layer and way; their median counts, so that a single stall decides nothing."""

PROOF = SAMPLES + 1
"""Steps after a change until as many as are kept were measured. The first one is not: see `TRIAL`."""


@dataclass(frozen=True)
class Watch:
    """Measurements and choices for one phase at about one number of tokens.

    Attributes:
        ms: [ways, L, samples] newest measured times of a layer's turn, infinite where there are fewer.
        chosen: [L] the way of each layer.
        planned_ms: [L, samples] times by the costs of the newest measured turns of the chosen way.
        alone_ms: time of a whole step by the host alone, by the costs, in the step before a round of trials.
        wait: steps until the next round of trials.
        trial: the way that is tried in this step, in all layers; None outside of trials.
        left: steps of the trial, this one included.
        untried: ways that are still to be tried in this round.
        pause: steps between the last round and the next.
        before: [L] the way of each layer before the last change, which comes back if that does not prove
            faster; None if none is to be proved.
        proof: steps until then, this one included.
        turns: [ways] of layers, for the statistics.
    """

    ms: np.ndarray
    chosen: np.ndarray
    planned_ms: np.ndarray
    turns: np.ndarray
    wait: int
    alone_ms: float = 0.0
    trial: int | None = None
    left: int = 0
    untried: tuple[int, ...] = ()
    pause: int = FIRST_WAIT
    before: np.ndarray | None = None
    proof: int = 0

    @property
    def measures(self) -> bool:
        """Whether the current step is measured, if it is not one that clears effects of another way."""
        return self.trial is not None or self.wait <= SAMPLES or self.proof > 0


class Turn(NamedTuple):
    """A layer in the current step: the way it is run, its planned time, and its demand."""

    way: int
    planned_ms: float
    demand: Mapping[int, int]


@dataclass(frozen=True)
class GuardState:
    """PreSched's state, and the guard's measurements.

    Attributes:
        inner: state of PreSched.
        forecasts: whether there has been a forecast.
        watches: by phase and power of two of the tokens; as of the end of the previous step.
        key: key in `watches` of the current step.
        turns: turns of its layers so far; empty if nothing is measured in it.
        took_ms: measured time of each turn but the last; 0 if unknown.
        ended: whether every layer of the step was planned.
        wants: whether the next layer, and the others of its step, may use a forecast.
    """

    inner: PreSchedState
    forecasts: bool = False
    watches: Mapping[tuple[str, int], Watch] = field(default_factory=dict)
    key: tuple[str, int] = ("", 0)
    turns: tuple[Turn, ...] = ()
    took_ms: tuple[float, ...] = ()
    ended: bool = True
    wants: bool = True


class Guard(PolicyBase):
    """Runs PreSched in each layer as far as it pays, by comparing it with simpler ways to run the layer.

    PreSched predicts how long each layer will take. Where the clock agrees, its choice is trusted. Where it
    does not, or where the host alone should take less, some steps are run in the other `WAYS` (the tokens are
    the same), each layer's time is remembered, and a way that is faster by a margin is chosen. A machine may
    be faster in one moment than in the next, and with it whatever is tried then: a choice whose next steps
    take longer than those before the trials is taken back. Trials become rare as long as they change
    nothing. Phases, and steps with other numbers of tokens, are watched separately.

    Times come with the observation (`Observation.elapsed_ms`), so the policy is a pure function, and runs in
    the simulator.
    """

    name = "auto"
    uses_costs = True
    spares_forecasts = True
    predictor = "gate"  # the best that needs no training

    def __init__(self) -> None:
        self._policy = PreSched()

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> GuardState:
        return GuardState(self._policy.init(geometry, profile))

    def plan(self, state: GuardState, seen: Observation) -> tuple[GuardState, LayerPlan]:
        took_ms = (*state.took_ms, seen.elapsed_ms) if state.turns else ()
        key, turns, watches = state.key, state.turns, state.watches
        if seen.layer == 0:  # the books are kept by the step: by the layer it would take longer than planning
            watches = dict(watches)
            if key in watches and state.ended:
                watches[key] = self._measured(watches[key], state, took_ms)
            tokens = sum(seen.demand.values()) // state.inner.geometry.experts_per_token
            key, turns, took_ms = (seen.phase, tokens.bit_length()), (), ()
            watch = watches.get(key) or new_watch(state.inner.geometry.num_layers, seen.phase)
            watches[key] = next_step(watch, seen.phase, bool(seen.forecast) or state.forecasts)
        watch = watches[key]
        number = int(watch.chosen[seen.layer]) if watch.trial is None else watch.trial
        way, inner, planned_ms = WAYS[number], state.inner, 0.0
        if way.device:
            known = seen if way.forecast else replace(seen, forecast=())
            inner, plan = self._policy.decide(inner, known, move=way.move)
            planned_ms = float(inner.span_ms[seen.layer])
        else:  # nothing to decide; PreSched's state stays as it was
            plan = answer(seen, ())
        forecasts, ended = state.forecasts or bool(seen.forecast), seen.layer + 1 == len(watch.chosen)
        if watch.measures:
            turns = (*turns, Turn(number, planned_ms, seen.demand))
        elif seen.layer > 0 and not (ended or way.device) and forecasts == state.forecasts:
            return state, plan  # nothing to remember
        wants = uses_forecast(watch, ended) if ended or seen.layer == 0 else state.wants
        return GuardState(inner, forecasts, watches, key, turns, took_ms, ended, wants), plan

    def wants_forecast(self, state: GuardState) -> bool:
        """Whether the coming layers may use a forecast; if not, none is computed."""
        return state.wants

    def report(self, state: GuardState) -> dict[str, Any]:
        """Returns the share of layers that was run each way, by phase."""
        shares: dict[str, Any] = {}
        now = turns_of(state)
        for phase in ("prefill", "decode"):
            known = [watch.turns for (of, _), watch in state.watches.items() if of == phase]
            turns = np.sum(known, 0) + now * (state.key[0] == phase)
            total = np.sum(turns)
            if total:
                shares[phase] = {
                    way.name: float(count / total) for way, count in zip(WAYS, turns, strict=True)
                }
        return shares

    def _measured(self, watch: Watch, state: GuardState, took_ms: Sequence[float]) -> Watch:
        """Returns the watch with the measurements of the step that has ended."""
        watch = replace(watch, turns=watch.turns + turns_of(state))
        if not state.turns:
            return watch
        ways, took = np.array([turn.way for turn in state.turns]), np.array(took_ms)
        if watch.trial is None and watch.wait <= 1:
            costs = state.inner.costs.alone or state.inner.costs
            demands = [turn.demand for turn in state.turns]
            tokens = sum(demands[0].values()) // state.inner.geometry.experts_per_token
            experts_ms = sum(costs.host_ms.total(demand.values()) for demand in demands)
            watch = replace(watch, alone_ms=experts_ms + len(demands) * costs.layer_ms(tokens))
        if watch.proof == PROOF or (watch.trial is not None and watch.left == TRIAL[state.key[0]] > 1):
            return watch  # the first step of another way
        took = np.minimum(np.where(np.isfinite(took), took, 0.0), MOST_MS)  # a clock that jumped says nothing
        layers = np.flatnonzero(took > 0)
        ways, took, ms, planned_ms = ways[layers], took[layers], watch.ms.copy(), watch.planned_ms.copy()
        ms[ways, layers] = np.column_stack([took, watch.ms[ways, layers, :-1]])
        same = layers[ways == watch.chosen[layers]]
        planned = np.array([turn.planned_ms for turn in state.turns])
        planned_ms[same] = np.column_stack([planned[same], watch.planned_ms[same, :-1]])
        return replace(watch, ms=ms, planned_ms=planned_ms)


def turns_of(state: GuardState) -> np.ndarray:
    """Counts the layers of the current step, or of the last one if it has ended, by way [ways]."""
    ways: Sequence[int] | np.ndarray = [turn.way for turn in state.turns]
    if not ways and state.ended and state.key in state.watches:
        ways = state.watches[state.key].chosen  # nothing was measured in this step
    return np.bincount(np.asarray(ways, np.int64), minlength=len(WAYS))


def uses_forecast(watch: Watch, ended: bool) -> bool:
    """Whether a layer of the current step uses a forecast, or one of the next step if this has ended."""
    ways: Sequence[int] = watch.chosen.tolist() if watch.trial is None else (watch.trial,)
    if ended and watch.trial is not None and watch.left == 1:
        ways = watch.untried[:1]
    elif ended and watch.trial is None and (watch.wait <= 1 or watch.proof == 1):
        ways = ()  # any may come
    return not ways or any(WAYS[way].forecast for way in ways)


def new_watch(layers: int, phase: str) -> Watch:
    """Returns a watch without measurements, whose trials begin soon."""
    return Watch(
        np.full((len(WAYS), layers, SAMPLES), np.inf),
        np.zeros(layers, np.int64),
        np.full((layers, SAMPLES), np.inf),
        np.zeros(len(WAYS), np.int64),
        wait=TRIAL[phase] + 1,
    )


def next_step(watch: Watch, phase: str, forecasts: bool) -> Watch:
    """Decides how the next step is run: as a trial, or with each layer's chosen way."""
    if watch.proof > 0:
        watch = proved(watch)
    if watch.trial is not None and watch.left > 1:
        return replace(watch, left=watch.left - 1)
    if watch.trial is not None:  # the trial has ended
        watch = replace(watch, trial=None)
        if not watch.untried:
            chosen = choose(watch)
            if (chosen == watch.chosen).all():
                pause = min(LONGEST_WAIT, LONGER * watch.pause)
                return replace(watch, wait=pause, pause=pause)
            return replace(watch, chosen=chosen, wait=watch.pause, before=watch.chosen, proof=PROOF)
    elif watch.wait > 1:
        return replace(watch, wait=watch.wait - 1)
    else:
        ways = [index for index, way in enumerate(WAYS) if forecasts or not way.forecast or index == 0]
        if not forecasts:
            ways.remove(1)  # without a predictor, it equals the first way
        now = medians(watch.ms)[watch.chosen, np.arange(len(watch.chosen))].sum()
        planned = medians(watch.planned_ms).sum()
        kept = planned / (1 + SLACK) <= now <= (1 + SLACK) * planned
        if kept and now <= watch.alone_ms and not watch.chosen.any():
            pause = min(LONGEST_WAIT, LONGER * watch.pause)
            return replace(watch, wait=watch.pause, pause=pause)
        if watch.alone_ms > HOPELESS * max(now, planned):  # costs that are too high are so for the host too
            ways.remove(len(WAYS) - 1)
        watch = replace(watch, untried=tuple(way for way in ways if (watch.chosen != way).any()))
        if not watch.untried:
            return replace(watch, wait=watch.pause)
    return replace(watch, trial=watch.untried[0], untried=watch.untried[1:], left=TRIAL[phase])


def proved(watch: Watch) -> Watch:
    """Returns the watch a step after a change later; at the end of its proof, it is kept or taken back."""
    if watch.proof > 1:
        return replace(watch, proof=watch.proof - 1)
    known, layers, before = medians(watch.ms), np.arange(len(watch.chosen)), watch.before
    assert before is not None
    watch = replace(watch, before=None, proof=0)
    if known[watch.chosen, layers].sum() <= known[before, layers].sum():
        return watch
    pause = min(LONGEST_WAIT, LONGER * watch.pause)
    return replace(watch, chosen=before, wait=pause, pause=pause)


def choose(watch: Watch) -> np.ndarray:
    """Chooses the way of each layer [L]: the fastest overall, or another that is much faster for a layer."""
    known, layers = medians(watch.ms), np.arange(len(watch.chosen))
    measured = np.count_nonzero(np.isfinite(watch.ms), -1)  # [ways, L]
    samples = np.maximum(1, np.minimum(measured, measured[watch.chosen, layers]))
    totals, now = known.sum(1), known[watch.chosen, layers]
    chosen, best = watch.chosen, totals.argmin()
    if totals[best] < (1 - MARGIN / samples[best].min()) * now.sum():
        chosen = np.full_like(chosen, best)
    best = known.argmin(0)
    faster = known[best, layers] < (1 - LAYER_MARGIN / samples[best, layers]) * known[chosen, layers]
    slowest = np.where(np.isinf(watch.ms), 0.0, watch.ms)[best, layers].max(-1)
    return np.where(faster & (slowest < watch.ms[chosen, layers].min(-1)), best, chosen)


def medians(samples: np.ndarray) -> np.ndarray:
    """Returns the medians of [..., samples], newest sample first; infinite where there are none."""
    known = np.where(np.isinf(samples), np.nan, samples)
    known[..., 0] = samples[..., 0]  # the newest is there if any is
    return np.nanmedian(known, -1)
