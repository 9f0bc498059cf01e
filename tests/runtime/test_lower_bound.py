"""Bounds: against every schedule there is, against the linear program, against policies in the simulation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import SEEDS, geometry, random_costs, random_demand, some_experts, subsets
from scipy.optimize import linprog
from scipy.sparse import coo_array

from layerscope_jax import POLICIES, ExpertId, LayerPlan
from layerscope_jax.runtime import lower_bound as bounds
from layerscope_jax.runtime.lower_bound import lower_bound_ms
from layerscope_jax.scheduling.oracle import Oracle
from layerscope_jax.simulation.simulator import Workload, simulate

pytestmark = pytest.mark.usefixtures("quick_compiles")

TINY = (2, 2, 3)
"""Steps, layers, experts; one shape, so that few programs are compiled."""

ROUNDING = 1 + 1e-9


def least_ms(counts, tokens, slots, costs, resident):
    """The time of the best of all schedules, under an engine that could not be better.

    It knows the future and its link never rests: a copy only has to be done when its layer ends, and takes no
    room before.
    """
    steps, layers, _ = counts.shape
    other = costs.layer_ms(tokens)
    ends = {(frozenset(resident), 0): 0.0}  # what is there, and copies so far -> the earliest end
    for step in range(steps):
        for layer in range(layers):
            demand = {ExpertId(layer, e): n for e, n in enumerate(counts[step, layer].tolist()) if n}
            layer_ms = {}
            for there in subsets(demand, slots):
                layer_ms[there] = min(
                    other
                    + max(
                        sum(costs.device_ms(demand[e]) for e in device),
                        sum(costs.host_ms(n) for e, n in demand.items() if e not in device),
                    )
                    for device in subsets(there, slots)
                )
            later = {}
            for (held, copies), end in ends.items():
                for kept in subsets(held, slots):
                    for loaded in subsets(set(demand) - set(kept), slots - len(kept)):
                        there = tuple(sorted({*kept, *loaded} & set(demand)))
                        state = frozenset((*kept, *loaded)), copies + len(loaded)
                        ended = max(end + layer_ms[there], costs.transfer_ms * state[1])
                        later[state] = min(later.get(state, np.inf), ended)
            ends = later
    return min(ends.values())


def linear_program_ms(counts, tokens, slots, costs, resident):
    """The least of the relaxation, without prices.

    Variables of each expert's turn: x computed on the device, y present, z copied, r kept until its next
    turn, the first r being what is there at the beginning. And the time of each layer.
    """
    steps, layers, experts = counts.shape
    size = counts.size
    x, y, z = (offset + np.arange(size).reshape(counts.shape) for offset in (0, size, 2 * size))
    r = 3 * size + np.arange(size + layers * experts).reshape(steps + 1, layers, experts)
    times = r.max() + 1 + np.arange(steps * layers).reshape(steps, layers)
    rows, columns, values, limits = [], [], [], []

    def at_most(limit, *terms):
        for variables, factors in terms:
            variables = np.ravel(variables)
            rows.extend([len(limits)] * len(variables))
            columns.extend(variables)
            values.extend(np.broadcast_to(factors, variables.shape))
        limits.append(limit)

    host, device = (
        np.array([0.0] + [table(n) for n in range(1, 10)])[counts]
        for table in (costs.host_ms, costs.device_ms)
    )
    other = costs.layer_ms(tokens)
    for s, la in np.ndindex(steps, layers):
        at_most(-other, (x[s, la], device[s, la]), (times[s, la], -1.0))
        at_most(-other - host[s, la].sum(), (x[s, la], -host[s, la]), (times[s, la], -1.0))
        for e in range(experts):
            at_most(0, (x[s, la, e], 1.0), (y[s, la, e], -1.0))
            at_most(0, (r[s + 1, la, e], 1.0), (y[s, la, e], -1.0))
            at_most(0, (y[s, la, e], 1.0), (r[s, la, e], -1.0), (z[s, la, e], -1.0))
        turns = s * layers + la + 1
        copied, elapsed = z.reshape(-1, experts)[:turns], times.reshape(-1)[:turns]
        at_most(0, (copied, costs.transfer_ms), (elapsed, -1.0))
        at_most(slots, (r[s + 1, :la], 1.0), (y[s, la], 1.0), (r[s, la + 1 :], 1.0))
    upper = np.ones(times.max() + 1)
    upper[r[0]] = 0
    for expert in resident:
        upper[r[0][expert]] = 1
    upper[times] = np.inf
    solved = linprog(
        np.isin(np.arange(len(upper)), times).astype(float),
        A_ub=coo_array((values, (rows, columns)), shape=(len(limits), len(upper))).tocsr(),
        b_ub=limits,
        bounds=np.stack([np.zeros_like(upper), upper], 1),
    )
    assert solved.success
    return solved.fun


class Any:
    """A policy that draws its plans: everything that `check_plan` allows may come of it."""

    name = "any"
    uses_costs = False

    def __init__(self, rng):
        self.rng = rng

    def init(self, geometry, profile):
        return geometry

    def plan(self, state, seen):
        rng = self.rng
        experts = [ExpertId(la, e) for la in range(state.num_layers) for e in range(state.num_experts)]
        resident, coming = sorted(seen.resident), set(seen.in_flight)
        evict = [expert for expert in resident if rng.random() < 0.3]
        there = coming.union(resident).difference(evict)
        device, load, room = [], [], state.slots - len(there)
        for expert in rng.permutation(sorted(seen.demand)).tolist():
            wanted = ExpertId(seen.layer, expert)
            if wanted in evict or rng.random() < 0.3:
                continue
            if wanted not in there and room:
                load.append(wanted)
                room -= 1
            if wanted in there or wanted in load:
                device.append(expert)
        absent = [expert for expert in experts if expert not in there and expert not in load]
        prefetch = [absent[i] for i in rng.permutation(len(absent))[: rng.integers(0, room + 1)]]
        return state, LayerPlan(
            step=seen.step,
            layer=seen.layer,
            device=tuple(device),
            host=tuple(seen.demand.keys() - set(device)),
            evict=tuple(evict),
            load=tuple(load),
            prefetch=tuple(prefetch),
        )


@given(seed=SEEDS, slots=st.integers(0, 2))
@settings(deadline=None, max_examples=15)
def test_no_schedule_is_faster_than_the_bound(seed, slots):
    rng = np.random.default_rng(seed)
    counts, costs = random_demand(rng, TINY), random_costs(rng)
    resident = some_experts(rng, TINY, slots)
    bound = lower_bound_ms(counts, 3, geometry(TINY, slots), costs, resident)
    best = least_ms(counts, 3, slots, costs, resident)
    assert bound <= best * ROUNDING
    # And that best of all is no slower than whatever the simulation makes of any plans.
    for _ in range(5):
        workload = Workload(phase="decode", tokens=3, counts=counts)
        (result,) = simulate(Any(rng), [workload], geometry(TINY, slots), costs, resident)
        assert best <= result.total_ms * ROUNDING


@pytest.mark.parametrize(("shape", "slots", "seeds"), [(TINY, 2, range(8)), ((6, 3, 8), 6, range(2))])
def test_the_bound_is_all_but_the_linear_program(shape, slots, seeds, monkeypatch):
    """In which experts may be computed in parts; whole ones can only cost more."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        counts, costs = random_demand(rng, shape), random_costs(rng)
        resident = some_experts(rng, shape, slots)
        exact = linear_program_ms(counts, 3, slots, costs, resident)
        whole = lower_bound_ms(counts, 3, geometry(shape, slots), costs, resident)
        with monkeypatch.context() as context:
            context.setattr(bounds, "FEW", 0)
            bound = lower_bound_ms(counts, 3, geometry(shape, slots), costs, resident)
        assert 0.99 * exact <= bound <= exact * ROUNDING, seed
        assert whole >= 0.99 * bound, seed


