"""What plans need from the disk: all that is computed or copied, and no more than memory holds."""

from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import ExpertId, LayerPlan, Observation
from layerscope_jax.scheduling.reads import LIKELY, Uses, with_reads

LAYERS, EXPERTS = 4, 6
EVERY = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
SOME = st.lists(st.sampled_from(EVERY), unique=True, max_size=12)
ROW = st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0, 3.0]), min_size=EXPERTS, max_size=EXPERTS)


@st.composite
def planned(draw):
    """A valid plan, and what it was made from."""
    layer = draw(st.integers(0, LAYERS - 1))
    active = draw(st.lists(st.integers(0, EXPERTS - 1), unique=True, min_size=1))
    resident = draw(SOME)
    in_flight = [expert for expert in draw(SOME) if expert not in resident]
    present = {*resident, *in_flight}
    device = [expert for expert in active if draw(st.booleans())]
    ids = [ExpertId(layer, expert) for expert in device]
    evict = [expert for expert in resident if expert not in ids and draw(st.booleans())]
    load = [expert for expert in ids if expert not in present]
    prefetch = [expert for expert in draw(SOME) if expert not in present and expert not in load]
    seen = Observation(
        step=0,
        layer=layer,
        phase="decode",
        demand=dict.fromkeys(active, 1),
        resident=set(resident),
        in_flight=set(in_flight),
    )
    plan = LayerPlan(
        step=0,
        layer=layer,
        device=tuple(device),
        host=tuple(expert for expert in active if expert not in device),
        evict=tuple(evict),
        load=tuple(load),
        prefetch=tuple(prefetch),
    )
    return plan, seen


@given(planned(), SOME, st.lists(ROW, max_size=6), st.integers(1, 30))
@settings(deadline=None, max_examples=200)
def test_reads_follow_from_the_plan_and_from_what_host_memory_holds(case, in_memory, forecast, room):
    plan, seen = case
    more = with_reads(plan, seen, set(in_memory), forecast, LAYERS, room)
    needed = {*plan.load, *plan.prefetch, *(ExpertId(plan.layer, expert) for expert in plan.host)}
    assert set(more.read) == needed - set(in_memory)
    assert len(set(more.read)) == len(more.read)
    later = {*plan.prefetch} - {ExpertId(plan.layer, expert) for expert in plan.host}
    waits = [expert for expert in more.read if expert not in later]
    assert more.read[: len(waits)] == tuple(waits)  # what a layer waits for comes first
    ahead = more.read_ahead
    assert len(set(ahead)) == len(ahead) <= max(0, room - len(needed))
    stays = ({*seen.resident} - {*plan.evict}) | {*seen.in_flight}
    assert not {*ahead} & (stays | needed)
    distances = [(expert.layer - plan.layer) % LAYERS for expert in ahead]
    assert distances == sorted(distances)
    assert 0 not in distances
    for expert, distance in zip(ahead, distances, strict=True):
        row = forecast[distance - 1]
        assert row[expert.expert] >= LIKELY
        better = [n for n, tokens in enumerate(row) if tokens > row[expert.expert]]
        assert len(better) < len(seen.demand)
    assert more == with_reads(more, seen, set(in_memory), forecast, LAYERS, room)
    assert with_reads(plan, seen, set(EVERY), [], LAYERS, room) == plan


def test_uses_fade():
    uses, (often, lately, never) = Uses(num_layers=1), EVERY[:3]
    for _ in range(8):
        uses.count([often])
    for _ in range(2):
        uses.count([lately])
    assert uses.worth(often) > uses.worth(lately) > uses.worth(never)
    for _ in range(1000):
        uses.count([never])
    uses.count([lately])
    assert uses.worth(never) > uses.worth(lately) > uses.worth(often)
