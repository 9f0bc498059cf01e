"""The shape of a model, whatever family it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a mixture-of-experts decoder, whatever family it comes from.

    Read one from a Hugging Face `config.json` with `layerscope_jax.models.config_from_hf`.

    Attributes:
        family: which weight names and HF architecture it belongs to: "olmoe", "mixtral" or "qwen3_moe".
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim: V, D, L, H, H_kv, D_head.
        num_experts, experts_per_token, moe_intermediate_size: E, K, F.
        normalize_top_k: whether the K router weights of a token are scaled to sum to one.
        qk_norm: RMS norm of queries and keys: none, over each head, or over all heads together.
        qkv_clip: queries, keys and values are clipped to [-qkv_clip, qkv_clip] where given.
        attention_bias: whether the four attention projections have biases.
        sliding_window: how many latest positions a token attends to (itself included), or None for all.
        rope_theta: base of the rotary embedding.
        max_position_embeddings: the longest sequence the model is made for.
        norm_eps: epsilon of every RMS norm.
        tie_embeddings: whether the output head is the embedding.
        stop_token_ids: ids that end a generation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    normalize_top_k: bool
    qk_norm: Literal["none", "head", "all"] = "none"
    qkv_clip: float | None = None
    attention_bias: bool = False
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 4096
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must lie in 1..num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of one expert's three matrices, by name, in the order they cross the link."""
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        return {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}

    def expert_bytes(self, itemsize: int) -> int:
        """Bytes of one expert at `itemsize` bytes a number."""
        return 3 * self.hidden_size * self.moe_intermediate_size * itemsize
