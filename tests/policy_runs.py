"""What tests of policies share: a device tier on sets, runs to plan for, following a policy through one."""

from collections import Counter
from dataclasses import fields, is_dataclass
from itertools import chain

import numpy as np
from hypothesis import strategies as st

from layerscope_jax import ExpertId, Geometry, HardwareProfile, LayerPlan, Observation, TimeTable
from layerscope_jax.scheduling.plan import check_plan

# A token takes 1 ms on the host; on the device 1 ms however many, after a copy of 5 ms.
SPLIT = HardwareProfile(
    host_ms=TimeTable((1, 100), (1.0, 100.0)),
    device_ms=TimeTable((1,), (1.0,)),
    transfer_ms=5.0,
    source="made up",
)


class Device:
    """What an engine does with plans, on sets: a device tier without a device."""

    def __init__(self, geometry, resident=(), seed=0, late=0.0):
        self.geometry = geometry
        layers, experts = range(geometry.num_layers), range(geometry.num_experts)
        self.known = {ExpertId(layer, expert) for layer in layers for expert in experts}
        self.resident, self.coming = set(resident), set()
        self.rng, self.late = np.random.default_rng(seed), late
        self.loaded = self.hits = 0

    def observe(self, step, layer, demand, forecast=()):
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
            forecast=forecast,
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
        num_layers=num_layers,
        num_experts=num_experts,
        experts_per_token=min(2, num_experts),
        expert_bytes=1000,
        slots=slots,
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


def assert_same(*states):
    """Also where dataclasses hold arrays, whose `==` is not one truth."""

    def plain(value):
        if is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    for state in states[1:]:
        assert plain(state) == plain(states[0])


def follow(policy, shape, steps, profile=None, ahead=0):
    """The plans of a run, and the device after it; with a true forecast of so many layers."""
    device, state, plans = Device(shape), policy.init(shape, profile), []
    for number, step in enumerate(steps):
        for layer, demand in enumerate(step):
            coming = [*step[layer + 1 :], *chain.from_iterable(steps[number + 1 :])][:ahead]
            forecast = [[float(tokens.get(e, 0)) for e in range(shape.num_experts)] for tokens in coming]
            seen = device.observe(number, layer, demand, forecast)
            state, plan = policy.plan(state, seen)
            device.follow(plan, seen)
            plans.append(plan)
    return plans, device
