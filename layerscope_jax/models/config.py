"""The shape of a model, whatever family it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from layerscope_jax.models.kinds import ATTENTIONS, FEED_FORWARDS
from layerscope_jax.support.checks import Problems


class LayerKind(NamedTuple):
    """What tells one decoder layer of a model from another: layers of one kind share their programs.

    Attributes:
        attention, feed_forward: names in `layerscope_jax.models.kinds`.
    """

    attention: str
    feed_forward: str


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a mixture-of-experts decoder, whatever family it comes from.

    Read one from a Hugging Face `config.json` with `layerscope_jax.models.config_from_hf`. A family with
    settings of its own adds them in a subclass.

    A decoder layer is attention and a feed-forward part; one whose feed-forward part is routed experts is a
    MoE layer too. The two are numbered apart: decoder layers 0..L-1, MoE layers 0..L_moe-1. Experts, plans,
    traces, forecasts, profiles and statistics go by MoE layers; caches and weight names by decoder layers.

    Attributes:
        family: which weight names and HF architecture it belongs to: "olmoe", "mixtral", "qwen3_moe", or one
            that was given to `layerscope_jax.models.register_family`.
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim: V, D, L, H, H_kv, D_head.
        num_experts, experts_per_token, moe_intermediate_size: E, K, F.
        dense_layers: decoder layers without experts, in rising order; all others are MoE layers.
        intermediate_size: width of the feed-forward network of a dense layer; None where there is none.
        attention: kind of the attention of every layer (`layerscope_jax.models.kinds`).
        feed_forward: kind of the feed-forward part of every MoE layer.
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
    dense_layers: tuple[int, ...] = ()
    intermediate_size: int | None = None
    attention: str = "grouped"
    feed_forward: str = "routed"
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
        problems = Problems()
        problems.expect(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"a multiple of num_kv_heads={self.num_kv_heads}",
            self.num_heads,
        )
        problems.expect(
            1 <= self.experts_per_token <= self.num_experts,
            "experts_per_token",
            f"from 1 to num_experts={self.num_experts}",
            self.experts_per_token,
        )
        dense = self.dense_layers
        problems.expect(
            list(dense) == sorted({layer for layer in dense if 0 <= layer < self.num_layers}),
            "dense_layers",
            f"numbers of decoder layers from 0 to {self.num_layers - 1}, each once and in rising order",
            dense,
        )
        problems.expect(
            len(dense) < self.num_layers or not self.num_layers,
            "dense_layers",
            f"fewer than all {self.num_layers} layers: a model without routed experts is not supported",
            dense,
        )
        problems.expect(
            self.intermediate_size is not None or not dense,
            "intermediate_size",
            "the width of the feed-forward network of the dense layers",
            self.intermediate_size,
        )
        for name, there in (("attention", ATTENTIONS), ("feed_forward", FEED_FORWARDS)):
            kind = getattr(self, name)
            problems.expect(kind in there, name, f"a kind that there is ({', '.join(there)})", kind)
        problems.raise_any()

    @property
    def num_moe_layers(self) -> int:
        """L_moe, the decoder layers with routed experts."""
        return self.num_layers - len(self.dense_layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder layer that each MoE layer is, by the number of the MoE layer.

        >>> config = ModelConfig(family="qwen3_moe", vocab_size=32, hidden_size=8, num_layers=4, num_heads=2,
        ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
        ...     normalize_top_k=True, dense_layers=(0, 3), intermediate_size=16)
        >>> config.moe_layers, config.spans, config.tail
        ((1, 2), (range(0, 2), range(2, 3)), range(3, 4))
        """
        dense = set(self.dense_layers)
        return tuple(layer for layer in range(self.num_layers) if layer not in dense)

    @property
    def spans(self) -> tuple[range, ...]:
        """Decoder layers in stretches that end with a MoE layer each: its dense layers before, and itself."""
        starts = (0, *(layer + 1 for layer in self.moe_layers))
        return tuple(range(start, last + 1) for start, last in zip(starts, self.moe_layers, strict=False))

    @property
    def tail(self) -> range:
        """Dense layers after the last MoE layer."""
        moe = self.moe_layers
        return range(moe[-1] + 1 if moe else 0, self.num_layers)

    def layer_kind(self, layer: int) -> LayerKind:
        """What a decoder layer consists of."""
        return LayerKind(self.attention, "dense" if layer in self.dense_layers else self.feed_forward)

    def cache_shapes(self, layer: int, rows: int, length: int) -> Any:
        """The cache of a decoder layer, for `rows` sequences of up to `length` positions.

        Returns:
            Its arrays as `CacheArray`s, in the type that the layer's attention takes (`KVCache`, say).
        """
        return ATTENTIONS[self.layer_kind(layer).attention].cache_shapes(self, rows, length)

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of one expert's three matrices, by name, in the order they cross the link."""
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        return {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}

    def expert_bytes(self, itemsize: int) -> int:
        """Bytes of one expert at `itemsize` bytes a number."""
        return 3 * self.hidden_size * self.moe_intermediate_size * itemsize
