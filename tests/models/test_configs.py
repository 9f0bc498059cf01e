"""Hugging Face configs of every age give the right shapes, and bad ones say all that is wrong with them."""

import json
import math
from functools import cache
from pathlib import Path

import pytest

from layerscope_jax.checkpoints.weight_names import Naming
from layerscope_jax.models import FAMILIES, config_from_hf
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.experts import ExpertBody
from layerscope_jax.models.rotary import RopeScaling

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = {
    "olmoe": ModelConfig(
        family="olmoe",
        vocab_size=50304,
        hidden_size=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        num_experts=64,
        experts_per_token=8,
        moe_intermediate_size=1024,
        normalize_top_k=False,
        qk_norm="all",
        stop_token_ids=(50279,),
    ),
    "mixtral": ModelConfig(
        family="mixtral",
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        experts_per_token=2,
        moe_intermediate_size=14336,
        normalize_top_k=True,
        rope_theta=1e6,
        max_position_embeddings=32768,
        stop_token_ids=(2,),
    ),
    "qwen3_moe": ModelConfig(
        family="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        moe_intermediate_size=768,
        normalize_top_k=True,
        qk_norm="head",
        rope_theta=1e6,
        max_position_embeddings=40960,
        norm_eps=1e-6,
        stop_token_ids=(151645,),
    ),
}
ABSENT = object()


def scaled(kind, original, **settings):
    return RopeScaling(kind=kind, original_max_position_embeddings=original, **settings)


FAMILY = pytest.mark.parametrize("family", PUBLISHED)


naming_of = cache(Naming.of)  # takes seconds for Qwen3's 48 layers


def old(family, **changes):
    """A published config with the keys of transformers 4, changed; ABSENT takes a key away."""
    config = json.loads((GOLDEN / "old_style_configs" / family / "config.json").read_text()) | changes
    return {key: value for key, value in config.items() if value is not ABSENT}


def new(family, **changes):
    """The same with the keys of transformers 5."""
    config = old(family)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    config.pop("rope_scaling", None)
    if family == "qwen3_moe":
        config["num_local_experts"] = config.pop("num_experts")
    return config | changes


@FAMILY
@pytest.mark.parametrize("style", [old, new])
def test_published_models_have_their_published_shape(family, style):
    assert config_from_hf(style(family)) == PUBLISHED[family]


@pytest.mark.parametrize(
    ("family", "billions"), [("olmoe", 6.919), ("mixtral", 46.703), ("qwen3_moe", 30.532)]
)
def test_published_models_have_their_published_number_of_parameters(family, billions):
    shapes = naming_of(PUBLISHED[family]).shapes
    assert round(sum(map(math.prod, shapes.values())) / 1e9, 3) == billions


