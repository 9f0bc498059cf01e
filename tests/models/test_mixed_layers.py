"""Models whose layers do not all attend alike: what each layer is, what it keeps, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from layerscope_jax.models import KVCache, config_from_hf
from layerscope_jax.models.cache import cache_bytes
from layerscope_jax.models.delta_net import DeltaCache

PUBLISHED = Path(__file__).parent / "published"
NEXT, QWEN, GEMMA = "Qwen3-Next-80B-A3B-Instruct", "Qwen3.6-35B-A3B", "gemma-4-26B-A4B-it"


def raw(name, **changes):
    """A published config, its language model changed; `None` leaves a key out."""
    config = json.loads((PUBLISHED / f"{name}.json").read_text())
    inner = config.get("text_config", config)
    inner |= changes
    for key in [key for key, value in changes.items() if value is None]:
        del inner[key]
    return config


@pytest.mark.parametrize("name", [NEXT, QWEN])
def test_every_fourth_layer_attends_and_the_others_keep_a_state(name):
    config = config_from_hf(raw(name))
    assert config == config_from_hf(raw(name, layer_types=None) if name == QWEN else raw(name))
    kinds = [config.layer_kind(layer).attention for layer in range(config.num_layers)]
    assert kinds == ["delta", "delta", "delta", "grouped"] * (config.num_layers // 4)
    for layer, length in ((0, 10), (2, 1000)):
        kept = config.cache_shapes(layer, 3, length)
        assert type(kept) is DeltaCache
        assert kept.latest.shape == (3, 3, 2 * 16 * 128 + 32 * 128)
        assert kept.state.shape == (3, 32, 128, 128)
        assert np.dtype(kept.state.dtype) == np.float32
    assert type(kept := config.cache_shapes(3, 3, 10)) is KVCache
    assert kept.key.shape == (3, 2, 256, 10)
    # Of more positions, the layers with attention alone need more.
    more = cache_bytes(config, 1, 200, 2) - cache_bytes(config, 1, 100, 2)
    assert more == kinds.count("grouped") * 100 * 2 * 2 * 256 * 2


def test_gemmas_layers_without_a_window_have_sizes_of_their_own():
    config = config_from_hf(raw(GEMMA))
    windowed, full = config.of_layer(0), config.of_layer(5)
    assert [layer for layer in range(30) if config.layer_kind(layer).sliding_window is None] == [
        5,
        11,
        17,
        23,
        29,
    ]
    assert (windowed.head_dim, windowed.num_kv_heads, windowed.rope_theta) == (256, 8, 1e4)
    assert (full.head_dim, full.num_kv_heads, full.rope_theta) == (512, 2, 1e6)
    assert (windowed.rope_scaling, full.rope_scaling.part) == (None, 0.25)
    assert config.cache_shapes(0, 1, 7).key.shape == (1, 8, 256, 7)
    assert config.cache_shapes(5, 1, 7).key.shape == (1, 2, 512, 7)
    each = {str(layer): {"head_dim": 512, "num_key_value_heads": 2} for layer in (5, 11, 17, 23, 29)}
    newer = raw(GEMMA, global_head_dim=None, num_global_key_value_heads=None, per_layer_config=each)
    assert config_from_hf(newer) == config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (raw(NEXT, linear_num_value_heads=24), ["delta", "a multiple of key_heads"]),
        (raw(NEXT, layer_types=["full_attention"]), ["layer_types", "48 layers, got 1"]),
        (raw(NEXT, use_sliding_window=True), ["use_sliding_window", "windows"]),
        (raw(QWEN, attn_output_gate=False), ["attn_output_gate", "without gates"]),
        (raw(QWEN, mamba_ssm_dtype="bfloat16"), ["mamba_ssm_dtype", "'float32'"]),
        (
            raw(GEMMA, num_kv_shared_layers=4, hidden_size_per_layer_input=None),
            ["num_kv_shared_layers: expected 0, got 4", "hidden_size_per_layer_input: expected 0, got 256"],
        ),
        (raw(GEMMA, enable_moe_block=None), ["enable_moe_block", "without experts"]),
        (raw(GEMMA, per_layer_config={"5": {"head_dim": 4}}), ["per_layer_config", "full_attention"]),
        (raw(GEMMA, layer_types=["sliding_attention"] * 30), ["layer_types", "the last layer"]),
        (raw(GEMMA, rope_parameters={"full_attention": {"rope_type": "yarn"}}), ["full_attention.rope_type"]),
        (raw(GEMMA, use_bidirectional_attention="all"), ["use_bidirectional_attention", "later tokens"]),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_what_is_not_supported_is_named(config, words):
    with pytest.raises(ValueError, match="cannot use this config") as raised:
        config_from_hf(config)
    assert [word for word in words if word not in str(raised.value)] == []
