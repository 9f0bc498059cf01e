"""The shape of a model, whatever family it comes from."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from layerscope_jax.models.experts import SWIGLU, ExpertBody
from layerscope_jax.models.kinds import ATTENTIONS, FEED_FORWARDS
from layerscope_jax.models.rotary import RopeScaling
from layerscope_jax.models.routing_rules import SOFTMAX, RoutingRule
from layerscope_jax.support.checks import Problems


class LayerKind(NamedTuple):
    """What tells one decoder layer of a model from another: layers of one kind share their programs.

    Attributes:
        attention, feed_forward: names in `layerscope_jax.models.kinds`.
        sliding_window: of its attention; None for none.
    """

    attention: str
    feed_forward: str
    sliding_window: int | None


@dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """Sizes of multi-head latent attention (arXiv 2405.04434).

    Attributes:
        query_rank: of the compressed queries; None where queries are not compressed.
        rank: R, of the compressed keys and values.
        nope, rope: numbers of a head's query and key that are not rotated, and E that are.
        value: numbers of a head's value.
    """

    query_rank: int | None
    rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, kw_only=True)
class DeltaSizes:
    """Sizes of gated DeltaNet (arXiv 2412.06464).

    Attributes:
        key_heads, value_heads: H_k of queries and keys, each for as many of the H_v of values.
        key, value: D_k numbers of a head's query and key, D_v of its value.
        taps: W, tokens that a convolution spans.
    """

    key_heads: int
    value_heads: int
    key: int
    value: int
    taps: int

    @property
    def channels(self) -> int:
        """Numbers of all queries, keys and values of a token."""
        return 2 * self.key_heads * self.key + self.value_heads * self.value


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
        attention: kind of the attention of every layer (`layerscope_jax.models.kinds`), but for `delta`.
        feed_forward: kind of the feed-forward part of every MoE layer.
        expert_body: activation of the experts (and of dense feed-forward networks), and their biases.
        shared_intermediate_size: width of the expert that all tokens go through beside their routed ones;
            None for no such expert.
        shared_gate: whether that expert's output is scaled by a sigmoid of its own.
        routing: how the router scores, chooses and weighs.
        normalize_top_k: whether the K router weights of a token are scaled to sum to one.
        qk_norm: RMS norm of queries and keys: none, over each head, or over all heads together.
        qkv_clip: queries, keys and values are clipped to [-qkv_clip, qkv_clip] where given.
        attention_bias: whether the attention projections have biases.
        attention_out_bias: whether the output projection has one; None for as `attention_bias` says.
        attention_scale: what scores are multiplied with; None for `head_dim ** -0.5`.
        attention_sinks: whether each head has a score that takes its share of the softmax and adds nothing.
        attention_gate: whether what each head mixes is scaled by sigmoids, made beside its query.
        latent: sizes of "latent" attention; None for any other kind.
        delta: sizes of gated DeltaNet, which layers have in the place of `attention`; None where none has.
        sliding_window: how many latest positions a token attends to (itself included), or None for all.
        full_attention_layers: decoder layers without the window, and without gated DeltaNet.
        rope_theta: base of the rotary embedding.
        rotary_dim: the first so many numbers of a head are rotated; None for all.
        rope_interleaved: whether neighbours are rotated together, not a number of each half of the head.
        rope_scaling: how the rotary embedding was changed for a longer context.
        max_position_embeddings: the longest sequence the model is made for.
        norm: "rms"; "rms_float32", whose scales are applied before they are rounded, and "rms_offset", whose
            scales are stored less one besides; or "layer", with a bias.
        norm_eps: epsilon of every norm.
        mlp_bias: whether dense feed-forward networks, and the shared expert, have biases.
        embedding_scale, residual_scale: what embeddings, and each layer's two additions to the residual
            stream, are multiplied with.
        logits_divisor: what logits are divided by.
        logits_cap: bound that logits are bent towards by a hyperbolic tangent; None for none.
        tie_embeddings: whether the output head is the embedding.
        head_bias: whether the output head has a bias.
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
    expert_body: ExpertBody = SWIGLU
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    routing: RoutingRule = SOFTMAX
    qk_norm: Literal["none", "head", "all"] = "none"
    qkv_clip: float | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_scale: float | None = None
    attention_sinks: bool = False
    attention_gate: bool = False
    latent: LatentSizes | None = None
    delta: DeltaSizes | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    rope_theta: float = 10_000.0
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    norm: Literal["rms", "rms_float32", "rms_offset", "layer"] = "rms"
    norm_eps: float = 1e-5
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_cap: float | None = None
    tie_embeddings: bool = False
    head_bias: bool = False
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
        rule = self.routing
        fits = self.num_experts % rule.num_groups == 0 and 1 <= rule.groups_per_token <= rule.num_groups
        problems.expect(
            fits,
            "routing",
            f"groups that share num_experts={self.num_experts} evenly, and at most all of them for a token",
            rule,
        )
        per_token = rule.groups_per_token * self.num_experts // rule.num_groups if fits else self.num_experts
        problems.expect(
            self.experts_per_token <= per_token,
            "experts_per_token",
            f"at most the {per_token} experts of a token's groups",
            self.experts_per_token,
        )
        problems.expect(
            (self.latent is not None) == (self.attention == "latent"),
            "latent",
            "sizes for attention='latent', and None for other kinds",
            self.latent,
        )
        delta = self.delta
        problems.expect(
            delta is None or delta.value_heads % delta.key_heads == 0,
            "delta",
            "value_heads a multiple of key_heads",
            delta,
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
        full = layer in self.full_attention_layers
        return LayerKind(
            self.attention if full or self.delta is None else "delta",
            "dense" if layer in self.dense_layers else self.feed_forward,
            None if full else self.sliding_window,
        )

    def of_layer(self, layer: int) -> ModelConfig:
        """Returns the config as a decoder layer's parts read it: equal for layers of one kind."""
        kind = self.layer_kind(layer)
        return replace(
            self,
            attention=kind.attention,
            delta=self.delta if kind.attention == "delta" else None,
            sliding_window=kind.sliding_window,
            full_attention_layers=(),
        )

    def cache_shapes(self, layer: int, rows: int, length: int) -> Any:
        """The cache of a decoder layer, for `rows` sequences of up to `length` positions.

        Returns:
            Its arrays as `CacheArray`s, in the type that the layer's attention takes (`KVCache`, say).
        """
        config = _of_layer(self, layer)
        return ATTENTIONS[config.attention].cache_shapes(config, rows, length)

    def without_layers(self) -> ModelConfig:
        """Returns the config of what is before the first layer and after the last one."""
        return replace(self, num_layers=0, dense_layers=(), full_attention_layers=())

    def expert_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of an expert's arrays, by name, in the order they cross the link."""
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        bias = {"bias": (2 * inner + hidden,)} if self.expert_body.bias else {}
        return {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner), **bias}

    def expert_bytes(self, itemsize: int) -> int:
        """Bytes of one expert at `itemsize` bytes a number."""
        return itemsize * sum(math.prod(shape) for shape in self.expert_shapes().values())


@functools.lru_cache(maxsize=1024)
def _of_layer(config: ModelConfig, layer: int) -> ModelConfig:
    return config.of_layer(layer)
