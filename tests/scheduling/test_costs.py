"""Time tables: measured points kept, straight lines between and beyond."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax import TimeTable

TABLE = TimeTable((1, 4, 16), (1.0, 2.5, 3.1))


@pytest.mark.parametrize(
    ("tokens", "ms"), [(0, 1.0), (1, 1.0), (2, 1.5), (4, 2.5), (10, 2.8), (16, 3.1), (17, 3.15), (36, 4.1)]
)
def test_it_interpolates(tokens, ms):
    assert TABLE(tokens) == pytest.approx(ms)


def test_one_point_is_a_constant():
    assert [TimeTable((8,), (2.0,))(tokens) for tokens in (1, 8, 900)] == [2.0, 2.0, 2.0]


def test_it_never_goes_below_zero():
    assert TimeTable((1, 2), (2.0, 1.0))(50) == 0.0


@pytest.mark.parametrize(
    ("tokens", "ms"), [((), ()), ((1, 2), (1.0,)), ((4, 1), (1.0, 2.0)), ((1, 1), (1.0, 2.0))]
)
def test_a_bad_table_is_refused(tokens, ms):
    with pytest.raises(ValueError, match="rising token counts with one time each"):
        TimeTable(tokens, ms)


@st.composite
def rising(draw):
    tokens = sorted(draw(st.sets(st.integers(1, 500), min_size=1, max_size=6)))
    ms = sorted(draw(st.lists(st.floats(0, 100), min_size=len(tokens), max_size=len(tokens))))
    return TimeTable(tuple(tokens), tuple(ms))


@given(rising(), st.integers(0, 1000), st.integers(0, 1000))
def test_more_tokens_never_take_less_where_the_points_rise(table, a, b):
    low, high = sorted((a, b))
    assert table(low) <= table(high) + 1e-9
    for tokens, ms in zip(table.tokens, table.ms, strict=True):
        assert table(tokens) == pytest.approx(ms)