@given(seed=SEEDS, slots=st.integers(0, 6))
@settings(deadline=None, max_examples=12)
def test_the_bound_is_never_above_a_policy(seed, slots):
    rng = np.random.default_rng(seed)
    counts, costs, shape = random_demand(rng, TINY), random_costs(rng), geometry(TINY, slots)
    resident = some_experts(rng, TINY, slots)
    workload = Workload(phase="decode", tokens=3, counts=counts)
    bound = lower_bound_ms(counts, 3, shape, costs, resident)
    freely = lower_bound_ms(counts, 3, shape, costs)
    _, layers, experts = TINY
    everything = [ExpertId(la, e) for la in range(layers) for e in range(experts)]
    for policy in (Oracle([counts]), *(policy() for policy in POLICIES.values())):
        try:
            policy.init(shape, costs)
        except ValueError:
            continue
        there, least = (everything, freely) if policy.name == "resident" else (resident, max(bound, freely))
        (result,) = simulate(policy, [workload], shape, costs, there)
        assert least <= result.total_ms * ROUNDING, policy.name


@given(seed=SEEDS, slots=st.integers(0, 5))
@settings(deadline=None, max_examples=12)
def test_more_budget_or_a_faster_link_never_raises_the_bound(seed, slots):
    """But for what the ascent leaves undone: at equal prices the value falls, the prices found differ."""
    rng = np.random.default_rng(seed)
    counts, costs = random_demand(rng, TINY), random_costs(rng)
    resident = some_experts(rng, TINY, slots)
    bound = lower_bound_ms(counts, 3, geometry(TINY, slots), costs, resident)
    faster = replace(costs, transfer_ms=costs.transfer_ms * 0.7)
    for easier in (
        lower_bound_ms(counts, 3, geometry(TINY, slots + 1), costs, resident),
        lower_bound_ms(counts, 3, geometry(TINY, slots), faster, resident),
    ):
        assert easier <= 1.01 * bound


def test_a_bound_of_another_geometry_is_refused():
    with pytest.raises(ValueError, match=r"expected counts \[S, 2, 3\].*got \[2, 3, 2\]"):
        lower_bound_ms(np.ones((2, 3, 2), int), 1, geometry(TINY, 1), random_costs(np.random.default_rng(0)))
