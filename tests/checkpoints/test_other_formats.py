"""A folder that holds something else than a checkpoint in safetensors is named for what it is."""

import json
import shutil
from pathlib import Path

import pytest

from layerscope_jax.checkpoints.model import load
from layerscope_jax.checkpoints.other_formats import other_format

GOLDEN = Path(__file__).parents[1] / "golden" / "olmoe"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "got an adapter (LoRA, say)"),
        (["adapter_config.json", "config.json", "model.safetensors"], "peft: PeftModel.merge_and_unload"),
        (["model-q4_k_m.gguf"], "got weights in GGUF, the format of llama.cpp (model-q4_k_m.gguf); take the"),
        (
            ["config.json", "pytorch_model.bin"],
            "got weights as PyTorch pickles them (pytorch_model.bin); save it",
        ),
        (
            [f"pytorch_model-0000{shard}-of-00002.bin" for shard in (1, 2)],
            "(pytorch_model-00001-of-00002.bin and 1 more)",
        ),
        (["consolidated.00.pth", "params.json"], "got weights as PyTorch pickles them (consolidated.00.pth)"),
        (["model.pt"], "save it as safetensors first (transformers: AutoModelForCausalLM"),
        (["tf_model.h5"], "got weights for TensorFlow"),
        (["flax_model.msgpack"], "got weights for Flax"),
        (["model.onnx"], "got a graph for ONNX"),
        (
            ["config.json", "consolidated-00001-of-00002.safetensors"],
            "whose names are of the model's authors",
        ),
    ],
)
def test_what_else_a_folder_holds(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="expected ") as raised:
        load(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: expected ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "files",
    [
        [],
        ["config.json"],
        ["model.safetensors", "pytorch_model.bin", "model.gguf", "consolidated.safetensors"],
        ["model-00001-of-00002.safetensors", "pytorch_model.bin"],
        [
            "model.safetensors.index.json",
            "pytorch_model.bin",
        ],  # whose shards are missing, which is said instead
        ["original/consolidated.00.pth", "metal/model.bin"],
    ],
)
def test_what_may_be_a_checkpoint(files):
    assert other_format(files) is None


def test_other_weights_beside_a_checkpoint_are_no_trouble(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors"):
        (folder / name).write_bytes(b"other")
    assert load(folder).config == load(GOLDEN).config


def test_a_folder_that_holds_nothing_known_is_said_to_lack_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: expected this file, found none"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OlmoeForCausalLM"]}))
    with pytest.raises(ValueError, match=r"config\.json: "):
        load(tmp_path)
