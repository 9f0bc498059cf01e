"""Belady's hit rate: against every way to keep experts, and against caches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import SEEDS, geometry, random_costs, random_demand, some_experts, subsets

from layerscope_jax import POLICIES, ExpertId
from layerscope_jax.scheduling.belady import belady_hit_rate
from layerscope_jax.simulation.simulator import Workload, simulate


def most_hits(counts, slots, resident):
    """Of all ways to keep experts that were there or asked for."""
    steps, layers, _ = counts.shape
    hits = {frozenset(resident): 0}
    for step, layer in np.ndindex(steps, layers):
        active = {ExpertId(layer, e) for e in np.flatnonzero(counts[step, layer]).tolist()}
        later = {}
        for held, so_far in hits.items():
            for kept in subsets(held | active, slots):
                state = frozenset(kept)
                later[state] = max(later.get(state, 0), so_far + len(active & held))
        hits = later
    return max(hits.values())


@given(seed=SEEDS, slots=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_belady_is_the_best_replacement(seed, slots):
    rng = np.random.default_rng(seed)
    shape = (4, int(rng.integers(1, 3)), 3)
    counts = random_demand(rng, shape, rng.choice([0.2, 0.6]))
    resident = some_experts(rng, shape, slots)
    found = belady_hit_rate(counts, slots, resident)
    assert found * np.count_nonzero(counts) == pytest.approx(most_hits(counts, slots, resident))


@pytest.mark.parametrize("name", ["lru", "lfu", "arc", "least-stale", "on-demand"])
@given(seed=SEEDS, slots=st.integers(6, 14))
@settings(deadline=None, max_examples=20)
def test_no_cache_hits_more_often_than_belady(name, seed, slots):
    rng = np.random.default_rng(seed)
    shape = (8, 3, 6)
    counts, resident = random_demand(rng, shape, 0.4), some_experts(rng, shape, slots)
    workload = Workload(phase="decode", tokens=3, counts=counts)
    (result,) = simulate(POLICIES[name](), [workload], geometry(shape, slots), random_costs(rng), resident)
    best = belady_hit_rate(counts, slots, resident)
    assert result.hit_rate <= best + 1e-12
    assert best <= belady_hit_rate(counts, slots + 1, resident) + 1e-12


def test_nothing_asked_for_is_no_miss():
    assert belady_hit_rate(np.zeros((2, 1, 3), int), 2) == 1.0
    assert belady_hit_rate(np.ones((2, 1, 3), int), 0) == 0.0
