"""The decoder: trained, run whole (every expert resident) and run layer by layer from one definition.

How layers follow each other is said once, in `to_experts`, `to_end` and `through`. What computes the experts
and adds up their outputs is the caller's: stacks on the device here, our own loops or executors in `runtime`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder_layers import new_layer
from layerscope_jax.models.experts import combine, dense, stacked_ffn
from layerscope_jax.models.layers import Experts, MatrixParam, norm_of, normal
from layerscope_jax.models.router import Routing


class Between(NamedTuple):
    """What one MoE layer hands to the next, which adds it up: so the sum is no dispatch of its own.

    Attributes:
        hidden: [B, S, D] the residual stream without the experts; an `Unfinished` of that shape where a layer
            does more with their sum than adding it.
        outputs: their unweighted rows, as `Add` takes them; None before the first layer.
        weights: [T, K] of the router, float32.
    """

    hidden: Any
    outputs: Any = None
    weights: Any = None


Add = Callable[[Between], jax.Array]
"""Adds the experts' rows to the residual stream: -> [B, S, D]."""


class Unfinished(Protocol):
    """A MoE layer's output in which the sum over its experts is missing: a pytree."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def finished(self, total: jax.Array) -> jax.Array:
        """The output [B, S, D], from the weighted sum of the experts' outputs [B, S, D]."""
        ...


def added(state: Between, add: Add) -> jax.Array:
    """The output [B, S, D] of the MoE layer before."""
    if isinstance(state.hidden, jax.Array):
        return add(state)
    total = add(state._replace(hidden=jnp.zeros(state.hidden.shape, state.hidden.dtype)))
    return state.hidden.finished(total)


def to_experts(
    span: Sequence[Any], state: Between, positions: jax.Array, caches: Sequence[Any], add: Add
) -> tuple[jax.Array, jax.Array, Routing, list[Any]]:
    """One MoE layer up to its experts, from where the one before has computed its own.

    Args:
        span: the dense layers on the way, and the MoE layer (`ModelConfig.spans`).
        state: of the MoE layer before.
        positions: [B, S] int32.
        caches: of the span's layers; None in the place of each to attend within the inputs alone.
        add: adds up the experts of the layer before.

    Returns:
        hidden, inputs, routing: as of `RoutedLayer.attend_and_route`.
        caches: with the new positions.
    """
    *before, routed = span
    *held, last = caches
    hidden, kept = to_end(before, state, positions, held, add)
    hidden, inputs, routing, last = routed.attend_and_route(hidden, positions, last)
    return hidden, inputs, routing, [*kept, last]


def to_end(
    layers: Sequence[Any], state: Between, positions: jax.Array, caches: Sequence[Any], add: Add
) -> tuple[jax.Array, list[Any]]:
    """Dense layers behind a MoE layer, whose experts are added first: hidden [B, S, D], and caches."""
    hidden, kept = added(state, add), []
    for layer, cache in zip(layers, caches, strict=True):
        hidden, cache = layer(hidden, positions, cache)
        kept.append(cache)
    return hidden, kept


def through(
    config: ModelConfig,
    layers: Sequence[Any],
    state: Between,
    positions: jax.Array,
    caches: Sequence[Any],
    experts: Callable[[int, jax.Array, Routing], Any],
    add: Add,
) -> tuple[jax.Array, list[Routing], list[Any]]:
    """All layers of a model.

    Args:
        config: of the model.
        layers: every decoder layer.
        state: what comes into the first layer.
        positions: [B, S] int32.
        caches: one for each decoder layer, or None for each.
        experts: (number of the MoE layer, inputs [T, D], routing) -> the outputs that `add` takes.
        add: adds them up.

    Returns:
        hidden: [B, S, D].
        routings: of each MoE layer.
        caches: with the new positions.
    """
    routings, kept = [], []
    for number, span in enumerate(config.spans):
        first, last = span.start, span.stop
        hidden, inputs, routing, some = to_experts(
            layers[first:last], state, positions, caches[first:last], add
        )
        with jax.named_scope("experts"):
            state = Between(hidden, experts(number, inputs, routing), routing.weights)
        routings.append(routing)
        kept += some
    tail = config.tail
    hidden, some = to_end(layers[tail.start :], state, positions, caches[tail.start :], add)
    return hidden, routings, kept + some


