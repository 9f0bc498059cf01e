"""Checkpoints in the forms that they are published in: stacked, packed, with prefixes and parts to ignore."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from layerscope_jax import load
from layerscope_jax.formats.small_floats import E2M1_VALUES

GOLDEN = Path(__file__).parents[1] / "golden"


def rewritten(source, folder, change, config=None):
    """A copy of a golden checkpoint with other tensors: `change` maps those of the source to others."""
    folder.mkdir()
    raw = json.loads((GOLDEN / source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw if config is None else config(raw)))
    tensors = {}
    for file in (GOLDEN / source).glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(
        {name: np.ascontiguousarray(t) for name, t in change(tensors).items()}, folder / "model.safetensors"
    )
    return folder


def equal(one, other):
    """Whether two models have the same arrays, bit for bit."""
    ours, theirs = flatten_dict(one.dense), flatten_dict(other.dense)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=str(path))
    for expert in one.bank:
        for array, known in zip(one.bank.unpacked(expert), other.bank.unpacked(expert), strict=True):
            np.testing.assert_array_equal(array, known, err_msg=str(expert))


def stacked(tensors, names=("gate_proj", "up_proj", "down_proj"), block="mlp", router=None):
    """Experts as transformers 5 has them in memory."""
    result, layers = dict(tensors), {}
    for name in tensors:
        if ".experts." in name:
            layer, _, rest = name.partition(f".{block}.experts.")
            expert, matrix, _ = rest.split(".")
            layers.setdefault(layer, {})[int(expert), matrix] = result.pop(name)
    for layer, matrices in layers.items():
        count = 1 + max(expert for expert, _ in matrices)
        gate, up, down = ([matrices[e, name] for e in range(count)] for name in names)
        both = [np.concatenate(pair) for pair in zip(gate, up, strict=True)]
        result[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(both)
        result[f"{layer}.mlp.experts.down_proj"] = np.stack(down)
    return {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in result.items()}


@pytest.mark.parametrize("source", ["qwen3_moe", "deepseek_v3"])
def test_experts_may_be_stacked(tmp_path, source):
    folder = rewritten(source, tmp_path / "stacked", stacked)
    equal(load(folder), load(GOLDEN / source))


def test_mixtrals_experts_may_be_stacked(tmp_path):
    folder = rewritten(
        "mixtral", tmp_path / "stacked", lambda t: stacked(t, ("w1", "w3", "w2"), "block_sparse_moe")
    )
    equal(load(folder), load(GOLDEN / "mixtral"))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_a_language_model_inside_one_that_takes_images(tmp_path, prefix, caplog):
    head = "language_model." if prefix.startswith("language") else ""

    def change(tensors):
        renamed = {
            prefix + name.removeprefix("model.") if name.startswith("model.") else head + name: tensor
            for name, tensor in tensors.items()
        }
        return renamed | {"visual.patch_embed.weight": np.zeros(3, np.float32)}

    def config(raw):
        return {
            "architectures": ["SomeForConditionalGeneration"],
            "model_type": "some",
            "text_config": {key: value for key, value in raw.items() if key != "architectures"},
            "vision_config": {"depth": 2},
        }

    folder = rewritten("deepseek_v3", tmp_path / "nested", change, config)
    with caplog.at_level(logging.INFO, "layerscope_jax"):
        equal(load(folder), load(GOLDEN / "deepseek_v3"))
    assert "1 tensors are not needed and passed over: vision tower" in caplog.text


def single(tensors):
    """Stacked experts one by one, as in quantised checkpoints."""
    result, names = {}, {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    for name, tensor in tensors.items():
        start, _, matrix = name.partition(".experts.")
        if matrix not in names:
            result[name] = tensor
            continue
        for expert, rows in enumerate(tensor):
            for part, values in zip(names[matrix], np.split(rows, len(names[matrix])), strict=True):
                result[f"{start}.experts.{expert}.{part}.weight"] = values
    return result


@pytest.mark.parametrize(("source", "change"), [("gemma4", single), ("qwen3_5_moe", stacked)])
def test_either_form_of_experts_is_read_whichever_is_published(tmp_path, source, change, caplog):
    """Beside layers that predict further tokens, and for one a vision tower."""
    extra = {"mtp.fc.weight": np.zeros(3, np.float32)}
    folder = rewritten(source, tmp_path / "other", lambda tensors: change(tensors) | extra)
    with caplog.at_level(logging.INFO, "layerscope_jax"):
        equal(load(folder), load(GOLDEN / source))
    assert "1 tensors are not needed and passed over: multi-token prediction" in caplog.text
    assert ("passed over: vision tower" in caplog.text) == (source == "qwen3_5_moe")


def test_states_fade_by_float32_numbers_in_a_checkpoint_of_fewer_bits(tmp_path):
    """Of two dtypes, the one that the language model's own config names counts."""

    def change(tensors):
        kept = ("A_log", "linear_attn.norm.weight")
        return {
            name: tensor if name.endswith(kept) else tensor.astype(np.float16)
            for name, tensor in tensors.items()
        }

    def config(raw):
        return raw | {"dtype": None, "text_config": raw["text_config"] | {"dtype": "float16"}}

    model, golden = (
        load(rewritten("qwen3_5_moe", tmp_path / "mixed", change, config)),
        load(GOLDEN / "qwen3_5_moe"),
    )
    ours, theirs = (each.dense["layers"][0]["attention"] for each in (model, golden))
    np.testing.assert_array_equal(ours["fading"], theirs["fading"])
    assert ours["norm"]["scale"].dtype == model.bank.dtype == np.float16


