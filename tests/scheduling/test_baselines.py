"""Every policy: valid plans, whatever comes; pure; deterministic. And each does what its paper says."""

import copy
from collections import Counter

import numpy as np
import pytest
from helpers import PROFILE
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import POLICIES, ExpertId, Geometry, HardwareProfile, LayerPlan, Observation, TimeTable
from layerscope_jax.scheduling.plan import check_plan


class Device:
    """What an engine does with plans, on sets: a device tier without a device."""

    def __init__(self, geometry, resident=(), seed=0, late=0.0):
        self.geometry = geometry
        layers, experts = range(geometry.num_layers), range(geometry.num_experts)
        self.known = {ExpertId(layer, expert) for layer in layers for expert in experts}
        self.resident, self.coming = set(resident), set()
        self.rng, self.late = np.random.default_rng(seed), late
        self.loaded = self.hits = 0

    def observe(self, step, layer, demand):
        arrived = {expert for expert in sorted(self.coming) if self.rng.random() >= self.late}
        self.coming -= arrived
        self.resident |= arrived
        return Observation(
            step=step,
            layer=layer,
            phase="decode" if step else "prefill",
            demand=demand,
            resident=frozenset(self.resident),
            in_flight=frozenset(self.coming),
        )

    def follow(self, plan: LayerPlan, seen: Observation, fails=False):
        """Carries out a plan; gives whether all copies came."""
        check_plan(plan, seen, self.geometry.slots, self.known)
        assert Counter(plan.device + plan.host) == Counter(dict.fromkeys(seen.demand, 1))
        wanted = {ExpertId(plan.layer, expert) for expert in plan.device}
        self.hits += len({ExpertId(plan.layer, expert) for expert in seen.demand} & self.resident)
        self.loaded += len(plan.load)
        # Prefetches for this layer that it does without may be dropped, or may have begun.
        self.coming -= {
            e for e in sorted(self.coming - wanted) if e.layer == plan.layer and self.rng.random() < 0.5
        }
        self.resident -= set(plan.evict)
        self.coming |= set(plan.prefetch)
        if fails and plan.load:
            self.coming.clear()
            return False
        self.coming -= wanted
        self.resident |= wanted
        assert len(self.resident) + len(self.coming) <= self.geometry.slots
        return True


def geometry(slots, num_layers=3, num_experts=6):
    return Geometry(
        num_layers=num_layers, num_experts=num_experts, experts_per_token=2, expert_bytes=1000, slots=slots
    )


