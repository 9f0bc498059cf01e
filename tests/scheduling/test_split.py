"""Sharing a layer out: every expert once, and never later than either side alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import HardwareProfile, TimeTable
from layerscope_jax.scheduling.split import balance, ordered

COSTS = HardwareProfile(
    host_ms=TimeTable((1, 8), (1.0, 8.0)),
    device_ms=TimeTable((1,), (1.0,)),
    transfer_ms=2.0,
    source="made up",
)
DEMAND = st.dictionaries(st.integers(0, 9), st.integers(1, 30), max_size=10)


@st.composite
def layers(draw):
    """Demand, what is resident of it and what is coming when."""
    demand = draw(DEMAND)
    places = {expert: draw(st.sampled_from("rca")) for expert in demand}
    resident = [expert for expert, place in places.items() if place == "r"]
    away = [expert for expert, place in places.items() if place == "c"]
    return demand, resident, [(expert, 1.5 * (position + 1)) for position, expert in enumerate(away)]


def ends(split, demand, resident, coming, link_ms):
    """When device and host are done with it, worked out from the lists alone."""
    arrival = dict(coming) | {e: link_ms + (i + 1) * COSTS.transfer_ms for i, e in enumerate(split.load)}
    now = sum(COSTS.device_ms(demand[expert]) for expert in split.device if expert in resident)
    for expert in split.device:
        if expert not in resident:
            now = max(now, arrival[expert]) + COSTS.device_ms(demand[expert])
    return now, sum(COSTS.host_ms(demand[expert]) for expert in split.host)


@given(layer=layers(), loads=st.integers(0, 10), link_ms=st.floats(0, 5), worth_ms=st.floats(0, 3))
@settings(deadline=None, max_examples=200)
def test_each_expert_once_and_no_later_than_without_moves(layer, loads, link_ms, worth_ms):
    demand, resident, coming = layer
    split = balance(COSTS, demand, resident, coming, link_ms=link_ms, loads=loads, worth_ms=worth_ms)
    assert sorted((*split.device, *split.host)) == sorted(demand)
    assert len(split.load) <= loads
    assert not set(split.load) & {*resident, *(expert for expert, _ in coming)}
    assert set(split.load) <= set(split.device)
    device, host = ends(split, demand, resident, coming, link_ms)
    assert (split.device_ms, split.host_ms) == (pytest.approx(device), pytest.approx(host))
    still = sum(COSTS.device_ms(demand[expert]) for expert in resident)
    rest = sum(COSTS.host_ms(demand[expert]) for expert in demand if expert not in resident)
    assert max(device, host) <= max(still, rest) + 1e-9
    assert max(device, host) <= max(still, rest) - worth_ms * len(split.load) + 1e-9


@given(demand=DEMAND.filter(lambda demand: len(demand) <= 6), data=st.data())
@settings(deadline=None, max_examples=100)
def test_near_the_best_split_where_nothing_moves(demand, data):
    """Greedy scheduling of two machines: within twice the best, and mostly close to it."""
    resident = data.draw(st.sets(st.sampled_from(sorted(demand)))) if demand else set()
    split = balance(COSTS, demand, resident)
    best = min(
        max(
            sum(COSTS.device_ms(demand[expert]) for expert in chosen),
            sum(COSTS.host_ms(demand[expert]) for expert in demand if expert not in chosen),
        )
        for size in range(len(resident) + 1)
        for chosen in itertools.combinations(sorted(resident), size)
    )
    assert best - 1e-9 <= max(split.device_ms, split.host_ms) <= 2 * best + 1e-9


def test_a_resident_expert_goes_to_the_host_where_that_is_faster():
    split = balance(COSTS, {0: 1, 1: 1, 2: 1}, [0, 1, 2])
    assert (len(split.device), len(split.host)) == (2, 1)


def test_what_is_coming_is_waited_for_only_if_that_pays():
    assert balance(COSTS, {0: 8}, (), [(0, 3.0)]).device == [0]
    assert balance(COSTS, {0: 2}, (), [(0, 3.0)]).host == [0]


def test_a_load_must_gain_what_it_is_told_to():
    demand = {0: 8, 1: 8}
    assert balance(COSTS, demand, (), loads=2).load == [
        0,
        1,
    ]  # 16 ms on the host, then 8, then 5 on the device
    assert balance(COSTS, demand, (), loads=2, worth_ms=3.5).load == [0]
    assert balance(COSTS, demand, (), loads=2, worth_ms=8.1).load == []


@given(st.dictionaries(st.integers(0, 511), st.integers(1, 2**20), max_size=64))
@settings(deadline=None)
def test_experts_are_ordered_by_tokens_and_number(demand):
    experts, tokens = ordered(np.array([*demand], np.int64), np.array([*demand.values()], np.int64))
    expected = sorted(demand, key=lambda expert: (-demand[expert], expert))
    assert experts.tolist() == expected
    assert tokens.tolist() == [demand[expert] for expert in expected]
