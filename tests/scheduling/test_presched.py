"""What PreSched does with the link, by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_runs import Device, follow, geometry

from layerscope_jax import ExpertId, Geometry, HardwareProfile, TimeTable
from layerscope_jax.scheduling.lowest import lowest
from layerscope_jax.scheduling.presched import PreSched
from layerscope_jax.simulation.simulator import Workload, simulate

COSTS = HardwareProfile(
    host_ms=TimeTable((1, 10), (1.0, 10.0)),
    device_ms=TimeTable((1,), (0.1,)),
    transfer_ms=2.0,
    layer_ms=TimeTable((1,), (1.0,)),
    source="made up",
)


def plan(policy, state, device, demand, forecast, layer=0, step=0):
    seen = device.observe(step, layer, demand, forecast)
    state, found = policy.plan(state, seen)
    device.follow(found, seen)
    return state, found


def test_an_idle_link_brings_what_the_next_layers_will_need_most():
    policy, shape = PreSched(), geometry(6)
    forecast = [[0, 1, 9, 0, 0, 0], [0, 0, 0, 7, 0, 0]]
    _, found = plan(policy, policy.init(shape, COSTS), Device(shape), {0: 2}, forecast, step=1)
    assert found.host == (0,)
    assert found.prefetch == (ExpertId(1, 2), ExpertId(2, 3))
    # Now the link is at work for this layer, and what the next one needs would come too late.
    _, found = plan(policy, policy.init(shape, COSTS), Device(shape), {0: 20}, forecast, step=1)
    assert found.load == (ExpertId(0, 0),)
    assert found.prefetch == (ExpertId(2, 3),)


def test_no_more_is_queued_than_the_link_can_begin_before_the_next_plan():
    policy, shape = PreSched(), geometry(12, num_experts=10)
    forecast = [[9.0] * 10, [9.0] * 10]
    _, found = plan(policy, policy.init(shape, COSTS), Device(shape), {0: 1}, forecast)
    # The layer takes 1 ms, and 1 ms passes until the next plan: one transfer of 2 ms.
    assert len(found.prefetch) == 1


def test_what_saves_less_than_what_would_leave_is_not_copied():
    policy, shape = PreSched(), geometry(1, num_layers=2)
    device = Device(shape)
    state = policy.init(shape, COSTS)
    for step in range(4):  # expert 0 of layer 0 is resident and always busy
        state, found = plan(policy, state, device, {0: 10}, [[0.5] * 6], layer=0, step=step)
        state, found = plan(policy, state, device, {5: 1}, [[10.0, 0, 0, 0, 0, 0]], layer=1, step=step)
    assert device.resident == {ExpertId(0, 0)}
    assert not found.prefetch


def test_without_a_forecast_the_popular_ones_are_brought():
    policy, shape = PreSched(), geometry(3)
    steps = [[{0: 8}, {1: 8}, {2: 8}]] * 4
    _, device = follow(policy, shape, steps, COSTS)
    assert device.resident | device.coming == {ExpertId(0, 0), ExpertId(1, 1), ExpertId(2, 2)}


def test_a_right_forecast_is_worth_time_and_a_wrong_one_costs_little():
    rng = np.random.default_rng(0)
    counts = np.zeros((30, 4, 12), int)
    for step, layer in np.ndindex(30, 4):
        counts[step, layer, rng.permutation(12)[:4]] = rng.integers(1, 8, 4)
    shape = Geometry(num_layers=4, num_experts=12, experts_per_token=1, expert_bytes=3, slots=16)
    flat = np.concatenate([counts.reshape(-1, 12), np.zeros((2, 12))])
    right = np.stack([flat[1 + w :][: 30 * 4].reshape(30, 4, 12) for w in range(2)], 2)
    wrong = right[..., rng.permutation(12)]
    took = {}
    for name, forecast in {"right": right, "none": None, "wrong": wrong}.items():
        workload = Workload(phase="decode", tokens=16, counts=counts, forecasts=forecast)
        (took[name],) = simulate(PreSched(), [workload], shape, COSTS)
    assert took["right"].total_ms < 0.9 * took["none"].total_ms
    assert took["wrong"].total_ms < 1.1 * took["none"].total_ms


@given(st.lists(st.integers(0, 5)), st.integers(0, 9))
@settings(deadline=None)
def test_lowest_is_in_order_and_breaks_ties_by_place(values, count):
    found = lowest(np.array(values, float), count)
    assert found.tolist() == np.argsort(values, kind="stable")[:count].tolist()


def test_it_needs_costs():
    with pytest.raises(ValueError, match="policy 'presched' weighs costs"):
        PreSched().init(geometry(3), None)