@st.composite
def runs(draw):
    """A geometry, what is resident at first, and the demand of each layer of each step."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    shape = geometry(draw(st.integers(0, num_layers * num_experts + 2)), num_layers, num_experts)
    known = [ExpertId(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
    resident = draw(st.lists(st.sampled_from(known), max_size=shape.slots, unique=True))
    demand = st.dictionaries(st.integers(0, num_experts - 1), st.integers(1, 40), min_size=1)
    steps = draw(st.lists(st.lists(demand, min_size=num_layers, max_size=num_layers), min_size=1, max_size=6))
    return shape, resident, steps


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(run=runs(), seed=st.integers(0, 1000), failing=st.sampled_from([0.0, 0.2]))
@settings(deadline=None, max_examples=60)
def test_every_plan_is_valid_pure_and_deterministic(name, run, seed, failing):
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
            seen = device.observe(number, layer, demand)
            before = copy.deepcopy((state, seen))
            after, plan = policy.plan(state, seen)
            assert (state, seen) == before
            assert policy.plan(state, seen) == (after, plan)
            assert twin.plan(twins, copy.deepcopy(seen)) == (after, plan)
            assert (plan.step, plan.layer) == (number, layer)
            state = twins = after
            if not device.follow(plan, seen, fails=rng.random() < failing):
                number = -1  # the call broke off; the next one begins anew with what there is
                break
        number += 1


@pytest.mark.parametrize(
    ("name", "least"), [("lru", 6), ("on-demand", 6), ("resident", 18), ("host-only", 0), ("fiddler", 0)]
)
def test_a_budget_too_small_is_refused_with_both_sizes(name, least):
    assert POLICIES[name]().init(geometry(least), PROFILE) == POLICIES[name]().init(geometry(least), PROFILE)
    if least:
        with pytest.raises(
            ValueError, match=f"device_budget.*{least * 1000:,} bytes.*{least - 1}"
        ) as refusal:
            POLICIES[name]().init(geometry(least - 1), PROFILE)
        assert f"'{name}'" in str(refusal.value)


def test_names_are_the_policies_own():
    assert all(policy.name == name for name, policy in POLICIES.items())


class ReferenceLRU:
    """A list, oldest first."""

    def __init__(self, slots):
        self.slots, self.order, self.hits, self.loads = slots, [], 0, 0

    def layer(self, layer, demand):
        needed = [ExpertId(layer, expert) for expert in sorted(demand, key=lambda e: (demand[e], -e))]
        for expert in needed:
            if expert in self.order:
                self.hits += 1
                self.order.remove(expert)
                self.order.append(expert)
        missing = [expert for expert in needed if expert not in self.order]
        self.loads += len(missing)
        while len(self.order) + len(missing) > self.slots:
            self.order.remove(next(expert for expert in self.order if expert not in needed))
        self.order = [expert for expert in self.order if expert not in needed] + needed


@given(runs())
@settings(deadline=None, max_examples=200)
def test_lru_is_lru(run):
    shape, _, steps = run
    if shape.slots < shape.num_experts:
        return
    policy, device, reference = POLICIES["lru"](), Device(shape), ReferenceLRU(shape.slots)
    state = policy.init(shape, None)
    for number, step in enumerate(steps):
        for layer, demand in enumerate(step):
            seen = device.observe(number, layer, demand)
            state, plan = policy.plan(state, seen)
            device.follow(plan, seen)
            reference.layer(layer, demand)
            assert device.resident == set(reference.order)
    assert (device.hits, device.loaded) == (reference.hits, reference.loads)


def follow(policy, shape, steps, profile=None):
    """The plans of a run, and the device after it."""
    device, state, plans = Device(shape), policy.init(shape, profile), []
    for number, step in enumerate(steps):
        for layer, demand in enumerate(step):
            seen = device.observe(number, layer, demand)
            state, plan = policy.plan(state, seen)
            device.follow(plan, seen)
            plans.append(plan)
    return plans, device


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


# A token takes 1 ms on the host; on the device 1 ms however many, after a copy of 5 ms.
SPLIT = HardwareProfile(
    host_ms=TimeTable((1, 100), (1.0, 100.0)),
    device_ms=TimeTable((1,), (1.0,)),
    transfer_ms=5.0,
    source="made up",
)


def test_fiddler_computes_a_missing_expert_where_it_is_done_first():
    demand = {expert: expert + 4 for expert in range(6)}  # 4 to 9 tokens
    # Three quarters of two slots are none for each of two layers: no hot set, room for two passing through.
    plans, device = follow(POLICIES["fiddler"](), geometry(2, num_layers=2), [[demand, {0: 1}]], SPLIT)
    # 6 ms on the device: worth it from seven tokens on, in room for two.
    assert plans[0].device == (5, 4)
    assert plans[0].load == (ExpertId(0, 5), ExpertId(0, 4))
    assert plans[0].host == (3, 2, 1, 0)
    # What passed through is given up; one token is not worth a copy.
    assert plans[1].evict == (ExpertId(0, 4), ExpertId(0, 5))
    assert (plans[1].device, plans[1].host) == ((), (0,))
    assert not device.resident

    plans, _ = follow(POLICIES["fiddler"](), geometry(3, num_layers=3), [[demand] * 3], SPLIT)
    assert [plan.device for plan in plans] == [(5, 4, 3)] * 3  # a third slot: 3 has seven tokens
    plans, _ = follow(POLICIES["fiddler"](), geometry(6, num_layers=6), [[demand] * 6], SPLIT)
    assert plans[0].device == (5, 4, 3)  # room is left, but the host does six tokens in the same 6 ms


def test_fiddler_keeps_the_experts_that_the_first_prefill_liked():
    policy, shape = POLICIES["fiddler"](), geometry(8)  # 8 * 3 / 4 / 3: two hot ones a layer
    prefill = [{0: 9, 1: 2, 2: 1}, {3: 4, 4: 4, 5: 1}, {0: 1}]
    decode = [{1: 1, 2: 1}, {0: 1, 5: 1}, {0: 1, 1: 1}]
    plans, device = follow(policy, shape, [prefill, decode, prefill], SPLIT)
    hot = {ExpertId(*e) for e in ((0, 0), (0, 1), (1, 3), (1, 4), (2, 0))}
    assert device.resident == hot
    assert [plan.load for plan in plans[3:]] == [()] * 6
    assert [plan.device for plan in plans[3:]] == [(1,), (), (0,), (0, 1), (3, 4), (0,)]
    assert plans[0].device == (0, 1)  # the hot ones are copied whatever they cost at first


def test_fiddler_needs_costs():
    assert POLICIES["fiddler"].uses_costs
    with pytest.raises(ValueError, match=r"'fiddler'.*needs a HardwareProfile"):
        POLICIES["fiddler"]().init(geometry(8), None)
