"""Simulated runs: the real engine's decisions, and what holds whatever is asked for."""

from dataclasses import fields, replace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROFILE, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import (
    POLICIES,
    Engine,
    ExpertId,
    Geometry,
    HardwareProfile,
    LayerPlan,
    OffloadConfig,
    TimeTable,
)
from layerscope_jax.runtime.outcome import Outcome
from layerscope_jax.scheduling.presched import PreSched
from layerscope_jax.simulation.simulator import Workload, simulate

EVERY = {**POLICIES, PreSched.name: PreSched}
PROMPTS = [[5, 6, 7], [3, 9, 27, 20, 60, 58, 52, 34, 41, 1, 3]]


def geometry(slots, layers, experts, expert_bytes=300):
    return Geometry(
        num_layers=layers,
        num_experts=experts,
        experts_per_token=min(2, experts),
        expert_bytes=expert_bytes,
        slots=slots,
    )


class Listener:
    """Another policy, whose demand is noted."""

    def __init__(self, policy):
        self.policy, self.demand = policy, []
        self.name, self.uses_costs = policy.name, policy.uses_costs
        self.init = policy.init

    def plan(self, state, seen):
        self.demand.append((seen.phase, dict(seen.demand)))
        return self.policy.plan(state, seen)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", ["lru", "host-only", "on-demand"])
def test_the_engine_and_its_simulation_decide_alike(name):
    """Their plans do not depend on time, so they are equal."""
    model = random_model(dtype=jnp.bfloat16, seed=1)
    layers, experts, slots = model.config.num_layers, model.config.num_experts, 10
    policy = Listener(POLICIES[name]())
    options = OffloadConfig(device_budget=slots * model.bank.expert_bytes, policy=policy)
    with Engine(model, options) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=4, record_plans=True)
    counts = np.zeros((len(policy.demand) // layers, layers, experts), int)
    for turn, (_, demand) in enumerate(policy.demand):
        counts[turn // layers, turn % layers, list(demand)] = list(demand.values())
    workloads = [
        Workload(phase="prefill", tokens=14, counts=counts[:1]),
        Workload(phase="decode", tokens=2, counts=counts[1:]),
    ]
    assert [phase for phase, _ in policy.demand] == ["prefill"] * layers + ["decode"] * 3 * layers
    plans = []
    shape = geometry(slots, layers, experts, model.bank.expert_bytes)
    simulated = simulate(POLICIES[name](), workloads, shape, PROFILE, record=plans.append)
    assert plans == result.plans
    stats = result.stats
    for outcome in (stats, *simulated):
        assert {field.name for field in fields(Outcome)} <= outcome.to_json().keys()
        assert (outcome.policy, outcome.budget_bytes) == (name, slots * model.bank.expert_bytes)
    assert sum(part.bytes_demand for part in simulated) == stats.bytes_demand
    assert max(part.peak_expert_bytes for part in simulated) == stats.peak_expert_bytes
    active = np.count_nonzero(counts[:1]), np.count_nonzero(counts[1:])
    hits = sum(part.hit_rate * count for part, count in zip(simulated, active, strict=True))
    assert hits / sum(active) == pytest.approx(stats.hit_rate)


@st.composite
def scenes(draw):
    """A geometry, costs, a prefill and a decode with forecasts that are more or less right, and residents."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    slots = draw(st.integers(0, layers * experts))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))

    def workload(phase, tokens, steps):
        counts = rng.binomial(tokens, rng.choice([0.0, 0.1, 0.6], (steps, layers, experts)))
        counts[..., 0] += counts.sum(2) == 0
        ahead = int(rng.integers(0, layers))
        coming = np.concatenate([counts.reshape(-1, experts), np.zeros((ahead, experts))])
        forecasts = [coming[turn + 1 : turn + 1 + ahead] for turn in range(steps * layers)]
        noisy = np.maximum(0, np.array(forecasts) + rng.normal(0, 0.3, (steps * layers, ahead, experts)))
        return Workload(
            phase=phase,
            tokens=tokens,
            counts=counts,
            forecasts=noisy.reshape(steps, layers, ahead, experts) if ahead else None,
        )

    def times(low, high):
        return TimeTable((1, 8), tuple(np.sort(rng.uniform(low, high, 2)).tolist()))

    costs = HardwareProfile(
        host_ms=times(0.0, 4.0),
        device_ms=times(0.0, 1.0),
        transfer_ms=draw(st.sampled_from([0.01, 0.3, 1.0, 5.0])),
        layer_ms=times(0.0, 1.0),
        source="made up",
    )
    known = [ExpertId(layer, expert) for layer in range(layers) for expert in range(experts)]
    resident = [known[i] for i in rng.permutation(len(known))[: rng.integers(0, slots + 1)]]
    workloads = [workload("prefill", 12, 1), workload("decode", 3, draw(st.integers(1, 5)))]
    return geometry(slots, layers, experts), costs, workloads, resident


@pytest.mark.parametrize("name", sorted(EVERY))
@given(scene=scenes())
@settings(deadline=None, max_examples=30)
def test_every_policy_runs_through(name, scene):
    shape, costs, workloads, resident = scene
    if name == "resident":
        shape = replace(shape, slots=shape.num_layers * shape.num_experts)
        resident = [ExpertId(la, e) for la in range(shape.num_layers) for e in range(shape.num_experts)]
    try:
        EVERY[name]().init(shape, costs)
    except ValueError:
        return
    found: list[LayerPlan] = []
    results = simulate(EVERY[name](), workloads, shape, costs, resident, record=found.append)
    again: list[LayerPlan] = []
    # To the bit: there is no clock, and no order but the input's.
    assert results == simulate(EVERY[name](), workloads, shape, costs, set(resident), record=again.append)
    assert found == again
    chunk, plans = shape.expert_bytes // 3, iter(found)
    for workload, result in zip(workloads, results, strict=True):
        host_ms = least_ms = 0.0
        for counts in workload.counts.reshape(-1, shape.num_experts).tolist():
            plan, other_ms = next(plans), costs.layer_ms(workload.tokens)
            on_host = sum(costs.host_ms(counts[e]) for e in plan.host)
            host_ms += on_host
            least_ms += other_ms + max(on_host, sum(costs.device_ms(counts[e]) for e in plan.device))
        assert len(result.step_ms) == len(workload.counts)
        assert min(result.step_ms) >= 0
        assert result.total_ms >= least_ms - 1e-9
        assert result.host_share * result.total_ms == pytest.approx(host_ms)
        assert (0 <= result.link_share <= 1 and 0 < result.device_share <= 1) or result.total_ms == 0
        assert result.peak_expert_bytes <= shape.slots * shape.expert_bytes
        assert result.bytes_demand % chunk == result.bytes_prefetch % chunk == 0
        assert result.bytes_wasted % shape.expert_bytes == 0
        assert 0 <= result.hit_rate <= 1
        assert 0 <= result.token_hit_rate <= 1
    copied, prefetched = sum(len(plan.load) for plan in found), sum(len(plan.prefetch) for plan in found)
    assert sum(result.bytes_moved for result in results) <= (copied + prefetched) * shape.expert_bytes
    assert sum(result.bytes_wasted for result in results) <= prefetched * shape.expert_bytes
    assert next(plans, None) is None
