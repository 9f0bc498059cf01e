"""The bound of who does not know the future, against the best of all causal schedules."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import SEEDS, geometry, random_costs, random_demand, subsets

from layerscope_jax import ExpertId, HardwareProfile, TimeTable
from layerscope_jax.runtime.lower_bound import lower_bound_ms
from layerscope_jax.simulation.causal_bound import causal_bound_ms

pytestmark = pytest.mark.usefixtures("quick_compiles")

TINY = (2, 2, 3)
ROUNDING = 1 + 1e-9


def least_expected_ms(counts, tokens, slots, costs, look_ahead):
    """The expected time of the best of all schedules that know a few turns, by the law that the bound is of.

    Its engine could not be better: the link never rests, a copy only has to be done when its layer ends, and
    takes no room before.
    """
    steps, layers, experts = counts.shape
    turns, everything = steps * layers, [ExpertId(la, e) for la, e in np.ndindex(layers, experts)]

    @functools.cache
    def time_ms(layer, drawn, there):
        demand = dict(enumerate(counts[drawn, layer].tolist()))
        present = [expert for expert in there if demand[expert]]
        return costs.layer_ms(tokens) + min(
            max(
                sum(costs.device_ms(demand[e]) for e in device),
                sum(costs.host_ms(n) for e, n in demand.items() if n and e not in device),
            )
            for device in subsets(present, slots)
        )

    @functools.cache
    def least(turn, held, copies, end, known):
        """Expected end, if demands up to `look_ahead` turns after this one are known."""
        if turn == turns:
            return end
        if len(known) < min(turn + 1 + look_ahead, turns) - turn:
            return np.mean([least(turn, held, copies, end, (*known, drawn)) for drawn in range(steps)])
        layer, best = turn % layers, np.inf
        mine = [expert for expert in everything if expert.layer == layer]
        for kept in subsets(held, slots):
            for loaded in subsets(set(mine) - set(kept), slots - len(kept)):
                there = (*kept, *loaded)
                took = time_ms(layer, known[0], tuple(e.expert for e in there if e.layer == layer))
                ended = max(end + took, costs.transfer_ms * (copies + len(loaded)))
                after = frozenset(there), copies + len(loaded), ended, known[1:]
                best = min(best, least(turn + 1, *after))
        return best

    return min(least(0, frozenset(held), 0, 0.0, ()) for held in subsets(everything, slots))


@given(seed=SEEDS, slots=st.integers(0, 1), look_ahead=st.integers(0, 1))
@settings(deadline=None, max_examples=10)
def test_no_causal_schedule_is_faster_than_the_bound(seed, slots, look_ahead):
    rng = np.random.default_rng(seed)
    counts, costs = random_demand(rng, TINY), random_costs(rng)
    bound = causal_bound_ms(counts, 3, geometry(TINY, slots), costs, look_ahead)
    assert bound <= least_expected_ms(counts, 3, slots, costs, look_ahead) * ROUNDING


def one_of_two(steps):
    """A layer asks for one of two experts in turns, the other layer for none that is worth anything."""
    counts = np.zeros((steps, 2, 2), int)
    counts[:, 0, 0], counts[:, 0, 1], counts[:, 1, 0] = np.arange(steps) % 2, (np.arange(steps) + 1) % 2, 1
    flat = TimeTable((1,), (0.0,))
    return counts, HardwareProfile(
        host_ms=TimeTable((1,), (10.0,)), device_ms=flat, transfer_ms=1e6, layer_ms=flat, source="made up"
    )


def test_it_is_near_what_a_guess_is_worth():
    """A copy takes for ever, so that what is kept of the beginning counts: half of a coin's throws.

    There is room for the expert that the second layer always asks for and for one of the first one's. The
    bound is lower: it lets both be there at first, as one of them will not be needed.
    """
    steps = 8
    counts, costs = one_of_two(steps)
    best = steps / 2 * 10
    assert 0.85 * best < causal_bound_ms(counts, 1, geometry(counts.shape, 2), costs, 0) < best
    # With a slot for each of the three it does not matter.
    assert causal_bound_ms(counts, 1, geometry(counts.shape, 3), costs, 0) == pytest.approx(0, abs=0.5)


def test_to_know_more_never_takes_longer():
    for seed in range(2):
        rng = np.random.default_rng(seed)
        counts, costs = random_demand(rng, (6, 3, 8)), random_costs(rng)
        bounds = [causal_bound_ms(counts, 3, geometry(counts.shape, 6), costs, ahead) for ahead in (0, 1, 2)]
        assert all(more <= 1.01 * less for less, more in itertools.pairwise(bounds)), bounds
        # Nor is any of them far below who knows all.
        assert bounds[-1] > 0.8 * lower_bound_ms(counts, 3, geometry(counts.shape, 6), costs)


def test_another_geometry_is_refused():
    costs = random_costs(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"expected counts \[S, 2, 3\].*got \[2, 3, 2\]"):
        causal_bound_ms(np.ones((2, 3, 2), int), 1, geometry(TINY, 1), costs, 1)
