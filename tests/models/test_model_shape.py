"""Decoder layers and MoE layers: two numberings of one model."""

from dataclasses import replace

import pytest
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.models.decoder_layers import DenseLayer, RoutedLayer, layer_type


@given(st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
def test_spans_and_the_tail_are_all_layers_in_order(routed):
    dense = tuple(layer for layer, has in enumerate(routed) if not has)
    config = replace(TINY, num_layers=len(routed), dense_layers=dense, intermediate_size=8)
    assert [*(layer for span in config.spans for layer in span), *config.tail] == list(range(len(routed)))
    assert config.moe_layers == tuple(span[-1] for span in config.spans)
    assert len(config.moe_layers) == config.num_moe_layers == sum(routed)
    for layer, has in enumerate(routed):
        assert layer_type(config, layer) is (RoutedLayer if has else DenseLayer)
        assert (layer in config.moe_layers) == has
    assert all(not set(span[:-1]) & set(config.moe_layers) for span in config.spans)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dense_layers": (1, 0)}, "dense_layers must be numbers of decoder layers from 0 to 2, .*rising"),
        ({"dense_layers": (0, 0)}, "dense_layers"),
        ({"dense_layers": (3,)}, "dense_layers"),
        ({"dense_layers": (-1,)}, "dense_layers"),
        ({"dense_layers": (0, 1, 2)}, "dense_layers must be fewer than all 3 layers"),
        ({"attention": "circular"}, r"attention must be a kind that there is \(grouped.*\), got 'circular'"),
        (
            {"feed_forward": "mine"},
            r"feed_forward must be a kind that there is \(dense, routed.*, got 'mine'",
        ),
        ({"dense_layers": (0,), "intermediate_size": None}, "intermediate_size must be the width"),
        (
            {"dense_layers": (5,), "num_kv_heads": 3, "experts_per_token": 9},
            "num_heads must be a multiple of num_kv_heads=3, got 4; experts_per_token .*; dense_layers",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_all_that_is_wrong(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **{"intermediate_size": 8} | changes)