def add_stacked(state: Between) -> jax.Array:
    """Adds outputs [T, K, D], if there are any yet."""
    if state.outputs is None:
        return state.hidden
    with jax.named_scope("experts"):
        flat = state.hidden.reshape(-1, state.hidden.shape[-1])
        return combine(flat, state.outputs, state.weights).reshape(state.hidden.shape)


class Decoder(nnx.Module):
    """A mixture-of-experts language model.

    Args:
        config: its shape.
        rngs: random streams for the initial weights.
        dtype: of every parameter.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> logits, routings = nnx.jit(Decoder.__call__)(model, jnp.array([[1, 2, 3]]))
    >>> logits.shape, routings[0].experts.shape
    ((1, 3, 32), (3, 2))
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        # As the head it is read whole in every step.
        kind = MatrixParam if config.tie_embeddings else nnx.Param
        self.embedding = kind(normal(rngs, (config.vocab_size, config.hidden_size), dtype))
        layers = range(config.num_layers)
        make = functools.partial(new_layer, config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([make(layer) for layer in layers])
        moe_layers = range(config.num_moe_layers)
        self.experts = nnx.List([Experts(config, rngs=rngs, dtype=dtype) for _ in moe_layers])
        self.norm = norm_of(config, config.hidden_size, dtype)
        head = None if config.tie_embeddings else normal(rngs, (config.vocab_size, config.hidden_size), dtype)
        self.head = None if head is None else MatrixParam(head)
        self.head_bias = nnx.Param(jnp.zeros(config.vocab_size, dtype)) if config.head_bias else None

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, S] ids -> [B, S, D]."""
        hidden = self.embedding[...][tokens]
        scale = self.config.embedding_scale
        return hidden if scale == 1.0 else hidden * scale

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] hidden states after the last layer -> [..., V] float32."""
        head = self.embedding if self.head is None else self.head
        (logits,) = dense(self.norm(hidden), head[...])
        if self.head_bias is not None:
            logits = logits + jnp.broadcast_to(self.head_bias[...], logits.shape)
        divisor, cap = self.config.logits_divisor, self.config.logits_cap
        logits = logits.astype(jnp.float32) if divisor == 1.0 else logits.astype(jnp.float32) / divisor
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    def next_logits(self, hidden: jax.Array, last: jax.Array) -> jax.Array:
        """Of each row's token `last` [B] alone: hidden [B, S, D] after the last layer -> [B, V] float32."""
        rows = jnp.arange(len(hidden))
        wanted = hidden[rows, last]
        if len(wanted) == 1:  # a product with one row is slow on CPUs
            wanted = jnp.repeat(wanted, 2, 0)
        return self.logits(wanted)[: len(hidden)]

    def run(
        self, hidden: jax.Array, positions: jax.Array, caches: Sequence[Any] | None
    ) -> tuple[jax.Array, list[Routing], list[Any] | None]:
        """All layers, every expert resident: hidden [B, S, D] -> [B, S, D], routings by MoE layer, caches."""

        def experts(number: int, inputs: jax.Array, routing: Routing) -> jax.Array:
            return stacked_ffn(
                inputs, routing.experts, self.experts[number].weights(), self.config.expert_body
            )

        held = [None] * self.config.num_layers if caches is None else caches
        hidden, routings, kept = through(
            self.config, self.layers, Between(hidden), positions, held, experts, add_stacked
        )
        return hidden, routings, None if caches is None else kept

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None
    ) -> tuple[jax.Array, list[Routing]]:
        """Logits of whole sequences, without a cache: training, scoring and the oracle of the tests.

        Args:
            tokens: [B, S] int32.
            positions: [B, S] int32, `PAD_POSITION` at padding; left, right or no padding alike. None for
                0..S-1 in every row.

        Returns:
            logits: [B, S, V] float32 (meaningless at padding).
            routings: what the router of each MoE layer decided for the B * S tokens.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, routings, _ = self.run(self.embed(tokens), positions, None)
        return self.logits(hidden), routings
