"""Prefills beside a step that keeps its cache: the next layer is copied while one is computed."""

from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.scheduling.in_step import InStep, Streaming
from layerscope_jax.scheduling.plan import ExpertId, Geometry, Observation, check_plan

LAYERS, EXPERTS = 5, 4


def prefill(policy, slots, demands, resident=()):
    """The plans of a prefill, all copies of which arrive in time."""
    geometry = Geometry(
        num_layers=LAYERS, num_experts=EXPERTS, experts_per_token=2, expert_bytes=1, slots=slots
    )
    state, there, plans = policy.init(geometry, None), set(resident), []
    for layer, demand in enumerate(demands):
        seen = Observation(
            step=0,
            layer=layer,
            phase="prefill",
            demand=dict(demand),
            resident=frozenset(there),
            in_flight=(),
            forecast=(),
        )
        state, plan = policy.plan(state, seen)
        check_plan(plan, seen, slots)
        there = {*there, *plan.load, *plan.prefetch}.difference(plan.evict)
        assert len(there) <= slots
        plans.append(plan)
    return plans


EVERY = [dict.fromkeys(range(EXPERTS), 3)] * LAYERS


def test_only_the_first_layer_is_waited_for():
    plans = prefill(Streaming(), 2 * EXPERTS, EVERY)
    assert [len(plan.load) for plan in plans] == [EXPERTS, *[0] * (LAYERS - 1)]
    for layer, plan in enumerate(plans[:-1]):
        assert set(plan.prefetch) == {ExpertId(layer + 1, expert) for expert in range(EXPERTS)}
    assert plans[-1].prefetch == ()  # a decode step does not read this room
    assert not any(plan.host for plan in plans)


def test_what_is_there_is_not_sent_again():
    there = [ExpertId(1, 2), ExpertId(3, 0)]
    plans = prefill(Streaming(), 2 * EXPERTS + 1, EVERY, there)
    sent = [expert for plan in plans for expert in (*plan.load, *plan.prefetch)]
    assert len(sent) == len(set(sent))
    assert ExpertId(1, 2) not in sent


def test_a_room_of_one_layer_and_few_tokens_are_planned_as_before():
    few = [{0: 1}] * LAYERS
    for slots, demands in ((EXPERTS, EVERY), (2 * EXPERTS, few)):
        assert prefill(Streaming(), slots, demands) == prefill(InStep(), slots, demands)


DEMANDS = st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 9), min_size=1)
IDS = st.builds(ExpertId, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


@given(
    st.lists(DEMANDS, min_size=LAYERS, max_size=LAYERS),
    st.integers(EXPERTS, 4 * EXPERTS),
    st.sets(IDS, max_size=EXPERTS),
)
def test_plans_are_valid_whatever_is_needed_and_there(demands, slots, there):
    prefill(Streaming(), slots, demands, there)
