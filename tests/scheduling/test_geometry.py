"""Numbers of routed experts: those that no model has are refused, and every record shares them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.scheduling.geometry import MOST_EXPERTS, ExpertId, Geometry, RoutedExperts
from layerscope_jax.support.json_fields import of_record

SIZES = st.integers(-1, 6)


@given(layers=SIZES, experts=SIZES, choices=SIZES)
def test_just_what_a_model_can_have_is_taken(layers, experts, choices):
    sizes = {"num_layers": layers, "num_experts": experts, "experts_per_token": choices}
    wrong = [name for name in ("num_layers", "num_experts") if sizes[name] < 1]
    wrong += ["experts_per_token"] * (not 1 <= choices <= experts)
    if not wrong:
        routed = RoutedExperts(**sizes)
        assert of_record(RoutedExperts, routed.counts(), "geometry") == routed
        assert Geometry(**sizes, expert_bytes=4, slots=0).routed == routed
        every = routed.every_expert()
        assert len(set(every)) == routed.total_experts == layers * experts
        assert every[-1] == ExpertId(layers - 1, experts - 1)
        return
    with pytest.raises(ValueError, match="must be") as refused:
        RoutedExperts(**sizes)
    assert [part.split()[0] for part in str(refused.value).split("; ")] == wrong


@pytest.mark.parametrize("size", [True, 2.0, "2", None])
def test_what_is_no_whole_number_is_refused(size):
    with pytest.raises(ValueError, match="num_layers must be 1 or more, got"):
        RoutedExperts(num_layers=size, num_experts=2, experts_per_token=1)


def test_more_experts_than_any_model_has_are_refused():
    RoutedExperts(num_layers=MOST_EXPERTS // 8, num_experts=8, experts_per_token=1)
    with pytest.raises(ValueError, match=r"num_layers \* num_experts must be at most 16,777,216"):
        RoutedExperts(num_layers=MOST_EXPERTS, num_experts=8, experts_per_token=1)
