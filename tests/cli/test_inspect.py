"""`layerscope inspect`: what a checkpoint is, from configs and headers alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_lines import refusal
from safetensors.numpy import load_file, save_file

from layerscope_jax import load
from layerscope_jax.checkpoints.convert import convert
from layerscope_jax.checkpoints.description import special
from layerscope_jax.checkpoints.safetensors_io import StoredTensor
from layerscope_jax.checkpoints.tokenizer_files import tokenizer_file
from layerscope_jax.cli import main as cli
from layerscope_jax.models import config_from_hf

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = Path(__file__).parents[1] / "golden"


def inspected(capsys, folder, code=0):
    """What the command prints as JSON, and that it reads no tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredTensor, "fill", lambda *arguments: pytest.fail("a tensor was read"))
        assert cli.main(["inspect", str(folder), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name", ["mixtral", "olmoe_normalised", "qwen2_moe", "qwen3_moe_dense", "deepseek_v2", "glm4_moe_lite"]
)
def test_every_part_has_the_bytes_of_its_parameters(name, capsys):
    found = inspected(capsys, GOLDEN / name)
    assert found["supported"]
    parameters, stored = found["parameters"], found["stored"]
    assert {part: 4 * count for part, count in parameters.items()} == stored["bytes_by_part"]
    assert stored["bytes"] == {"F32": sum(stored["bytes_by_part"].values())}
    chosen = found["experts_per_token"] / found["experts"]
    rest = sum(parameters.values()) - parameters["routed experts"]
    assert found["active_parameters"] == rest + parameters["routed experts"] * chosen
    assert found["moe_layers"] + found["dense_layers"] == found["layers"]


def test_it_says_what_a_person_wants_to_know(capsys):
    assert cli.main(["inspect", str(GOLDEN / "deepseek_v2")]) == 0
    lines = {line[:11].strip(): line[11:].strip() for line in capsys.readouterr().out.splitlines()}
    assert lines["layers"] == "3: 2 MoE, 1 dense"
    assert lines["experts"] == "8 a MoE layer, 3 a token, 9.2 KB each in float32"
    assert lines["attention"] == "latent, 4 heads, keys and values compressed to 16 + 8"
    assert lines["cache"] == "288.0 KB for 1,000 positions in float32"  # 3 layers of 16 + 8 numbers
    assert lines["context"] == "128 positions, rotary embedding of base 10,000, yarn by 4 from 32"
    assert "a shared expert of 48" in lines["special"]
    assert lines["tokenizer"] == "none: prompts must be token ids"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "gpt-oss-20b",
            [
                "a window of 128 positions",
                "sinks",
                "biases of attention",
                "top_k_softmax routers",
                "clamped experts",
                "biases of experts",
            ],
        ),
        (
            "DeepSeek-V3",
            [
                "scores times 0.135234",
                "neighbours rotated together",
                "sigmoid routers",
                "a bias for choosing experts",
                "4 of 8 groups of experts a token",
                "a shared expert of 2048",
                "weights of experts times 2.5",
            ],
        ),
        (
            "granite-3.1-3b-a800m-base",
            [
                "scores times 0.015625",
                "top_k_softmax routers",
                "the embedding as head",
                "embeddings times 12",
                "residual additions times 0.22",
                "logits times 0.166667",
            ],
        ),
    ],
)
def test_what_is_special_is_told(name, told):
    file = GOLDEN.parent / "models" / "published" / f"{name}.json"
    assert special(config_from_hf(json.loads(file.read_text()))) == told


def test_windows_are_counted(capsys):
    found = inspected(capsys, GOLDEN / "mixtral_window")
    assert (found["window_layers"], found["layers"]) == (4, 4)
    assert "a window of 8 positions" in found["special"]


def test_a_tokenizer_is_told(tiny, capsys):
    found = inspected(capsys, tiny)
    assert found["tokenizer"] == "tokenizer.json"
    files = {kind: tokenizer_file(GOLDEN / "tokenizers" / kind) for kind in ("kimi", "llama", "qwen2")}
    assert files == {"kimi": "tiktoken.model", "llama": "tokenizer.model", "qwen2": "vocab.json"}
    assert found["stop_token_ids"] == []


def test_a_folder_without_weights_is_described_by_its_config(tmp_path, capsys):
    shutil.copy(GOLDEN / "old_style_configs" / "qwen3_moe" / "config.json", tmp_path)
    found = inspected(capsys, tmp_path)
    assert found["stored"] is None
    assert sum(found["parameters"].values()) == 30_532_122_624
    assert found["cache_bytes"] == 48 * 2 * 4 * 128 * 1000 * 2
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "no weights in the folder" in capsys.readouterr().out


def test_tensors_that_are_not_needed_are_told(tmp_path, capsys):
    shutil.copytree(GOLDEN / "mixtral_window", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {
        "mtp.layers.0.weight": np.zeros(3, np.float32),
        "model.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    save_file(tensors | extra, tmp_path / "model.safetensors")
    unused = inspected(capsys, tmp_path)["stored"]["ignored"]
    assert unused == {"multi-token prediction": 1, "frequencies, which are computed": 1}
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "1 tensors (multi-token prediction)" in capsys.readouterr().out


def test_what_is_not_supported_is_said_in_the_words_of_the_refusal(tmp_path, capsys):
    config = json.loads((GOLDEN / "mixtral" / "config.json").read_text())
    for changes, words in (
        ({"sliding_windows": 3}, "sliding_windows: unknown key, which may change what the model computes"),
        ({"architectures": ["LlamaForCausalLM"]}, "expected one of the architectures OlmoeForCausalLM"),
        ({"quantization_config": {"quant_method": "hqq"}}, "expected one of awq, compressed-tensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        assert words in refusal(capsys, "inspect", tmp_path)
        found = inspected(capsys, tmp_path, code=2)
        assert not found["supported"]
        assert words in found["refusal"]


def test_weights_of_another_model_are_refused(tmp_path, capsys):
    shutil.copytree(GOLDEN / "olmoe", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "vocab_size, hidden_size" in refusal(capsys, "inspect", tmp_path)
    assert "expected a folder with config.json" in refusal(capsys, "inspect", tmp_path / "nowhere")


def test_a_converted_checkpoint_has_formats_and_bytes_by_part(tmp_path, capsys):
    convert(GOLDEN / "qwen2_moe", tmp_path / "out", experts="int8", dense="int8")
    found, plain = inspected(capsys, tmp_path / "out"), inspected(capsys, GOLDEN / "qwen2_moe")
    assert (found["expert_format"], found["dense_format"], found["dtype"]) == ("int8", "int8", "float32")
    assert (plain["expert_format"], plain["dense_format"]) == ("float32", "float32")
    assert found["parameters"] == plain["parameters"]
    stored, model = found["stored"], load(tmp_path / "out")
    assert sum(stored["bytes_by_part"].values()) == model.bank.total_bytes + model.dense_bytes
    assert stored["bytes_by_part"]["routed experts"] == model.bank.total_bytes
    assert stored["formats_by_part"] == {
        "embedding and head": ["F32", "int8"],
        "attention": ["int8", "F32"],
        "shared experts": ["int8", "F32"],
        "dense feed-forward": ["int8", "F32"],
        "routers": ["F32"],
        "routed experts": ["int8"],
    }
    assert plain["stored"]["formats_by_part"]["attention"] == ["F32"]
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (routed,) = (line.split() for line in lines if line.lstrip().startswith("routed experts"))
    assert routed[-1] == "int8"
    shutil.rmtree(tmp_path / "out" / "dense")
    assert "dense/state" in inspected(capsys, tmp_path / "out", code=2)["refusal"]
