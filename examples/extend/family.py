"""Adds a family of models without changing the package: Qwen2-MoE (arXiv 2407.10671), from this file alone.

    python examples/extend/family.py [checkpoint]

Its layers have three things that the families of the package do not have: biases of queries, keys and values
but not of the output, a shared expert that all tokens go through beside their routed ones, and a gate on that
expert. So the file has

- `Qwen2MoeConfig`, the settings that it adds;
- `QkvBiasAttention` and `SharedExpertLayer`, its own parts of a layer;
- `read_config` and `write_config`, its `config.json` there and back;
- a table of weights, most of which it shares with others.

With no checkpoint given it loads the tiny one beside it, generates with half of its experts on the
device, and compares with what Hugging Face transformers computes from the same files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layerscope_jax import Engine, ModelConfig, OffloadConfig, load
from layerscope_jax.models import ConfigReader, Family, register_family
from layerscope_jax.models.attention import Attention
from layerscope_jax.models.decoder_layers import RoutedLayer
from layerscope_jax.models.family import write_shared
from layerscope_jax.models.layers import GatedMLP, Linear
from layerscope_jax.models.weights import (
    BIASES,
    DENSE_LAYERS,
    LAYER,
    PLACE,
    ROUTED_LAYERS,
    TRANSPOSE,
    WEIGHTS,
    mapped,
)

GOLDEN = Path(__file__).parent / "qwen2_moe"
TOLERANCE = 1e-4  # of logits: rounding in float32 alone moves them by up to 5e-5


@dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(ModelConfig):
    """The shape of a Qwen2-MoE model.

    Attributes:
        shared_intermediate_size: width of the shared expert.
        qkv_bias: whether queries, keys and values have biases.
    """

    attention: str = "qkv bias"
    feed_forward: str = "routed beside a gated shared expert"
    shared_intermediate_size: int
    qkv_bias: bool


class QkvBiasAttention(Attention):
    """Attention whose output projection has no bias, where the others may have one."""

    def __init__(self, config: Qwen2MoeConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        width = config.hidden_size
        for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            linear = Linear(width, heads * config.head_dim, bias=config.qkv_bias, rngs=rngs, dtype=dtype)
            setattr(self, name, linear)


class SharedExpertLayer(RoutedLayer):
    """A MoE layer with an expert for all tokens, scaled by a gate of its own."""

    def __init__(self, config: Qwen2MoeConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.shared = GatedMLP(config.hidden_size, config.shared_intermediate_size, rngs=rngs, dtype=dtype)
        self.shared_gate = Linear(config.hidden_size, 1, bias=False, rngs=rngs, dtype=dtype)

    def beside(self, inputs: jax.Array) -> jax.Array:
        """What is added beside the routed experts: [T, D] -> [T, D]."""
        return jax.nn.sigmoid(self.shared_gate(inputs)) * self.shared(inputs)


def read_config(config: Mapping[str, Any]) -> Qwen2MoeConfig:
    """Settings of a `config.json`; a key that nothing reads is refused, as it may change the arithmetic."""
    reader = ConfigReader(config)
    shared = reader.shared(theta=10_000.0, norm_eps=1e-6, max_position_embeddings=32_768)
    dense = reader.dense_layers(shared["num_layers"])
    settings = {
        "num_kv_heads": reader.integer("num_key_value_heads", default=16),
        "moe_intermediate_size": reader.integer("moe_intermediate_size"),
        "normalize_top_k": reader.flag("norm_topk_prob", default=False),
        "dense_layers": dense,
        "intermediate_size": reader.integer("intermediate_size") if dense else None,
        "shared_intermediate_size": reader.integer("shared_expert_intermediate_size"),
        "qkv_bias": reader.flag("qkv_bias", default=True),
    }
    reader.expect("use_sliding_window", False, "windows are not supported")
    reader.layer_types(None)
    # Nothing reads these where no layer has a window, or where none is dense.
    reader.check("sliding_window", "max_window_layers", "intermediate_size")
    return Qwen2MoeConfig(family="qwen2_moe", **shared, **settings)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The reverse."""
    assert isinstance(config, Qwen2MoeConfig)
    return write_shared(config) | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.normalize_top_k,
        "num_experts": config.num_experts,
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": config.shared_intermediate_size,
        **({"intermediate_size": config.intermediate_size} if config.dense_layers else {}),
    }


SHARED_EXPERT = mapped(
    LAYER + "mlp.",
    PLACE,
    ("shared_expert.gate_proj.weight", "shared.gate.weight", TRANSPOSE),
    ("shared_expert.up_proj.weight", "shared.up.weight", TRANSPOSE),
    ("shared_expert.down_proj.weight", "shared.down.weight", TRANSPOSE),
    ("shared_expert_gate.weight", "shared_gate.weight", TRANSPOSE),
)

QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    read_config=read_config,
    write_config=write_config,
    weights=WEIGHTS + BIASES + ROUTED_LAYERS + DENSE_LAYERS + SHARED_EXPERT,
    attentions={"qkv bias": QkvBiasAttention},
    feed_forwards={"routed beside a gated shared expert": SharedExpertLayer},
)


def check(folder: Path = GOLDEN) -> float:
    """Compares with the golden values of a folder.

    Returns:
        The largest difference of a logit.

    Raises:
        AssertionError: if it is too large, or the engine's tokens are not transformers' own.
    """
    golden = np.load(folder / "golden.npz")
    model = load(folder)
    logits, _ = nnx.jit(lambda decoder, tokens: decoder(tokens))(model.whole(), golden["tokens"])
    real = np.arange(golden["tokens"].shape[1])[None] < golden["lengths"][:, None]
    difference = float(np.abs(np.asarray(logits)[real] - golden["logits"][real]).max())
    assert difference < TOLERANCE, f"logits differ by {difference}"
    prompts = [row[:length].tolist() for row, length in zip(golden["tokens"], golden["lengths"], strict=True)]
    steps = golden["greedy"].shape[1]
    with Engine(model, OffloadConfig(device_budget=model.bank.total_bytes // 2, policy="lru")) as engine:
        result = engine.generate(prompts, max_new_tokens=steps)
    assert result.token_ids == golden["greedy"].tolist(), "the engine's tokens are not transformers' own"
    return difference


def main() -> None:
    register_family(QWEN2_MOE)
    if sys.argv[1:]:
        model = load(sys.argv[1])
        print(f"{model.config.num_moe_layers} MoE layers, {model.bank.total_bytes:,} bytes of experts")
    else:
        print(f"as transformers: logits to {check():.1e}, and every token of the engine's")


if __name__ == "__main__":
    main()