@FAMILY
def test_tensor_shapes_are_those_of_the_checkpoint(family):
    config = PUBLISHED[family]
    shapes = naming_of(config).shapes
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = f"model.layers.{config.num_layers - 1}"
    assert (
        shapes["model.embed_tokens.weight"]
        == shapes["lm_head.weight"]
        == (config.vocab_size, config.hidden_size)
    )
    assert shapes[f"{layer}.self_attn.k_proj.weight"] == (keys, config.hidden_size)
    assert shapes[f"{layer}.self_attn.o_proj.weight"] == (config.hidden_size, queries)
    moe = f"{layer}.block_sparse_moe" if family == "mixtral" else f"{layer}.mlp"
    down = "w2" if family == "mixtral" else "down_proj"
    assert shapes[f"{moe}.gate.weight"] == (config.num_experts, config.hidden_size)
    last = f"{moe}.experts.{config.num_experts - 1}.{down}.weight"
    assert shapes[last] == (config.hidden_size, config.moe_intermediate_size)
    norm = {"olmoe": (keys,), "mixtral": None, "qwen3_moe": (config.head_dim,)}[family]
    assert shapes.get(f"{layer}.self_attn.k_norm.weight") == norm


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("olmoe", {"architectures": ABSENT}, {}),
        ("olmoe", {"num_key_value_heads": ABSENT}, {"num_kv_heads": 16}),
        ("olmoe", {"num_key_value_heads": 4}, {"num_kv_heads": 4}),
        ("olmoe", {"num_experts": ABSENT, "num_local_experts": 32}, {"num_experts": 32}),
        ("olmoe", {"norm_topk_prob": True}, {"normalize_top_k": True}),
        ("olmoe", {"norm_topk_prob": ABSENT, "rms_norm_eps": ABSENT}, {}),
        ("olmoe", {"clip_qkv": 8}, {"qkv_clip": 8}),
        ("olmoe", {"attention_bias": True}, {"attention_bias": True}),
        ("olmoe", {"sliding_window": 512}, {}),
        ("olmoe", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ("olmoe", {"head_dim": 128}, {"head_dim": 128}),
        ("mixtral", {"head_dim": 64}, {"head_dim": 64}),
        ("olmoe", {"rope_theta": ABSENT}, {"rope_theta": 1e4}),
        ("mixtral", {"num_key_value_heads": None}, {"num_kv_heads": 32}),
        ("mixtral", {"num_local_experts": ABSENT, "num_experts": 16}, {"num_experts": 16}),
        ("mixtral", {"sliding_window": 4096}, {"sliding_window": 4096}),
        ("mixtral", {"hidden_act": "gelu_new"}, {"expert_body": ExpertBody("gelu_tanh")}),
        ("mixtral", {"hidden_act": "gelu"}, {"expert_body": ExpertBody("gelu")}),
        (
            "mixtral",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": scaled("linear", 32768, factor=2.0)},
        ),
        (
            "mixtral",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_scaling": scaled("dynamic", 32768, factor=2.0), "max_position_embeddings": 65536},
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8192}},
            {"rope_scaling": scaled("yarn", 8192, factor=4.0)},
        ),
        ("mixtral", {"rope_theta": ABSENT}, {"rope_theta": 1e6}),
        ("mixtral", {"norm_topk_prob": False}, {}),
        ("mixtral", {"rope_theta": 1, "rope_parameters": {"rope_theta": 5.0}}, {"rope_theta": 5.0}),
        ("mixtral", {"rope_theta": 7, "rope_parameters": {"rope_type": "default"}}, {"rope_theta": 7.0}),
        (
            "mixtral",
            {"rope_scaling": {"type": "default", "rope_theta": 3}, "rope_parameters": {"rope_theta": 5}},
            {"rope_theta": 3.0},
        ),
        ("qwen3_moe", {"norm_topk_prob": ABSENT}, {"normalize_top_k": False}),
        ("qwen3_moe", {"rms_norm_eps": ABSENT}, {"norm_eps": 1e-6}),
        ("qwen3_moe", {"rope_theta": ABSENT}, {"rope_theta": 1e4}),
        ("qwen3_moe", {"head_dim": None}, {"head_dim": 64}),
        ("qwen3_moe", {"sliding_window": 512}, {}),
        ("qwen3_moe", {"sliding_window": 512, "use_sliding_window": True}, {"sliding_window": 512}),
        ("qwen3_moe", {"use_sliding_window": True}, {}),
        ("qwen3_moe", {"sliding_window": ABSENT, "use_sliding_window": True}, {"sliding_window": 4096}),
        ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": ABSENT}, {}),
        (
            "qwen3_moe",
            {"mlp_only_layers": [99, 3, 3, 0]},
            {"dense_layers": (0, 3), "intermediate_size": 6144},
        ),
        (
            "qwen3_moe",
            {"decoder_sparse_step": 3, "mlp_only_layers": [2], "num_hidden_layers": 6},
            {"dense_layers": (0, 1, 2, 3, 4), "intermediate_size": 6144, "num_layers": 6},
        ),
    ],
)
def test_each_key_is_read_as_transformers_reads_it(family, changes, expected):
    found, published = config_from_hf(old(family, **changes)), PUBLISHED[family]
    differing = {key: value for key, value in vars(found).items() if value != getattr(published, key)}
    assert differing == {key: value for key, value in expected.items() if value != getattr(published, key)}
    assert all(getattr(found, key) == value for key, value in expected.items())


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (None, None, ()),
        (ABSENT, None, ()),
        (7, {"eos_token_id": [9, 10]}, (9, 10)),
        (7, {"eos_token_id": 0}, (0,)),
        (7, {"eos_token_id": None}, ()),
        (7, {"temperature": 0.6}, (7,)),
    ],
)
def test_stop_tokens(config, generation, expected):
    assert config_from_hf(old("olmoe", eos_token_id=config), generation).stop_token_ids == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            old("olmoe", architectures=["LlamaForCausalLM"]),
            ["LlamaForCausalLM", *(f.architecture for f in FAMILIES.values())],
        ),
        (old("olmoe", architectures=ABSENT, model_type="gpt2"), ["gpt2", "OlmoeForCausalLM"]),
        ({}, ["None", "OlmoeForCausalLM"]),
        (old("olmoe", architectures=5), ["architectures", "a list of names", "5"]),
        (old("olmoe", architectures="OlmoeForCausalLM"), ["architectures", "a list of names"]),
        (old("olmoe", architectures=[5, None]), ["[5, None]", "OlmoeForCausalLM"]),
        (
            {"architectures": ["OlmoeForCausalLM"]},
            [
                "vocab_size",
                "num_experts (or num_local_experts)",
                *("hidden_size", "num_hidden_layers", "num_attention_heads"),
                *("num_experts_per_tok", "intermediate_size"),
            ],
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ["num_key_value_heads", "moe_intermediate_size"]),
        (old("mixtral", num_key_value_heads=ABSENT), ["missing: num_key_value_heads"]),
        (
            old("mixtral", hidden_size="4096", vocab_size=None),
            ["hidden_size", "'4096'", "missing: vocab_size"],
        ),
        (old("mixtral", hidden_size=True), ["hidden_size", "True"]),
        (old("mixtral", rms_norm_eps=0), ["rms_norm_eps", "above 0"]),
        (old("mixtral", hidden_act="relu"), ["hidden_act", "silu", "'relu'"]),
        (
            old("mixtral", rope_scaling={"type": "ntk", "factor": 2}),
            ["rope_scaling", "'ntk'", "default, linear, dynamic, yarn, llama3, longrope"],
        ),
        (old("olmoe", rope_scaling={"type": "linear"}), ["missing: rope_scaling.factor"]),
        (
            old("olmoe", rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": "x"}),
            ["short_factor: expected 64 numbers, got 1", "rope_scaling.long_factor", "'x'"],
        ),
        (old("olmoe", rope_scaling={"type": "yarn", "factor": -2}), ["rope_scaling.factor", "-2"]),
        (old("olmoe", rope_parameters=[1]), ["rope_parameters", "[1]"]),
        (old("olmoe", rope_theta=-1), ["rope_theta", "-1"]),
        (old("mixtral", head_dim=7), ["head_dim", "even", "7"]),
        (old("olmoe", head_dim=64), ["head_dim: expected 128, got 64"]),
        (old("olmoe", eos_token_id="</s>"), ["eos_token_id", "</s>"]),
        (old("olmoe", norm_topk_prob="yes"), ["norm_topk_prob", "'yes'"]),
        (old("olmoe", num_experts_per_tok=65), ["experts_per_token", "64", "65"]),
        (old("olmoe", num_key_value_heads=3), ["num_kv_heads", "16", "3"]),
        (old("qwen3_moe", mlp_only_layers="0"), ["mlp_only_layers", "a list of layer numbers", "'0'"]),
        (old("qwen3_moe", mlp_only_layers=[0, True]), ["mlp_only_layers", "[0, True]"]),
        (
            old("qwen3_moe", decoder_sparse_step=0, hidden_act="relu", vocab_size=ABSENT),
            ["decoder_sparse_step", "hidden_act", "vocab_size"],
        ),
        (
            old("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=2**31 - 1),
            ["decoder_sparse_step: expected 1", "65536"],
        ),
        (old("qwen3_moe", mlp_only_layers=[0], intermediate_size=ABSENT), ["missing: intermediate_size"]),
        (old("qwen3_moe", mlp_only_layers=list(range(48))), ["dense_layers", "fewer than all 48"]),
    ],
)
def test_errors_name_everything_that_is_wrong(config, words):
    with pytest.raises(ValueError, match=r".") as raised:
        config_from_hf(config)
    assert [word for word in words if word not in str(raised.value)] == []


LAYERS = {
    *("decoder_sparse_step", "mlp_only_layers", "layer_types", "sliding_window"),
    *("moe_layer_start_index", "moe_layer_end_index", "n_shared_experts", "intermediate_size"),
}
"""Keys that say together which layers are of which kind, in more ways than one."""


@pytest.mark.parametrize(
    "folder",
    [*sorted(file.parent for file in GOLDEN.glob("*/golden.npz")), *GOLDEN.glob("old_style_configs/*")],
    ids=lambda folder: folder.name,
)
def test_a_written_config_reads_back_the_same(folder):
    raw = json.loads((folder / "config.json").read_text())
    config = config_from_hf(raw)
    family = FAMILIES[config.family]
    written = json.loads(json.dumps(family.write_config(config)))
    assert family.read_config(written) == config
    if "rope_parameters" in raw:  # of transformers 5, in whose keys we write
        differing = {key for key, value in written.items() if value != raw.get(key)}
        # Null there where it is hidden_size / heads; and two that say together which layers are dense.
        assert differing <= {"head_dim", "rope_parameters", *LAYERS}  # of the second, defaults are left out
