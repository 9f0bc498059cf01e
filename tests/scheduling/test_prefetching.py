"""Policies that prefetch, on worked examples: they fetch what is expected."""

from policy_runs import follow

from layerscope_jax import ExpertId, Geometry, Observation
from layerscope_jax.scheduling.prefetching import Fate, Klotski, ProMoE

L, E = 3, 6


def geometry(slots):
    return Geometry(num_layers=L, num_experts=E, experts_per_token=2, expert_bytes=1, slots=slots)


def seen(layer, demand, resident=(), in_flight=(), forecast=()):
    return Observation(
        step=0,
        layer=layer,
        phase="decode",
        demand=demand,
        resident=set(resident),
        in_flight=set(in_flight),
        forecast=forecast,
    )


def plan(slots, observation):
    return Fate().plan(Fate().init(geometry(slots), None), observation)[1]


def test_it_fetches_what_the_next_layer_is_expected_to_use():
    found = plan(9, seen(0, {1: 2}, forecast=[[0.1, 0.0, 3.0, 0.6, 0.4, 1.0], [9.0] * E]))
    assert found.device == (1,)
    assert found.load == (ExpertId(0, 1),)
    assert found.prefetch == (ExpertId(1, 2), ExpertId(1, 5), ExpertId(1, 3))


def test_after_the_last_layer_comes_the_first():
    assert plan(9, seen(2, {0: 1}, forecast=[[0.0, 2.0, 0, 0, 0, 0]])).prefetch == (ExpertId(0, 1),)


def test_what_is_there_or_coming_is_not_fetched_again():
    here, coming = ExpertId(1, 2), ExpertId(1, 3)
    found = plan(9, seen(0, {1: 1}, [here], [coming], [[0, 0, 3.0, 2.0, 1.0, 0]]))
    assert found.prefetch == (ExpertId(1, 4),)


def test_a_prefetch_pushes_out_only_what_nobody_expects():
    idle, expected, wanted = ExpertId(2, 0), ExpertId(1, 2), ExpertId(0, 1)
    forecast = [[0, 0, 3.0, 2.0, 1.0, 0]]
    found = plan(3, seen(0, {1: 1}, [idle, expected, wanted], (), forecast))
    assert found.evict == (idle,)
    assert found.prefetch == (ExpertId(1, 3),)
    full = plan(2, seen(0, {1: 1}, [expected, wanted], (), forecast))
    assert full.evict == full.prefetch == ()


def test_demand_pushes_out_what_is_least_expected():
    more, less = ExpertId(1, 2), ExpertId(1, 4)
    found = plan(2, seen(0, {1: 1}, [more, less], (), [[0, 0, 3.0, 0, 1.0, 0]]))
    assert found.evict == (less,)
    assert found.load == (ExpertId(0, 1),)
    assert found.prefetch == ()


def test_what_finds_no_room_is_computed_on_the_host():
    coming = [ExpertId(2, 0), ExpertId(2, 1)]
    found = plan(3, seen(0, {1: 1, 2: 5, 3: 2}, (), coming))
    assert (found.device, found.host) == ((2,), (3, 1))


def test_promoe_fetches_for_all_layers_that_it_sees_and_leaves_room_for_the_next():
    forecast = [[0, 1.0, 2.0, 0, 0, 0], [3.0, 0, 0, 0, 0, 0]]
    policy = ProMoE()
    found = policy.plan(policy.init(geometry(18), None), seen(0, {1: 2}, forecast=forecast))[1]
    assert found.prefetch == (ExpertId(1, 2), ExpertId(1, 1), ExpertId(2, 0))
    found = policy.plan(policy.init(geometry(8), None), seen(0, {1: 2}, forecast=forecast))[1]
    assert found.prefetch == (ExpertId(1, 2), ExpertId(1, 1))  # six more are the next layer's
    late = [ExpertId(2, 3)]
    found = policy.plan(policy.init(geometry(8), None), seen(0, {1: 2}, (), late, forecast))[1]
    assert found.prefetch == (ExpertId(1, 2),)


def test_klotski_fetches_the_hottest_of_the_next_layer_and_gives_up_what_was_used():
    policy = Klotski()
    state = policy.init(geometry(12), None)  # room for two layers: none stays whole
    forecast = [[1.0, 2.0, 3.0, 0, 0, 0], [9.0] * E]
    state, first = policy.plan(state, seen(0, {1: 1, 0: 5}, forecast=forecast))
    assert first.load == (ExpertId(0, 0), ExpertId(0, 1))  # busiest first
    assert first.prefetch == (ExpertId(1, 2), ExpertId(1, 1))  # as many as a token has
    here = {*first.load, *first.prefetch}
    state, second = policy.plan(state, seen(1, {2: 3, 0: 1}, here))
    assert second.evict == (*first.load, ExpertId(1, 1))  # and what was fetched in vain
    assert (second.device, second.load, second.prefetch) == ((2, 0), (ExpertId(1, 0),), ())


def test_klotski_keeps_first_layers_where_there_is_room():
    plans, device = follow(Klotski(), geometry(18), [[{0: 1, 1: 1}, {0: 1}, {0: 1}]] * 3)
    assert [len(plan.load) for plan in plans] == [2, 1, 1, 0, 1, 1, 0, 1, 1]
    assert device.resident == {ExpertId(0, 0), ExpertId(0, 1), ExpertId(2, 0)}
