"""Every policy: valid plans, whatever comes; pure; deterministic. And those that weigh nothing."""

import copy

import numpy as np
import pytest
from helpers import PROFILE
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_runs import Device, assert_same, follow, geometry, runs

from layerscope_jax import POLICIES, ExpertId, Observation
from layerscope_jax.scheduling.plan import check_plan
from layerscope_jax.scheduling.registry import FORECASTING

DEVICE_ONLY = {"on-demand", "lru", "lfu", "arc", "least-stale", "in-step", "promoe", "klotski", "resident"}


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(run=runs(), seed=st.integers(0, 1000), failing=st.sampled_from([0.0, 0.2]), ahead=st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_every_plan_is_valid_pure_and_deterministic(name, run, seed, failing, ahead):
    shape, resident, steps = run
    policy, twin = POLICIES[name](), POLICIES[name]()
    try:
        state, twins = policy.init(shape, PROFILE), twin.init(shape, PROFILE)
    except ValueError:
        return  # see the budgets below
    device = Device(shape, resident, seed, late=0.5)
    if name == "resident":
        device.resident = set(device.known)
    rng = np.random.default_rng(seed)
    number = 0
    for step in steps:
        for layer, demand in enumerate(step):
            forecast = (rng.random((ahead, shape.num_experts)) * 3 - 1).clip(0).tolist()
            seen = device.observe(number, layer, demand, forecast)
            before = copy.deepcopy((state, seen))
            after, plan = policy.plan(state, seen)
            assert_same((state, seen), before)
            assert_same((after, plan), policy.plan(state, seen), twin.plan(twins, copy.deepcopy(seen)))
            assert (plan.step, plan.layer) == (number, layer)
            assert not plan.host or name not in DEVICE_ONLY
            assert not plan.prefetch or name in FORECASTING
            state = twins = after
            if not device.follow(plan, seen, fails=rng.random() < failing):
                number = -1  # the call broke off; the next one begins anew with what there is
                break
        number += 1


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"on-demand", "resident"}))
@given(run=runs(), data=st.data())
@settings(deadline=None, max_examples=12)
def test_every_plan_is_valid_whatever_others_brought_and_took(name, run, data):
    """Such as another policy that takes turns with this one."""
    shape, _, steps = run
    policy = POLICIES[name]()
    try:
        state = policy.init(shape, PROFILE)
    except ValueError:
        return
    known = [ExpertId(layer, e) for layer in range(shape.num_layers) for e in range(shape.num_experts)]
    for number, step in enumerate(steps):
        for layer, demand in enumerate(step):
            there = data.draw(st.permutations(known))[: data.draw(st.integers(0, shape.slots))]
            cut = data.draw(st.integers(0, len(there)))
            forecast = data.draw(st.sampled_from([[], [[1.5] * shape.num_experts] * 2]))
            seen = Observation(
                step=number,
                layer=layer,
                phase="decode",
                demand=demand,
                resident=frozenset(there[:cut]),
                in_flight=frozenset(there[cut:]),
                forecast=forecast,
            )
            before = copy.deepcopy(state)
            after, plan = policy.plan(state, seen)
            assert_same(state, before)
            check_plan(plan, seen, shape.slots, set(known))
            state = after


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_budget_too_small_is_refused_with_both_sizes(name):
    least = (18 if name == "resident" else 6) if name in DEVICE_ONLY else 0
    assert_same(*(POLICIES[name]().init(geometry(least), PROFILE) for _ in range(2)))
    if least:
        with pytest.raises(
            ValueError, match=f"device_budget.*{least * 1000:,} bytes.*{least - 1}"
        ) as refusal:
            POLICIES[name]().init(geometry(least - 1), PROFILE)
        assert f"'{name}'" in str(refusal.value)


def test_names_are_the_policies_own():
    assert all(policy.name == name for name, policy in POLICIES.items())


def test_on_demand_keeps_nothing():
    step = [{0: 1, 1: 3}, {0: 1}, {4: 2}]
    plans, device = follow(POLICIES["on-demand"](), geometry(18), [step, step])
    assert device.hits == 0
    assert [len(plan.load) for plan in plans] == [2, 1, 1] * 2
    assert plans[0].load == (ExpertId(0, 1), ExpertId(0, 0))  # most tokens first
    assert device.resident == {ExpertId(2, 4)}


def test_host_only_moves_nothing():
    plans, device = follow(POLICIES["host-only"](), geometry(18), [[{0: 1, 5: 9}, {1: 1}, {2: 1}]])
    assert [plan.host for plan in plans] == [(5, 0), (1,), (2,)]
    assert not device.resident
    assert device.loaded == 0


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.uses_costs])
def test_who_weighs_costs_needs_them(name):
    with pytest.raises(ValueError, match="it needs a HardwareProfile, got None"):
        POLICIES[name]().init(geometry(8), None)
