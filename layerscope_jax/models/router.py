"""Routers: from a token's logits over the experts to those it goes to, and their weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.experts import dense
from layerscope_jax.models.layers import normal
from layerscope_jax.models.routing_rules import RoutingRule


class Routing(NamedTuple):
    """What the router decides for T tokens."""

    experts: jax.Array  # [T, K] int32, best first
    weights: jax.Array  # [T, K] float32
    logits: jax.Array  # [T, E] float32


class Router(nnx.Module):
    """Scores all experts of each token and chooses K of them, as `ModelConfig.routing` says."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        rule = config.routing
        # Where logits are float32 in any model, so is this: it is not widened anew in each step.
        kind = jnp.dtype(jnp.float32) if rule.float32_logits else dtype
        self.weight = nnx.Param(normal(rngs, (config.num_experts, config.hidden_size), kind))
        self.bias = nnx.Param(jnp.zeros(config.num_experts, dtype)) if rule.logit_bias else None
        # What is added to scores for choosing alone decides between near equals: float32 in any model.
        selection = jnp.zeros(config.num_experts, jnp.float32) if rule.selection_bias else None
        self.selection_bias = None if selection is None else nnx.Param(selection)

    def __call__(self, x: jax.Array) -> Routing:
        """Routes `x` [T, D]."""
        rule, config = self.config.routing, self.config
        (logits,) = dense(x.astype(self.weight[...].dtype), self.weight[...])
        if self.bias is not None:
            logits = logits + jnp.broadcast_to(self.bias[...].astype(logits.dtype), logits.shape)
        logits = logits.astype(jnp.float32)
        if rule.score == "sparsemixer":
            return sparsemixer(logits, rule.jitter)
        bias = None if self.selection_bias is None else self.selection_bias[...]
        return choose(logits, bias, rule, config.experts_per_token, config.normalize_top_k)


def choose(
    logits: jax.Array, bias: jax.Array | None, rule: RoutingRule, count: int, normalize: bool
) -> Routing:
    """Chooses `count` experts for each token.

    Args:
        logits: [T, E] float32.
        bias: [E] float32, added to the scores for choosing alone; None for none.
        rule: how to score, choose and weigh.
        count: K.
        normalize: whether the K weights of a token are scaled to sum to one (before `rule.scale`).
    """
    if rule.score == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
    elif rule.score == "sigmoid":
        scores = jax.nn.sigmoid(logits)
    else:  # of the chosen alone
        values, experts = jax.lax.top_k(logits, count)
        return Routing(experts, jax.nn.softmax(values, axis=-1), logits)
    ranked = scores if bias is None else scores + bias[None]
    if rule.num_groups > 1:
        ranked = within_groups(ranked, rule)
    weights, experts = jax.lax.top_k(ranked, count)
    if bias is not None:
        weights = jnp.take_along_axis(scores, experts, axis=-1)
    if normalize:
        total = weights.sum(-1, keepdims=True)
        weights /= jnp.maximum(total, rule.smallest_sum) if rule.smallest_sum else total + rule.epsilon
    if rule.scale != 1.0:
        weights *= rule.scale
    return Routing(experts, weights, logits)


def within_groups(ranked: jax.Array, rule: RoutingRule) -> jax.Array:
    """Scores [T, E] with those outside each token's best groups replaced, so that they are chosen last."""
    tokens, num_experts = ranked.shape
    grouped = ranked.reshape(tokens, rule.num_groups, -1)
    counted = 1 if rule.group_score == "max" else 2
    best = jax.lax.top_k(grouped, counted)[0].sum(axis=-1)  # [T, groups]
    _, kept = jax.lax.top_k(best, rule.groups_per_token)  # [T, G]
    inside = (jnp.arange(rule.num_groups)[None, None] == kept[..., None]).any(axis=1)
    outside = 0.0 if rule.group_score == "max" else -jnp.inf
    return jnp.where(inside[..., None], grouped, outside).reshape(tokens, num_experts)


def sparsemixer(logits: jax.Array, jitter: float) -> Routing:
    """Phi-MoE's two experts a token (arXiv 2409.12136), as in inference.

    Each is the best that is left; its weight is its share among those that are near it. Both shares are
    weights as they are: they do not sum to one.
    """

    def best(left: jax.Array) -> tuple[jax.Array, jax.Array]:
        high = left.max(axis=-1, keepdims=True)
        far = (high - logits) / jnp.maximum(jnp.abs(logits), high) > 2 * jitter
        chosen = jnp.argmax(left, axis=-1)[:, None]
        shares = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1)
        return chosen, jnp.take_along_axis(shares, chosen, axis=-1)

    first, weight = best(logits)
    experts = jnp.arange(logits.shape[-1])[None]
    second, other = best(jnp.where(experts == first, -jnp.inf, logits))
    chosen = jnp.concatenate([first, second], axis=-1).astype(jnp.int32)
    return Routing(chosen, jnp.concatenate([weight, other], axis=-1), logits)
