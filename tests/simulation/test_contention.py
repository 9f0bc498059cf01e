"""Host and device at once: each hinders the other as long as both are at work."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import PROFILE

from layerscope_jax import ExpertId, Geometry, HardwareProfile, LayerPlan, TimeTable
from layerscope_jax.runtime.lower_bound import lower_bound_ms
from layerscope_jax.simulation.contention import side_by_side
from layerscope_jax.simulation.simulator import Workload, simulate

ALONE = HardwareProfile(
    host_ms=TimeTable((1,), (2.0,)),
    device_ms=TimeTable((1,), (1.0,)),
    transfer_ms=3.0,
    layer_ms=TimeTable((1,), (0.5,)),
    host_start_ms=0.25,
    source="made up",
)
TOGETHER = HardwareProfile(
    host_ms=TimeTable((1,), (4.0,)),
    device_ms=TimeTable((1,), (2.0,)),
    transfer_ms=6.0,
    layer_ms=TimeTable((1,), (0.75,)),
    host_start_ms=1.0,
    source="made up",
    alone=ALONE,
)
EVERY = dict.fromkeys(range(6), 1)


@pytest.mark.parametrize(
    ("host", "device", "host_ms", "pace"),
    [
        ((0, 1), (), 4.25, 1.0),  # alone: the start and two experts
        ((), (0, 1), 0.0, 0.5),
        # 2 of the host's 5 ms are together; the other three fifths alone, of 2.25 ms.
        ((0,), (1,), 2 + 0.6 * 2.25, 1.0),
        # 5 of the device's 10 ms are together; the other half alone, of 5 ms.
        ((0,), (1, 2, 3, 4, 5), 5.0, 0.75),
    ],
)
def test_who_is_left_goes_on_alone(host, device, host_ms, pace):
    plan = LayerPlan(step=0, layer=0, host=host, device=device)
    assert side_by_side(TOGETHER, plan, EVERY, copying=False) == (pytest.approx(host_ms), pytest.approx(pace))


def test_without_times_alone_nothing_is_faster():
    plan = LayerPlan(step=0, layer=0, host=(0,), device=(1,))
    assert side_by_side(replace(TOGETHER, alone=None), plan, EVERY, copying=False) == (5.0, 1.0)
    assert side_by_side(TOGETHER, plan, EVERY, copying=True) == (5.0, 1.0)
    assert PROFILE.host_start_ms == 0


class Script:
    name, uses_costs = "script", False

    def __init__(self, *plans):
        self.plans = plans

    def init(self, geometry, profile):
        return 0

    def plan(self, state, seen):
        return state + 1, LayerPlan(step=seen.step, layer=seen.layer, **self.plans[state])


def run(*plans):
    """Steps of one layer of three experts, two of them active."""
    counts = np.tile([1, 1, 0], (len(plans), 1, 1))
    shape = Geometry(num_layers=1, num_experts=3, experts_per_token=1, expert_bytes=300, slots=3)
    workload = Workload(phase="decode", tokens=1, counts=counts)
    return simulate(Script(*plans), [workload], shape, TOGETHER)[0].step_ms


def test_copies_take_their_time_alone_where_the_host_computes_nothing():
    load = (ExpertId(0, 0), ExpertId(0, 1))
    # A layer beside which nothing is copied, two copies, and the last expert's product, begun beside them.
    assert run({"device": (0, 1), "load": load}) == pytest.approx((0.5 + 6 + 2,))


def test_copies_hinder_the_host_and_the_next_layer():
    prefetch = {"host": (0, 1), "prefetch": (ExpertId(0, 2), ExpertId(0, 1))}
    # Beside the host they take 12 ms: past the end of the first step, not of the second.
    assert run(prefetch, {"host": (0, 1)}, {"host": (0, 1)}) == pytest.approx((0.5 + 9, 0.75 + 9, 0.5 + 4.25))


def test_no_bound_counts_on_parts_hindering_each_other():
    counts = np.tile([1, 1, 0], (4, 1, 1))
    shape = Geometry(num_layers=1, num_experts=3, experts_per_token=1, expert_bytes=300, slots=3)
    both, alone = (lower_bound_ms(counts, 1, shape, costs, rounds=20) for costs in (TOGETHER, ALONE))
    assert both == alone
