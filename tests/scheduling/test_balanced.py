"""Policies that balance each layer anew, on worked examples."""

import pytest
from policy_runs import SPLIT, follow, geometry

from layerscope_jax import POLICIES, ExpertId, HardwareProfile, TimeTable
from layerscope_jax.scheduling.balanced import SWAPS, WINDOW, assign, keep_workload


def test_hybrimoe_lets_a_layer_end_soonest_and_keeps_the_best_scores():
    # Two for each of three layers are kept of eight.
    steps = [[{0: 9, 1: 9, 2: 9}, {0: 1}, {0: 1}], [{2: 9}, {0: 1}, {0: 1}], [{0: 1, 1: 1}, {0: 1}, {0: 1}]]
    plans, device = follow(POLICIES["hybrimoe"](), geometry(8), steps, SPLIT)
    # A second copy lets the layer end after 11 ms; a third would after 16.
    assert (plans[0].device, plans[0].load, plans[0].host) == ((0, 1), ((0, 0), (0, 1)), (2,))
    assert (plans[1].device, plans[1].host) == ((), (0,))  # a copy for one token would take longer
    assert plans[3].load == (ExpertId(0, 2),)
    assert plans[4].evict == (ExpertId(0, 1),)  # one of three scored lowest
    assert (plans[6].device, plans[6].host) == ((0,), (1,))
    assert device.resident == {ExpertId(0, 0), ExpertId(0, 2)}


def test_hybrimoe_lets_the_host_take_a_resident_expert():
    steps = [[{0: 40, 1: 40}, {0: 1}, {0: 1}], [{0: 1, 1: 1}, {0: 1}, {0: 1}]]
    plans, _ = follow(POLICIES["hybrimoe"](), geometry(8), steps, SPLIT)
    assert plans[0].load == ((0, 0), (0, 1))
    assert (plans[3].device, plans[3].host) == ((0,), (1,))  # both at once for 1 ms each


@pytest.mark.parametrize("name", ["hybrimoe", "dali"])
def test_they_prefetch_for_no_later_layer_without_a_forecast_or_time(name):
    steps = [[{0: 9}, {0: 9}, {0: 9}]] * 2
    blind, _ = follow(POLICIES[name](), geometry(18), steps, SPLIT)
    assert not any(expert.layer != plan.layer for plan in blind for expert in plan.prefetch)
    # Where nothing is computed for long, the link is not idle either.
    quick = HardwareProfile(
        host_ms=TimeTable((1,), (0.0,)), device_ms=TimeTable((1,), (0.0,)), transfer_ms=5.0, source=""
    )
    plans, _ = follow(POLICIES[name](), geometry(18), steps, quick, ahead=2)
    assert not any(expert.layer != plan.layer for plan in plans for expert in plan.prefetch)


def test_hybrimoe_prefetches_what_saves_most():
    # Layer 1 would take 3 ms on the host, 1 ms if prefetched; layer 2 saves its copy: 6 ms or 1 ms.
    plans, _ = follow(POLICIES["hybrimoe"](), geometry(18), [[{0: 9}, {0: 3}, {1: 20}]], SPLIT, ahead=2)
    assert plans[0].load == (ExpertId(0, 0),)
    assert plans[0].prefetch == (ExpertId(2, 1),)  # a second would not begin within the layer's 6 ms
    assert plans[2].device == (1,)
    assert plans[2].load == ()


def test_dali_sends_each_expert_to_where_it_is_done_first():
    # Expert 3: 6 ms on the device or 20 on the host. 2: 11 or 8. 1: 11 or 12. 0: 12 or 9.
    split = assign(SPLIT, {3: 20, 2: 8, 1: 4, 0: 1}, {}, loads=4)
    assert (split.device, split.host, split.load) == ([3, 1], [2, 0], [3, 1])
    assert (split.device_ms, split.host_ms) == (11.0, 9.0)
    assert assign(SPLIT, {3: 20, 2: 20}, {}, loads=1).load == [2]
    # One on its way is there after 5 ms; a load comes after it.
    coming = assign(SPLIT, {3: 20, 2: 20}, {3: 5.0}, loads=1)
    assert (coming.load, coming.device_ms) == ([2], 11.0)


def test_dali_prefetches_what_it_would_load_and_keeps_what_the_first_prefill_used():
    step = [{0: 9, 1: 1}, {2: 9, 3: 1}, {4: 9}]
    plans, device = follow(POLICIES["dali"](), geometry(18), [step, step], SPLIT, ahead=1)
    assert plans[0].load == (ExpertId(0, 0),)
    # What the host does at first is brought to be kept, after what the next layer needs.
    assert plans[0].prefetch == (ExpertId(1, 2), ExpertId(0, 1))
    assert plans[1].load == ()
    assert plans[1].prefetch == (ExpertId(2, 4), ExpertId(1, 3))
    assert device.resident == {ExpertId(*e) for e in ((0, 0), (0, 1), (1, 2), (1, 3), (2, 4))}
    assert not any(plan.load or plan.prefetch or plan.evict for plan in plans[3:])


def test_dali_swaps_by_workload_at_the_end_of_a_window():
    kept, window = keep_workload(None, (0, {}), {0: 5, 1: 4, 2: 3}, 2)
    assert kept == {0, 1}
    for _ in range(WINDOW - 2):
        kept, window = keep_workload(kept, window, {2: 2, 3: 1}, 2)
        assert kept == {0, 1}
    kept, window = keep_workload(kept, window, {3: 4}, 2)
    # Since the beginning: 0 had 5 tokens, 1 had 4, 2 had 7, 3 had 6. Each takes the place of a lesser one.
    assert SWAPS >= 2
    assert kept == {2, 3}
    assert window == (0, {})
    kept, _ = keep_workload(frozenset({0}), (WINDOW - 1, {}), {0: 1, 1: 1}, 3)
    assert kept == {0, 1}  # there was room
