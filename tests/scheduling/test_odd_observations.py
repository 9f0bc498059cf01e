"""Policies on what no clock and no forecast should say: their plans are plans all the same."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from policy_runs import SPLIT, Device, geometry

from layerscope_jax import POLICIES
from layerscope_jax.scheduling.guard import SAMPLES, WAYS, Guard
from layerscope_jax.scheduling.registry import FORECASTING

ELAPSED = st.sampled_from([0.0, 1e-9, 1.0, 40.0, 1e9, 1e308, float("inf"), float("nan"), -1.0, -0.0])
EXPECTED = st.sampled_from([0.0, 0.3, 1.0, 64.0, 1e300, float("inf"), float("nan"), -1.0, -1e300])
SANE = st.sampled_from([0.0, 0.3, 1.0, 64.0])  # all that an engine lets through
EVENTS = ("goes on", "breaks off", "copies fail")


NO_SHRINKING = settings(
    deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], report_multiple_bugs=False
)


@st.composite
def observations(draw, expected=EXPECTED):
    """A geometry, and steps of (phase, layers), each layer its demand, forecast, elapsed time and event."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    shape = geometry(draw(st.sampled_from([0, 1, experts, layers * experts - 1])), layers, experts)
    demand = st.dictionaries(st.integers(0, experts - 1), st.integers(1, 40), max_size=experts)
    row = st.lists(expected, min_size=experts, max_size=experts)
    forecast = st.one_of(st.just(()), st.lists(row, min_size=1, max_size=2 * layers))
    turn = st.tuples(demand, forecast, ELAPSED, st.sampled_from(EVENTS))
    step = st.tuples(st.sampled_from(["prefill", "decode"]), st.lists(turn, min_size=layers, max_size=layers))
    return shape, draw(st.lists(step, min_size=1, max_size=12)) * draw(st.sampled_from([1, 4]))


def odd_run(policy, shape, steps):
    """Follows a policy; gives its last state."""
    device, state = Device(shape, late=0.3), policy.init(shape, SPLIT)
    for number, (phase, turns) in enumerate(steps):
        for layer, (demand, forecast, elapsed_ms, event) in enumerate(turns):
            seen = device.observe(number, layer, demand, forecast)
            state, plan = policy.plan(state, replace(seen, phase=phase, elapsed_ms=elapsed_ms))
            whole = device.follow(plan, seen, fails=event == "copies fail")
            if event == "breaks off" or not whole:
                break  # the next step begins with the first layer again
    return state


FLAT = geometry(0, 1, 2)


@given(observations())
@example((FLAT, [("decode", [({}, (), float("nan"), "goes on")])] * 40))
@example((FLAT, [("decode", [({0: 1}, [[float("nan")] * 2], 1e308, "goes on")])] * 60))
@settings(NO_SHRINKING, max_examples=150)
def test_auto_plans_whatever_it_is_told(run):
    shape, steps = run
    guard = Guard()
    state = odd_run(guard, shape, steps)
    for parts in guard.report(state).values():
        assert sum(parts.values()) == pytest.approx(1.0)
    assert isinstance(guard.wants_forecast(state), bool)
    for watch in state.watches.values():
        assert watch.ms.shape == (len(WAYS), shape.num_layers, SAMPLES)
        assert not np.isnan(watch.ms).any()
        assert ((watch.chosen >= 0) & (watch.chosen < len(WAYS))).all()
    for books in (state.inner.popularity, state.inner.worth, state.inner.span_ms, state.inner.price):
        assert np.isfinite(books).all()


@pytest.mark.parametrize("name", sorted(FORECASTING - {"auto"}))
@given(run=observations(SANE))
@settings(NO_SHRINKING, max_examples=25)
def test_policies_plan_whatever_is_forecast(name, run):
    shape, steps = run
    policy = POLICIES[name]()
    try:
        policy.init(shape, SPLIT)
    except ValueError as error:
        assert "device_budget is too small" in str(error)  # noqa: PT017
        return
    odd_run(policy, shape, steps)