def test_layers_that_predict_further_tokens_are_passed_over(tmp_path, caplog):
    def change(tensors):
        extra = {
            name.replace(".layers.2.", ".layers.3."): tensor
            for name, tensor in tensors.items()
            if ".layers.2." in name
        }
        more = {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}
        return (
            tensors | extra | more | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
        )

    folder = rewritten(
        "deepseek_v3", tmp_path / "mtp", change, lambda raw: raw | {"num_nextn_predict_layers": 1}
    )
    with caplog.at_level(logging.INFO, "layerscope_jax"):
        equal(load(folder), load(GOLDEN / "deepseek_v3"))
    assert "multi-token prediction" in caplog.text
    with pytest.raises(ValueError, match="expected no such tensor"):  # other families have no such layers
        load(rewritten("qwen3_moe", tmp_path / "other", change))


def test_packed_experts_stay_packed(tmp_path):
    rng = np.random.default_rng(3)

    def sizes(raw):
        return raw | {
            "hidden_size": 32,
            "intermediate_size": 32,
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]},
        }

    codes = {}

    def change(tensors):
        result = {}
        for name, tensor in tensors.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                rows = 64 if "gate_up" in name else 32
                blocks = rng.integers(0, 256, (8, rows, 1, 16), np.uint8)
                scales = rng.integers(120, 130, (8, rows, 1), np.uint8)
                result[name + "_blocks"], result[name + "_scales"] = blocks, scales
                codes[name] = blocks, scales
            elif name.endswith("gate_up_proj_bias"):
                result[name] = rng.standard_normal((8, 64)).astype(np.float32)
            else:
                result[name] = tensor
        return result

    model = load(rewritten("gpt_oss", tmp_path / "packed", change, sizes))
    for expert in model.bank:
        gate, up, down, _ = model.bank.unpacked(expert)
        blocks, scales = codes[f"model.layers.{expert.layer}.mlp.experts.gate_up_proj"]
        for half, matrix in ((0, gate), (1, up)):
            row = 2 * 5 + half  # of the packed tensor: row 5 of the matrix
            packed, scale = blocks[expert.expert, row, 0], scales[expert.expert, row, 0]
            expected = E2M1_VALUES[np.stack([packed & 15, packed >> 4], -1).reshape(-1)] * 2.0 ** (
                int(scale) - 127
            )
            np.testing.assert_array_equal(matrix[5], expected.astype(np.float32))
        assert down.shape == (32, 32)
    assert (model.bank.format.name, model.bank.dtype) == ("mxfp4", np.float32)
    unpacked = load(tmp_path / "packed", format="float32")
    assert unpacked.bank.format.name == "float32"
    equal(unpacked, model)


def test_a_part_of_an_expert_may_be_in_another_file(tmp_path):
    shutil.copytree(GOLDEN / "mixtral", tmp_path / "cut")
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    files = {}
    for name, file in index["weight_map"].items():
        if ".experts." in name:
            files.setdefault(name.rsplit(".", 2)[0], set()).add(file)
    assert any(len(shards) > 1 for shards in files.values())  # or it says nothing
    assert load(tmp_path / "cut").bank.total_bytes
