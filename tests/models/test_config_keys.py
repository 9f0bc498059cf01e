"""Configs as published load, whatever else they say; what may mean other arithmetic is refused by name."""

import json
from pathlib import Path

import pytest

from layerscope_jax.models import config_from_hf

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("olmoe", "mixtral", "qwen3_moe")


def published(family, **changes):
    """A config as it came with transformers 4, changed."""
    return json.loads((GOLDEN / "old_style_configs" / family / "config.json").read_text()) | changes


CODER = {
    "intermediate_size": 5472,
    "max_position_embeddings": 262144,
    "max_window_layers": 28,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
BIG = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 94,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
CODER_BIG = CODER | {
    "hidden_size": 6144,
    "intermediate_size": 8192,
    "max_window_layers": 62,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 96,
    "num_experts": 160,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
}
INSTRUCT = {"max_position_embeddings": 262144, "rope_theta": 10000000}
TRANSFORMERS_5 = {
    "_name_or_path": "some/where",
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "output_attentions": False,
    "output_hidden_states": False,
    "pad_token_id": None,
    "problem_type": None,
    "return_dict": True,
}
"""What transformers 5 writes when it is asked for all that a config says."""


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {}),
        ("olmoe", {"pad_token_id": 50277, "transformers_version": "4.47.1", "bos_token_id": None}),
        ("mixtral", {}),
        ("mixtral", {"attention_bias": False, "pretraining_tp": 1, "rope_scaling": None, "use_cache": False}),
        ("mixtral", {"_name_or_path": "x", "output_router_logits": True, "router_jitter_noise": 0.0}),
        ("mixtral", {"hidden_size": 6144, "num_attention_heads": 48, "vocab_size": 32768}),
        ("qwen3_moe", {}),
        ("qwen3_moe", INSTRUCT),
        ("qwen3_moe", CODER),
        ("qwen3_moe", CODER_BIG),
        ("qwen3_moe", BIG),
        ("qwen3_moe", BIG | INSTRUCT),
        *((family, TRANSFORMERS_5) for family in FAMILIES),
        *((family, {"unsloth_version": "2025.9.1", "quantization_config": None}) for family in FAMILIES),
        *(
            (family, {"layer_types": ["full_attention"] * 4, "partial_rotary_factor": 1})
            for family in FAMILIES
        ),
        *((family, {"rope_parameters": {"partial_rotary_factor": 1.0}}) for family in FAMILIES),
        *((family, {"not_yet_invented": None}) for family in FAMILIES),
    ],
)
def test_published_configs_load(family, changes):
    config = config_from_hf(published(family, **changes))
    assert config.family == family
    assert config.num_layers == changes.get("num_hidden_layers", published(family)["num_hidden_layers"])


UNKNOWN = "unknown key, which may change what the model computes, got "


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "quantization_config.quant_method: expected one of awq, compressed-tensors, fp8, gptq, modelopt, "
            "mxfp4, got 'hqq'",
        ),
        ({"quantization_config": {}}, "quantization_config.quant_method: expected one of awq, "),
        ({"rope_foo": 3}, f"rope_foo: {UNKNOWN}3"),
        ({"rope_foo": False}, f"rope_foo: {UNKNOWN}False"),
        ({"auto_map": {"AutoModel": "x.Y"}}, f"auto_map: {UNKNOWN}"),
        ({"num_shared_experts": 1}, f"num_shared_experts: {UNKNOWN}1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"mlp_bias": True}, "mlp_bias: expected False, got True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: expected 'full_attention'"),
        (
            {"layer_types": "full_attention"},
            "layer_types: expected 'full_attention' for every layer, got 'full_",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"rope_parameters": {"rope_theta": 2.0, "factor": 8}}, f"rope_parameters.factor: {UNKNOWN}8"),
        ({"rope_scaling": {"type": "default", "mscale": 1}}, f"rope_scaling.mscale: {UNKNOWN}1"),
        ({"dual_chunk_attention_config": {"chunk_size": 9}}, f"dual_chunk_attention_config: {UNKNOWN}"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: expected False, got True"),
    ],
)
def test_what_may_be_other_arithmetic_is_refused(family, changes, words):
    with pytest.raises(ValueError, match=r".") as raised:
        config_from_hf(published(family, **changes))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"attention_bias": True}),
        ("qwen3_moe", {"qkv_bias": True}),
        ("qwen3_moe", {"use_qk_norm": False}),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}),
        ("olmoe", {"shared_expert_intermediate_size": 0}),
        ("mixtral", {"layer_types": ["full_attention"], "sliding_window": 4}),
    ],
)
def test_what_one_family_has_is_not_anothers(family, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        config_from_hf(published(family, **changes))


def test_all_of_it_is_said_at_once():
    config = published(
        "mixtral", rope_foo=3, quantization_config={"bits": 4}, hidden_act="relu", bar="x" * 500
    )
    with pytest.raises(ValueError, match=r".") as raised:
        config_from_hf(config)
    for name in ("rope_foo", "quantization_config.quant_method", "hidden_act", "bar"):
        assert f"{name}: " in str(raised.value)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 1e39, 10**400, "1", True])
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_numbers_are_finite(family, key, value):
    """Also where a config does not come from a file."""
    with pytest.raises(ValueError, match=f"{key}: expected a finite number above 0, got "):
        config_from_hf(published(family, **{key: value}))


@pytest.mark.parametrize("value", [-1, 32000, [2, 10**6], [[2]], [2.0], True, 10**400])
def test_end_tokens_are_of_the_vocabulary(value):
    words = (
        r"eos_token_id: expected a token id from 0 to 31999 \(vocab_size 32000\), a list of them or null, got"
    )
    with pytest.raises(ValueError, match=words):
        config_from_hf(published("mixtral", eos_token_id=value))
    with pytest.raises(ValueError, match=words):
        config_from_hf(published("mixtral"), {"eos_token_id": value})
    assert config_from_hf(published("mixtral"), {"eos_token_id": [2, 31999]}).stop_token_ids == (2, 31999)


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "num_experts_per_tok", "sliding_window"])
@pytest.mark.parametrize("value", [0, -3, 2**31, 10**4000, 1.5, float("nan")])
def test_sizes_are_counted_in_32_bits(key, value):
    with pytest.raises(ValueError, match=f"{key}: expected a whole number from 1 to 2147483647, got "):
        config_from_hf(published("mixtral", **{key: value}))
