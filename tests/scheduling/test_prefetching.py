"""Policies that prefetch: every plan they make can be carried out, and they fetch what is expected."""

from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import ExpertId, Geometry, Observation
from layerscope_jax.scheduling.plan import check_plan
from layerscope_jax.scheduling.prefetching import Fate

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


@given(data=st.data(), slots=st.integers(0, 20))
@settings(deadline=None, max_examples=200)
def test_every_plan_can_be_carried_out(data, slots):
    """Over a few layers, with copies that arrive or not, whatever is resident, whatever is forecast."""
    policy = Fate()
    state = policy.init(geometry(slots), None)
    experts = [ExpertId(layer, expert) for layer in range(L) for expert in range(E)]
    placed = data.draw(st.permutations(experts))[: data.draw(st.integers(0, min(slots, len(experts))))]
    cut = data.draw(st.integers(0, len(placed)))
    resident, in_flight = set(placed[:cut]), set(placed[cut:])
    expected = st.lists(st.floats(0, 8), min_size=E, max_size=E)
    for step in range(4):
        layer = step % L
        demand = data.draw(st.dictionaries(st.integers(0, E - 1), st.integers(1, 9), min_size=1))
        forecast = data.draw(st.one_of(st.just([]), st.lists(expected, min_size=2, max_size=2)))
        observation = seen(layer, demand, resident, in_flight, forecast)
        state, found = policy.plan(state, observation)
        check_plan(found, observation, slots, experts)
        resident = resident - set(found.evict) | set(found.load)
        in_flight = in_flight - {ExpertId(layer, e) for e in found.device} | set(found.prefetch)
        resident |= {ExpertId(layer, e) for e in found.device}
        arrived = {expert for expert in sorted(in_flight) if data.draw(st.booleans())}
        resident, in_flight = resident | arrived, in_flight - arrived
