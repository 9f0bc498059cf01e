"""Every row that is wanted is computed once, in few shapes that depend on its own expert alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.kernels.grouping import (
    GROUP_SIZES,
    MAX_ROWS,
    MIN_ROWS,
    TILES,
    Assignments,
    dispatches,
    possible_groups,
    row_bucket,
    tile_shape,
)
from layerscope_jax.support.units import next_power

BUCKETS = {2, 4, 8, 16, 32, 64, 128}


@st.composite
def routings(draw):
    """[T, K] experts, a token's all different, drawn with preferences; and which tokens are active."""
    tokens = draw(st.sampled_from([1, 2, 3, 17, 64, 300]))
    num_experts = draw(st.sampled_from([1, 2, 5, 33]))
    choices = draw(st.integers(1, min(4, num_experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    taste = rng.standard_normal(num_experts) * draw(st.sampled_from([0.0, 1.0, 10.0]))
    experts = np.argsort(-(taste + rng.gumbel(size=(tokens, num_experts))), axis=1)[:, :choices]
    active = rng.random(tokens) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return experts.astype(np.int32), draw(st.sampled_from([active, None]))


@given(routings(), st.data())
@settings(deadline=None)
def test_each_active_slot_is_in_one_group_and_no_other_is(routing, data):
    experts, active = routing
    rows = Assignments(experts, active)
    wanted = np.ones(len(experts), bool) if active is None else active
    for expert, tokens in rows.demand.items():
        assert tokens == (experts[wanted] == expert).sum() > 0
    assert set(rows.demand) == set(experts[wanted].ravel().tolist())
    assert (rows.choices, rows.total) == (experts.shape[1], experts.size)

    chosen = data.draw(st.permutations(sorted(rows.demand)))
    chosen = chosen[: data.draw(st.integers(0, len(chosen)))]
    groups = rows.groups(chosen)
    found = []
    for group in groups:
        size, bucket = group.slots.shape
        assert size == len(group.experts)
        assert size in GROUP_SIZES
        assert bucket in BUCKETS
        assert group.slots.dtype == np.int32
        real = group.slots < rows.total
        assert (group.slots[~real] == rows.total).all()
        assert group.rows == real.sum()
        assert (np.diff(real.astype(int), axis=1) <= 0).all()  # padding comes after what is real
        for expert, slots in zip(group.experts, group.slots, strict=True):
            slots = slots[slots < rows.total]
            assert (experts.reshape(-1)[slots] == expert).all()
            assert not len(slots) or row_bucket(len(slots)) == bucket
            found += slots.tolist()
    expected = np.isin(experts, chosen) & wanted[:, None]
    assert sorted(found) == np.flatnonzero(expected).tolist()


@given(routings(), st.data())
@settings(deadline=None)
def test_how_an_expert_is_cut_depends_on_nothing_else(routing, data):
    """The same pieces in the same buckets, alone or among others, whatever their number and order."""
    experts, active = routing
    rows = Assignments(experts, active)
    if not rows.demand:
        return
    order = data.draw(st.permutations(sorted(rows.demand)))
    together = {}
    for group in rows.groups(order):
        for expert, slots in zip(group.experts, group.slots, strict=True):
            if (slots < rows.total).any():
                together.setdefault(expert, set()).add(tuple(slots))
    for expert in order:
        alone = {tuple(slots) for group in rows.groups([expert]) for slots in group.slots}
        alone = {slots for slots in alone if min(slots) < rows.total}
        assert together[expert] == alone
        sizes = sorted(sum(slot < rows.total for slot in slots) for slots in alone)
        count = rows.demand[expert]
        assert sizes == sorted([MAX_ROWS] * (count // MAX_ROWS) + [count % MAX_ROWS] * (count % MAX_ROWS > 0))


@given(routings(), st.data())
@settings(deadline=None)
def test_tiles_hold_each_row_once_and_an_experts_depend_on_its_own_count(routing, data):
    experts, active = routing
    rows = Assignments(experts, active)
    chosen = data.draw(
        st.lists(st.sampled_from([*rows.demand] or [0]), unique=True, max_size=len(rows.demand))
    )
    if not chosen:
        return
    count, size = shape = tile_shape(rows.total, int(experts.max()) + 1)
    places = rows.tiles(chosen, [10 + expert for expert in chosen], shape)
    assert places.dtype == np.int32
    assert places.shape[1:] == (count, size + 1)
    tiles = places.reshape(-1, size + 1)
    found = {expert: [tile[:-1] for tile in tiles if tile[-1] == 10 + expert] for expert in chosen}
    assert sum(map(len, found.values())) == len(tiles)
    for expert, own in found.items():
        if expert == chosen[-1]:
            own = own[: -(-rows.demand[expert] // size)]  # the others are padding alone
        joined = np.concatenate(own)
        assert joined[: rows.demand[expert]].tolist() == rows.slots(expert).tolist()
        assert (joined[rows.demand[expert] :] == rows.total).all()
        assert len(own) == -(-rows.demand[expert] // size)
    real = sum(rows.demand[expert] for expert in chosen)
    assert (places[..., :-1] < rows.total).sum() == real
    assert (places[..., :-1] <= rows.total).all()
    needed = sum(-(-rows.demand[expert] // size) for expert in chosen)
    assert len(places) == -(-needed // count)


@given(st.integers(1, 2**20), st.integers(1, 512))
def test_tiles_have_one_shape_which_holds_what_a_step_may_need(total, num_experts):
    count, size = tile_shape(total, num_experts)
    assert MIN_ROWS <= size <= MAX_ROWS
    assert 1 <= count <= TILES
    assert size == MIN_ROWS or 2 * size * num_experts <= total


def test_inactive_rows_are_no_demand():
    rows = Assignments(np.array([[3, 1], [3, 0], [2, 1]]), np.array([False, True, False]))
    assert rows.demand == {0: 1, 3: 1}
    assert rows.slots(3).tolist() == [2]
    assert Assignments(np.array([[3, 1]]), np.array([False])).demand == {}


def test_padding_repeats_an_expert_and_writes_where_nobody_reads():
    rows = Assignments(np.array([[5, 0], [6, 5], [5, 7]]))  # 5 has three tokens, 0, 6 and 7 have one
    small, large = rows.groups([7, 0, 6, 5])
    assert small.experts == (7, 0, 6, 7)
    assert small.slots.tolist() == [[5, 6], [1, 6], [2, 6], [6, 6]]
    assert small.rows == 3
    assert large.experts == (5,)
    assert large.slots.tolist() == [[0, 3, 4, 6]]
    assert large.rows == 3


@given(st.integers(0, 200))
def test_dispatches_cover_everything_and_are_mostly_full(pieces):
    parts = dispatches(list(range(pieces)))
    assert [piece for _, part in parts for piece in part] == list(range(pieces))
    for size, part in parts:
        assert size in GROUP_SIZES
        assert 0.75 * size <= len(part) <= size


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 2), (2, 2), (3, 4), (65, 128), (128, 128)])
def test_row_buckets(tokens, bucket):
    assert row_bucket(tokens) == bucket
    assert MIN_ROWS <= bucket <= MAX_ROWS


@given(st.integers(1, 2**20))
def test_next_power_is_the_smallest_that_holds_it(number):
    power = next_power(number)
    assert number <= power < 2 * number
    assert power & (power - 1) == 0


@given(routings())
@settings(deadline=None)
def test_the_shapes_of_dispatches_are_known_beforehand(routing):
    experts, active = routing
    rows = Assignments(experts, active)
    tokens = len(experts) if active is None else int(active.sum())
    possible = possible_groups(tokens, experts.shape[1], 33)
    assert len(possible) == len(set(possible)) <= len(BUCKETS) * len(GROUP_SIZES)
    for group in rows.groups(rows.demand):
        assert group.slots.shape[::-1] in possible


def test_a_shape_is_possible_only_if_some_expert_can_have_it():
    found = {bucket for bucket, _ in possible_groups(tokens=60, choices=1, num_experts=1)}
    assert sorted(found) == [2, 4, 8, 16, 32, 64]
