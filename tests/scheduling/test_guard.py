"""The watch over PreSched: it leaves what keeps its word alone, and gives up what does not."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from policy_runs import SPLIT

from layerscope_jax import Geometry, Observation
from layerscope_jax.scheduling.guard import FIRST_WAIT, LONGEST_WAIT, PROOF, WAYS, Guard

SHAPE = Geometry(num_layers=2, num_experts=4, experts_per_token=2, expert_bytes=1000, slots=4)
DEMAND = {0: 40, 1: 20, 3: 4}


def run(elapsed_ms, steps, forecast=True, costs=SPLIT):
    """Decode steps of which a layer takes `elapsed_ms(way, planned)`.

    Gives the way of each turn, the state, the guard, and after which turns a forecast was wanted.
    """
    guard, ways, wanted = Guard(), [], []
    state = guard.init(SHAPE, costs)
    took = 0.0
    resident = set()
    for step in range(steps):
        for layer in range(SHAPE.num_layers):
            seen = Observation(
                step=step,
                layer=layer,
                phase="decode",
                demand=DEMAND,
                resident=frozenset(resident),
                in_flight=frozenset(),
                forecast=[[20.0, 10.0, 0.0, 2.0]] if forecast else (),
                elapsed_ms=took,
            )
            state, plan = guard.plan(state, seen)
            watch = state.watches[state.key]
            way = WAYS[watch.chosen[layer] if watch.trial is None else watch.trial]
            ways.append(way.name)
            if way.forecast:
                assert all(wanted[-1:])  # asked for in the turn before, also for a step's first layer
            wanted.append(guard.wants_forecast(state))
            resident = (resident - set(plan.evict)) | set(plan.load) | set(plan.prefetch)
            took = elapsed_ms(way.name, float(state.inner.span_ms[layer]) if way.device else 0.0)
    return ways, state, guard, wanted


def test_nothing_is_tried_while_layers_take_what_was_planned():
    ways, state, guard, _ = run(lambda way, planned: 1.1 * planned, steps=60)
    assert set(ways) == {"full"}
    (watch,) = state.watches.values()
    assert watch.pause > FIRST_WAIT
    assert guard.report(state) == {"decode": dict.fromkeys((w.name for w in WAYS), 0.0) | {"full": 1.0}}


def test_a_broken_promise_leads_to_the_fastest_way():
    slow = {"full": 3.0, "no forecast": 2.5, "no transfers": 2.0, "host only": 1.0}
    ways, state, guard, _ = run(lambda way, planned: 100 * slow[way], steps=24)
    assert ways[0] == "full"
    assert set(ways[-10:]) == {"host only"}
    assert not guard.wants_forecast(state)


def test_costs_that_are_too_high_lead_to_the_fastest_way_too():
    slow = {"full": 0.7, "no forecast": 0.7, "no transfers": 0.4}
    ways, *_ = run(lambda way, planned: slow[way] * planned, steps=24)
    assert set(ways[-10:]) == {"no transfers"}


@pytest.mark.parametrize("seed", range(4))
def test_times_that_jump_about_are_not_tried_for_ever(seed):
    jumps = np.random.default_rng(seed)
    ways, *_ = run(lambda way, planned: 100 * jumps.lognormal(0, 0.3), steps=600)
    changes = sum(one != other for one, other in pairwise(ways[-900:]))
    assert changes < 160  # of trials, and where layers go different ways


def test_the_margin_keeps_what_is_hardly_slower():
    slow = {"full": 1.01, "no forecast": 1.01, "no transfers": 1.01, "host only": 1.0}
    ways, state, *_ = run(lambda way, planned: 100 * slow[way], steps=200)
    assert ways.count("full") > 0.8 * len(ways)
    (watch,) = state.watches.values()
    assert FIRST_WAIT < watch.pause <= LONGEST_WAIT


@pytest.mark.parametrize("at", range(30, 40))
def test_one_stall_decides_nothing(at):
    """Whenever it comes: also in the last turn before the times are looked at."""
    stalls = iter([1.0] * at + [500.0] + [1.0] * 1000)
    ways, *_ = run(lambda way, planned: planned * next(stalls), steps=60)
    assert set(ways) == {"full"}


def test_a_way_that_becomes_slow_is_left_again():
    turn = iter(range(100_000))

    def took(way, planned):
        late = next(turn) > 100
        return 100 * {"host only": 3.0 if late else 1.0}.get(way, 2.0)

    ways, *_ = run(took, steps=200)
    assert "host only" in ways[60:100]
    assert ways[-80:].count("host only") <= 8  # in trials


def test_what_was_fast_in_its_trial_alone_is_taken_back():
    """The machine is several times as fast while other ways are tried, and no longer when one was chosen."""
    taken = []

    def took(way, planned):
        taken.append(way)
        tried = way != "host only" and "host only" in taken[-40:-20]
        quick = tried and sum(one != "host only" for one in taken[-20:]) <= 18  # turns of three trials
        return 100 * (1.0 if way == "host only" else 0.3 if quick else 1.5)

    ways, *_ = run(took, steps=70)
    settled = "".join("h" if way == "host only" else "." for way in ways).index("h" * 20)
    others = len(ways) - settled - ways[settled:].count("host only")
    assert others == 18 + 2 * PROOF  # of trials, and until it was taken back


def test_the_host_alone_is_not_tried_where_the_costs_rule_it_out():
    ways, *_ = run(lambda way, planned: 1.3 * planned, steps=40)
    assert "host only" not in ways


def test_without_a_predictor_there_is_one_way_less():
    ways, state, guard, _ = run(lambda way, planned: 3 * planned, steps=30, forecast=False)
    assert "no forecast" not in ways
    assert "no transfers" in ways
    assert sum(guard.report(state)["decode"].values()) == pytest.approx(1.0)


def test_phases_and_sizes_are_watched_apart():
    guard = Guard()
    state = guard.init(SHAPE, SPLIT)
    seen = Observation(step=0, layer=0, phase="prefill", demand=DEMAND, resident=(), in_flight=())
    state, _ = guard.plan(state, seen)
    state, _ = guard.plan(state, replace(seen, phase="decode", step=1))
    state, _ = guard.plan(state, replace(seen, phase="decode", step=2, demand={0: 2}))
    assert sorted(state.watches) == [("decode", 1), ("decode", 6), ("prefill", 6)]


def test_a_forecast_is_wanted_only_where_a_way_uses_it():
    slow = {"full": 2.0, "no forecast": 2.0, "no transfers": 2.0, "host only": 1.0}
    *_, wanted = run(lambda way, planned: 100 * slow[way], steps=40)
    assert wanted.count(False) > len(wanted) / 3
