"""What tests of bounds share: random demand, costs and residents, from a generator; every subset."""

from itertools import chain, combinations

import numpy as np
from hypothesis import strategies as st

from layerscope_jax import ExpertId, Geometry, HardwareProfile, TimeTable

SEEDS = st.integers(0, 100_000)


def random_demand(rng, shape, often=0.6):
    counts = rng.integers(1, 9, shape) * (rng.random(shape) < often)
    counts[..., 0] += counts.sum(-1) == 0
    return counts


def random_costs(rng):
    def times(most):
        return TimeTable((1, 8), tuple(np.sort(rng.uniform(0, most, 2)).tolist()))

    return HardwareProfile(
        host_ms=times(3.0),
        device_ms=times(1.0),
        transfer_ms=float(rng.choice([0.1, 0.5, 2.0])),
        layer_ms=times(1.0),
        source="made up",
    )


def geometry(shape, slots):
    _, layers, experts = shape
    return Geometry(num_layers=layers, num_experts=experts, experts_per_token=1, expert_bytes=3, slots=slots)


def some_experts(rng, shape, most):
    _, layers, experts = shape
    chosen = rng.permutation(layers * experts)[: rng.integers(0, most + 1)]
    return [ExpertId(int(i) // experts, int(i) % experts) for i in chosen]


def subsets(things, most):
    things = sorted(things)
    return chain.from_iterable(combinations(things, size) for size in range(min(most, len(things)) + 1))
