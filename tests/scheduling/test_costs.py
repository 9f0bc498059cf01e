"""Time tables: measured points kept, straight lines between and beyond."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import PROFILE
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import TimeTable
from layerscope_jax.scheduling.costs import ms_of

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


@pytest.mark.parametrize(
    ("tokens", "ms"),
    [
        ((0, 1), (1.0, 2.0)),
        ((-4, 1), (1.0, 2.0)),
        ((1.5,), (1.0,)),
        ((True,), (1.0,)),
        ((10**9,), (1.0,)),
        (("1",), (1.0,)),
        ("1", "2"),
        (None, None),
        (1, 2.0),
    ],
)
def test_counts_that_are_none_are_refused(tokens, ms):
    with pytest.raises(ValueError, match="rising token counts with one time each"):
        TimeTable(tokens, ms)


@pytest.mark.parametrize("ms", [-1.0, np.nan, np.inf, 1e308, 10**400, "1", None, True, [1.0], 1j])
def test_times_that_are_none_are_refused(ms):
    with pytest.raises(ValueError, match="times in 0"):
        TimeTable((1,), (ms,))
    for name in ("transfer_ms", "host_start_ms"):
        with pytest.raises(ValueError, match=rf"HardwareProfile's {name} must be a time"):
            replace(PROFILE, **{name: ms})


@pytest.mark.parametrize(
    ("name", "value"), [("host_ms", 1.0), ("layer_ms", None), ("source", 3), ("alone", {"host_ms": 1})]
)
def test_bare_costs_of_other_kinds_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"HardwareProfile's {name} must be"):
        replace(PROFILE, **{name: value})


def test_numpy_and_lists_become_plain_numbers():
    table = TimeTable(list(np.array([1, 4])), list(np.array([1, 2], np.float32)))
    assert table == TimeTable((1, 4), (1.0, 2.0))
    assert json.loads(json.dumps(table.to_json())) == {"tokens": [1, 4], "ms": [1.0, 2.0]}


@settings(deadline=None)
@given(st.floats())
def test_a_curve_is_read_nowhere_but_in_itself(tokens):
    """Compiled loops do not look whether a place is within an array."""
    found = ms_of(tokens, TABLE.curve)
    assert found >= 0
    assert ms_of(tokens if tokens > 0 else 0.0, TABLE.curve) == found
