"""Rotary embeddings of every kind turn as those of transformers do (`rotary.json`)."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.models import config_from_hf
from layerscope_jax.models.rotary import PAD_POSITION, RopeScaling, cosines_apart, rotate

rotated = jax.jit(rotate, static_argnums=(2, 3))

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDS = json.loads((GOLDEN / "rotary.json").read_text())


def config_of(record):
    config = json.loads((GOLDEN / "old_style_configs" / "mixtral" / "config.json").read_text())
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    given = {key: record[key] for key in ("max_position_embeddings", "rope_parameters")}
    if "partial_rotary_factor" in record["rope_parameters"]:  # which Mixtral's class always has as 1
        config |= {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            "sliding_window": None,
        }
    return config_from_hf(config | sizes | given)


def turned(config, position):
    """What a head of ones becomes at a position: cosines minus sines, then cosines plus sines."""
    x = np.ones((1, 1, 1, 16), np.float32)
    return np.asarray(rotated(x, np.array([[position]], np.int32), config, config.rotary_dim))[0, 0, 0]


@pytest.mark.parametrize(
    "record", RECORDS, ids=lambda r: f"{r['rope_parameters']['rope_type']}-{r['length']}"
)
def test_a_head_turns_as_in_transformers(record):
    config = config_of(record)
    position = (record["length"] or 50) - 1
    angles = position * np.array(record["frequencies"])
    cos, sin = np.cos(angles) * record["factor"], np.sin(angles) * record["factor"]
    rest = np.ones(16 - 2 * len(angles))
    expected = np.concatenate([cos - sin, cos + sin, rest])
    np.testing.assert_allclose(turned(config, position), expected, rtol=0, atol=3e-5)


def test_the_length_is_each_rows_own_and_padding_has_none():
    scaling = RopeScaling(
        kind="longrope",
        original_max_position_embeddings=8,
        short_factor=(1.0,) * 8,
        long_factor=(3.0,) * 8,
    )
    record = {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 10000.0}}
    config = replace(config_of(record), rope_scaling=scaling)
    positions = np.array([[3, 7, PAD_POSITION], [3, 7, 8]], np.int32)
    short, long = np.asarray(rotated(np.ones((2, 3, 1, 16), np.float32), positions, config))
    alone = np.asarray(rotated(np.ones((1, 1, 1, 16), np.float32), positions[:1, :1], config))
    np.testing.assert_array_equal(short[0], alone[0, 0])
    assert not np.allclose(long[0], short[0])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.booleans())
def test_products_depend_on_the_distance_alone(first, second, shift, interleaved):
    record = {"max_position_embeddings": 512, "rope_parameters": {"rope_theta": 10000.0}}
    config = replace(config_of(record), rope_interleaved=interleaved)
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 16)).astype(np.float32)

    def product(q, k):
        at = [rotated(x, np.array([[place]], np.int32), config) for x, place in ((query, q), (key, k))]
        return float((np.asarray(at[0]) * np.asarray(at[1])).sum())

    assert product(first, second) == pytest.approx(product(first + shift, second + shift), abs=1e-4)


def test_cosines_apart_are_computed_once_for_all_heads_and_are_the_same():
    config = config_of(RECORDS[0])
    x = np.random.default_rng(0).standard_normal((2, 8, 4, 16)).astype(np.float32)
    positions = np.arange(16, dtype=np.int32).reshape(2, 8)

    def compiled():
        return jax.jit(lambda x, positions: rotate(x, positions, config)).lower(x, positions).compile()

    def with_each_head(program):
        parts = program.as_text().split("\n\n")
        return any("cosine(" in part and "f32[2,8,4," in part for part in parts)

    plain = compiled()
    with cosines_apart():
        apart = compiled()
    np.testing.assert_array_equal(apart(x, positions), plain(x, positions))
    assert with_each_head(plain)
    assert not with_each_head(apart)
