"""The engine on a virtual clock: examples by hand, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from layerscope_jax import (
    POLICIES,
    ExpertId,
    Geometry,
    HardwareProfile,
    LayerPlan,
    PolicyBase,
    TimeTable,
)
from layerscope_jax.simulation.simulator import Workload, simulate

# An expert takes 4 ms on the host, 1 ms on the device and 3 ms to get there; a layer 0.5 ms in any case.
COSTS = HardwareProfile(
    host_ms=TimeTable((1,), (4.0,)),
    device_ms=TimeTable((1,), (1.0,)),
    transfer_ms=3.0,
    layer_ms=TimeTable((1,), (0.5,)),
    source="made up",
)


class Script:
    """Plans as they are written down, one after the other; keeps what it saw."""

    name = "script"
    uses_costs = False

    def __init__(self, *plans):
        self.plans = plans
        self.seen = []

    def init(self, geometry, profile):
        return 0

    def plan(self, state, seen):
        self.seen.append(replace(seen, resident=set(seen.resident), in_flight=set(seen.in_flight)))
        return state + 1, LayerPlan(step=seen.step, layer=seen.layer, **self.plans[state])


def geometry(slots, num_layers=1, num_experts=4, expert_bytes=300):
    return Geometry(
        num_layers=num_layers,
        num_experts=num_experts,
        experts_per_token=min(2, num_experts),
        expert_bytes=expert_bytes,
        slots=slots,
    )


def decode(counts, **changes):
    return Workload(phase="decode", tokens=1, counts=np.array(counts), **changes)


def run(plans, counts, slots=8, costs=COSTS, **changes):
    policy, workload = Script(*plans), decode(counts)
    shape = geometry(slots, *workload.counts.shape[1:])
    (result,) = simulate(policy, [workload], shape, costs, **changes)
    return result, policy.seen


def test_host_device_and_link_work_at_once():
    plan = {"device": (0, 1, 2), "host": (3,), "load": (ExpertId(0, 1), ExpertId(0, 2))}
    result, _ = run([plan], [[[1, 1, 1, 5]]], resident=[ExpertId(0, 0)])
    # Planned at 0.5. Device: 0 until 1.5, 1 (there at 3.5) until 4.5, 2 (there at 6.5) until 7.5. Host: 4.5.
    assert result.step_ms == (7.5,)
    assert (result.device_share, result.host_share, result.link_share) == (3.5 / 7.5, 4 / 7.5, 6 / 7.5)
    assert (result.hit_rate, result.token_hit_rate) == (1 / 4, 1 / 8)
    assert (result.bytes_demand, result.bytes_prefetch, result.bytes_wasted) == (600, 0, 0)
    assert (result.peak_expert_bytes, result.prefetch_on_time, result.forecast_recall) == (900, None, None)
    assert (result.total_ms, result.bytes_moved) == (7.5, 600)


def test_the_host_works_one_after_the_other_and_may_be_the_last():
    result, _ = run([{"device": (0,), "host": (1, 2, 3)}], [[[1, 1, 1, 1]]], resident=[ExpertId(0, 0)])
    assert (result.step_ms, result.host_share) == ((12.5,), 12 / 12.5)


def test_a_device_that_is_busy_takes_what_has_come_meanwhile():
    plan = {"device": (0, 1, 2), "load": (ExpertId(0, 1), ExpertId(0, 2))}
    slow = replace(COSTS, device_ms=TimeTable((1,), (7.0,)))
    result, _ = run([plan], [[[1, 1, 1, 0]]], costs=slow, resident=[ExpertId(0, 0)])
    assert result.step_ms == (21.5,)  # no gap: both came at 6.5, before the first was done at 7.5


def test_prefetches_come_while_a_layer_computes():
    plans = [
        {"host": (0,), "prefetch": (ExpertId(1, 1), ExpertId(1, 0))},
        {"device": (0, 1)},
    ]
    result, seen = run(plans, [[[1, 0], [1, 3]]])
    # Layer 1 is planned at 5: its expert 1 came at 3.5 and is done at 6; two chunks of 0 have begun, it
    # comes at 6.5. The third was begun on demand.
    assert (seen[1].resident, seen[1].in_flight) == ({ExpertId(1, 1)}, {ExpertId(1, 0)})
    assert result.step_ms == (7.5,)
    assert (result.hit_rate, result.token_hit_rate) == (1 / 3, 3 / 5)
    assert (result.bytes_prefetch, result.bytes_demand, result.bytes_wasted) == (500, 100, 0)
    assert result.prefetch_on_time == 1 / 2


def test_a_load_waits_for_one_chunk_of_a_prefetch_that_then_goes_on():
    plans = [
        {"host": (0,), "prefetch": (ExpertId(2, 0), ExpertId(2, 1))},
        {"device": (0,), "load": (ExpertId(1, 0),)},
        {"host": (0,), "device": (1,)},
    ]
    result, seen = run(plans, [[[1, 0], [1, 0], [1, 1]]])
    # At 5 a chunk of (2, 1) is on the link until 5.5; (1, 0) comes at 8.5 and is done at 9.5. Layer 2 is
    # planned at 10; what was left of (2, 1) came at 9.5.
    assert seen[2].resident == {ExpertId(2, 0), ExpertId(2, 1), ExpertId(1, 0)}
    assert result.step_ms == (14.0,)
    assert (result.bytes_prefetch, result.bytes_demand, result.bytes_wasted) == (600, 300, 300)


@pytest.mark.parametrize(("arrays", "step_ms"), [(1, 15.0), (2, 15.0), (3, 14.0)])
def test_a_load_waits_for_one_array_of_a_prefetch(arrays, step_ms):
    plans = [
        {"host": (0,), "prefetch": (ExpertId(2, 0), ExpertId(2, 1))},
        {"device": (0,), "load": (ExpertId(1, 0),)},
        {"host": (0,), "device": (1,)},
    ]
    shape = replace(geometry(8, num_layers=3, num_experts=2), arrays_per_expert=arrays)
    (result,) = simulate(Script(*plans), [decode([[[1, 0], [1, 0], [1, 1]]])], shape, COSTS)
    # At 5 an array of (2, 1) is on the link: until 5.5 if there are three, else until 6.5. Then the load
    # takes 3 ms and its computation 1 ms, and layer 2 takes 4.5 ms.
    assert result.step_ms == (step_ms,)
    assert (result.bytes_prefetch, result.bytes_demand) == (600, 300)


def test_stale_prefetches_are_dropped_unless_they_have_begun():
    plans = [
        {"host": (0,), "prefetch": (ExpertId(1, 0), ExpertId(1, 1), ExpertId(1, 2), ExpertId(0, 2))},
        {"host": (3,)},
        {"host": (0,), "evict": (ExpertId(1, 0),)},
        {"host": (3,)},
    ]
    result, seen = run(plans, [[[1, 0, 0, 0], [0, 0, 0, 1]]] * 2)
    assert seen[1].in_flight == {ExpertId(1, 1), ExpertId(1, 2), ExpertId(0, 2)}
    # (1, 2) had not begun at 5; (0, 2), of another layer, was its next at 6.5.
    assert (seen[2].resident, seen[2].in_flight) == ({ExpertId(1, 0), ExpertId(1, 1), ExpertId(0, 2)}, set())
    assert seen[3].resident == {ExpertId(1, 1), ExpertId(0, 2)}
    assert (result.bytes_prefetch, result.bytes_wasted, result.prefetch_on_time) == (900, 900, None)
    assert result.peak_expert_bytes == 1200


def test_what_is_needed_while_its_last_chunk_is_on_the_link():
    plans = [{"host": (0,), "prefetch": (ExpertId(1, 0),)}, {"device": (0,)}]
    costs = replace(COSTS, host_ms=TimeTable((1,), (2.0,)))
    result, seen = run(plans, [[[1], [1]]], costs=costs)
    assert seen[1].in_flight == {ExpertId(1, 0)}  # at 3; it comes at 3.5
    assert result.step_ms == (4.5,)
    assert (result.bytes_prefetch, result.bytes_demand) == (300, 0)


def test_each_workload_has_its_own_figures_and_what_is_there_stays():
    plans = [
        {"host": (0,), "prefetch": (ExpertId(0, 1), ExpertId(0, 2))},
        {"device": (1,), "host": ()},
    ]
    policy = Script(*plans)
    first, second = (
        Workload(phase=phase, tokens=1, counts=np.array([[row]]))
        for phase, row in (("prefill", [1, 0, 0]), ("decode", [0, 1, 0]))
    )
    results = simulate(policy, [first, second], geometry(2, 1, 3), COSTS)
    assert [(seen.step, seen.phase) for seen in policy.seen] == [(0, "prefill"), (1, "decode")]
    # The first ends at 4.5: four chunks began at 0.5 to 3.5, and another at that very moment.
    assert [result.step_ms for result in results] == [(4.5,), (1.5,)]
    assert [result.bytes_prefetch for result in results] == [500, 100]
    assert [result.link_share for result in results] == [4 / 4.5, 1.0]
    assert [result.hit_rate for result in results] == [0, 1]
    assert results[1].bytes_wasted == 0  # the other one is the first one's waste, if anybody's
    assert [result.peak_expert_bytes for result in results] == [600, 600]


def test_policies_are_given_the_forecasts_and_recall_is_measured():
    counts = [[[1, 1, 0], [0, 1, 1]]]
    forecasts = np.zeros((1, 2, 2, 3))
    forecasts[0, 0, 0] = [2.0, 0.0, 1.0]
    policy = Script({"host": (0, 1)}, {"host": (1, 2)})
    (result,) = simulate(policy, [decode(counts, forecasts=forecasts)], geometry(0, 2, 3), COSTS)
    assert policy.seen[0].forecast == [[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert result.forecast_recall == 1 / 2
    assert result.link_share == 0


@pytest.mark.parametrize("wants", [True, False])
def test_a_layer_that_looks_ahead_takes_longer(wants):
    class Choosy(Script, PolicyBase):
        def wants_forecast(self, state):
            return wants

    looking = replace(COSTS, forecast_ms=TimeTable((1,), (0.25,)))
    workload = decode([[[1, 0]]], forecasts=np.zeros((1, 1, 1, 2)))
    for foreseen in (True, False):
        given = workload if foreseen else replace(workload, forecasts=None)
        (result,) = simulate(Choosy({"host": (0,)}), [given], geometry(8, 1, 2), looking)
        assert result.step_ms == (4.75 if wants and foreseen else 4.5,)


def test_a_run_without_steps():
    (result,) = simulate(Script(), [decode(np.zeros((0, 2, 4), int))], geometry(3, 2), COSTS)
    assert (result.step_ms, result.total_ms, result.hit_rate, result.link_share) == ((), 0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.ones((2, 3, 4), int)}, r"expected counts \[S, 2, 4\].*got \[2, 3, 4\]"),
        ({"counts": np.ones((2, 2, 5), int)}, r"got \[2, 2, 5\]"),
        ({"counts": np.ones((2, 4), int)}, r"got \[2, 4\]"),
        ({"counts": np.array([[[1, 0, 0, 0], [0, 0, 0, 0]]])}, "got a layer without"),
        ({"counts": np.array([[[1, 0, 0, 0], [2, -1, 0, 0]]])}, "counts must be 0 or more and finite"),
        ({"counts": np.ones((1, 2, 4))}, "counts must be an array of whole numbers, got float64"),
        ({"counts": [[[1, 0, 0, 0], [1, 0, 0, 0]]]}, "counts must be an array of whole numbers, got list"),
        ({"forecasts": np.full((1, 2, 1, 4), np.nan)}, "forecasts must be 0 or more and finite"),
        ({"forecasts": np.full((1, 2, 1, 4), "a")}, "forecasts must be an array of numbers"),
        ({"phase": "train"}, "phase must be one of prefill, decode, got 'train'"),
        ({"forecasts": np.ones((3, 2, 1, 5))}, r"expected forecasts \[3, 2, W, 4\].*got \[3, 2, 1, 5\]"),
        ({"forecasts": np.ones((2, 2, 1, 4))}, r"got \[2, 2, 1, 4\]"),
        ({"forecasts": np.ones((3, 2, 4))}, r"got \[3, 2, 4\]"),
    ],
)
def test_workloads_of_another_geometry_are_refused(changes, message):
    good = decode(np.ones((3, 2, 4), int))
    with pytest.raises(ValueError, match=message):
        simulate(POLICIES["host-only"](), [good, replace(good, **changes)], geometry(3, 2), COSTS)


@pytest.mark.parametrize("resident", [[ExpertId(0, e) for e in range(3)], [ExpertId(1, 0)], [ExpertId(0, 4)]])
def test_residents_that_do_not_fit_are_refused(resident):
    with pytest.raises(ValueError, match="at most 2 experts of the model"):
        simulate(POLICIES["host-only"](), [decode([[[1, 0, 0, 0]]])], geometry(2), COSTS, resident)


@pytest.mark.parametrize(
    "plan", [{}, {"host": (0,), "prefetch": (ExpertId(0, 4),)}, {"device": (0,)}, {"host": (0, 1)}]
)
def test_a_plan_that_is_none_is_refused(plan):
    with pytest.raises(ValueError, match="plan for step 0, layer 0"):
        run([plan], [[[1, 0, 0, 0]]])
