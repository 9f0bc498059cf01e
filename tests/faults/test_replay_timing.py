"""A replay runs however slow its link is: it waits for what its plan does not know to be on its way."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest
from exact_cases import RandomPolicy, case
from helpers import PROFILE, copying_by, in_time
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import Engine, ExpertId, Geometry, LayerPlan, Observation, OffloadConfig, Replay
from layerscope_jax.scheduling.plan import check_plan
from layerscope_jax.simulation.simulator import Workload, simulate

pytestmark = pytest.mark.usefixtures("quick_compiles")

SLOTS = 8
GEOMETRY = Geometry(num_layers=3, num_experts=8, experts_per_token=2, expert_bytes=100, slots=SLOTS)


def places(plans):
    """What of plans has to be repeated."""
    return [(plan.step, plan.layer, sorted(plan.device), sorted(plan.host)) for plan in plans]


def simulated(policy, seed, transfer_ms):
    counts = np.random.default_rng(seed).integers(0, 3, (6, 3, 8))
    counts[:, :, 0] += 1
    plans = []
    workload = Workload(phase="decode", tokens=8, counts=counts)
    simulate(policy, [workload], GEOMETRY, replace(PROFILE, transfer_ms=transfer_ms), record=plans.append)
    return plans


@pytest.mark.parametrize("pace", [(0.0, 1e4), (1e4, 0.0), (0.0, 3.0), (3.0, 1.0)])
def test_a_replay_over_another_link_runs_on_the_virtual_clock(pace):
    for seed in range(60):
        recorded = simulated(RandomPolicy(seed, ahead=1.0, restless=0.7), seed, pace[0])
        again = simulated(Replay(recorded), seed, pace[1])
        assert places(again) == places(recorded)


def test_a_replay_over_the_same_link_repeats_everything():
    for seed in range(20):
        recorded = simulated(RandomPolicy(seed), seed, 2.0)
        assert simulated(Replay(recorded), seed, 2.0) == recorded


@contextmanager
def late(engine, gate):
    """Nothing comes while the engine does not wait for it, and then everything does."""
    transfers = engine.runner.transfers

    def opening(call):
        def opened(*arguments):
            gate.set()
            try:
                call(*arguments)
            finally:
                gate.clear()

        return opened

    transfers.wait, transfers.rest = opening(transfers.wait), opening(transfers.rest)
    try:
        yield
    finally:
        gate.set()
        del transfers.wait, transfers.rest


def test_a_replay_whose_prefetches_come_as_late_as_they_can_runs():
    """The recording had them at once."""
    model, batches, _ = case("bfloat16")
    budget, waited = SLOTS * model.bank.expert_bytes, 0
    for seed in range(6):
        policy = RandomPolicy(seed, ahead=1.0, restless=0.7)
        with Engine(model, OffloadConfig(device_budget=budget, policy=policy)) as engine:
            decide, transfers = engine.runner._decide, engine.runner.transfers

            def patient(*arguments, decide=decide, transfers=transfers):
                transfers.rest()
                return decide(*arguments)

            engine.runner._decide = patient
            recorded = engine.generate(batches[0], max_new_tokens=4, record_plans=True)
        gate = threading.Event()

        def copy(array, sharding, gate=gate):
            assert gate.wait(60)
            return jax.device_put(array, sharding)

        config = OffloadConfig(device_budget=budget, policy=Replay(recorded.plans))
        with copying_by(copy), Engine(model, config) as engine, late(engine, gate):
            rest = engine.runner.transfers.rest
            waits = []

            def counted(rest=rest, waits=waits):
                waits.append(None)
                rest()

            engine.runner.transfers.rest = counted
            again = in_time(
                lambda engine=engine: engine.generate(batches[0], max_new_tokens=4, record_plans=True)
            )
        waited += len(waits)
        assert places(again.plans) == places(recorded.plans)
        assert again.token_ids == recorded.token_ids
    assert waited


@given(st.data())
@settings(deadline=None)
def test_a_layer_that_is_not_to_be_waited_for_has_room(data):
    """From any residency and whatever is on its way; and once that has come, there is room in any case."""
    model = [ExpertId(layer, expert) for layer in range(3) for expert in range(4)]
    held = st.lists(st.sampled_from(model), unique=True, max_size=SLOTS)
    before, now = data.draw(held), data.draw(held)
    coming = now[: data.draw(st.integers(0, len(now)))]
    device = data.draw(st.sets(st.integers(0, 3)))
    needed = [ExpertId(1, expert) for expert in sorted(device)]
    evict = [expert for expert in before if expert not in needed]
    plan = LayerPlan(
        step=0,
        layer=1,
        device=tuple(sorted(device)),
        host=tuple(sorted(set(range(4)) - device)),
        evict=tuple(evict[: data.draw(st.integers(0, len(evict)))]),
        load=tuple(expert for expert in needed if expert not in before),
    )
    demand = dict.fromkeys(range(4), 1)
    seen = Observation(step=0, layer=1, phase="decode", demand=demand, resident=set(before), in_flight=())
    if len(before) - len(plan.evict) + len(plan.load) > SLOTS:
        return
    check_plan(plan, seen, SLOTS)
    replay = Replay([plan])
    seen = replace(seen, resident={*now}.difference(coming), in_flight=coming)
    if replay.awaits_link(SLOTS, seen):
        assert coming
        seen = replace(seen, resident={*now}, in_flight=())
        assert not replay.awaits_link(SLOTS, seen)
    _, again = replay.plan(SLOTS, seen)
    check_plan(again, seen, SLOTS)
    assert (again.device, again.host) == (plan.device, plan.host)
