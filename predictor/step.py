"""Training step of all layers at once: targets, loss and optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.support.jax_settings import random_key
from predictor.network import (
    GroupConfig,
    LayerNetwork,
    group_layers,
    multi_hot,
    router_margin,
    spread,
)
from predictor.pca import Basis
from predictor.routers import Prior, Routers

Params = dict[str, Any]
"""Group -> pure dict of a `LayerNetwork`'s parameters, stacked over the group's layers."""


@dataclass(frozen=True)
class Stack:
    """Layers of one group.

    Attributes:
        layers: the layers.
        config: settings of their networks.
        components: P, components of their input.
        graphdef: graph definition of one network.
    """

    layers: range
    config: GroupConfig
    components: int
    graphdef: nnx.GraphDef


def stacks(
    model: ModelIdentity, hidden: int, look_ahead: int, groups: Mapping[str, GroupConfig]
) -> dict[str, Stack]:
    """Returns the groups that have layers, for hidden states of `hidden` components."""
    stacked = {}
    for name, layers in group_layers(model.num_layers).items():
        if layers:
            components = min(groups[name].components, hidden)
            graphdef = _graphdef(components, model.num_experts, look_ahead, groups[name])
            stacked[name] = Stack(layers, groups[name], components, graphdef)
    return stacked


def _graphdef(components: int, experts: int, look_ahead: int, group: GroupConfig) -> nnx.GraphDef:
    network = nnx.eval_shape(lambda: LayerNetwork(components, experts, look_ahead, group, nnx.Rngs(0)))
    return nnx.split(network)[0]


def first_params(model: ModelIdentity, stacked: Mapping[str, Stack], look_ahead: int, seed: int) -> Params:
    """Returns initial parameters, drawn with a separate seed for each layer."""

    def draw(stack: Stack, layer: int) -> Any:
        rngs = nnx.Rngs(random_key(seed * 1009 + layer))
        network = LayerNetwork(stack.components, model.num_experts, look_ahead, stack.config, rngs)
        return nnx.to_pure_dict(nnx.split(network)[1])

    return {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(draw(stack, layer) for layer in stack.layers))
        for name, stack in stacked.items()
    }


def priors(routers: Routers, basis: Basis, stacked: Mapping[str, Stack], look_ahead: int) -> dict[str, Prior]:
    """Returns each group's router forecasts of the next W layers."""
    horizons = range(1, look_ahead + 1)
    return {
        name: routers.prior(basis, stack.layers, horizons, stack.components)
        for name, stack in stacked.items()
    }


def input_scale(basis: Basis) -> np.ndarray:
    """Returns factors [L] that scale the components of hidden states to about one."""
    return np.sqrt(basis.width / np.maximum(basis.variance.sum(1), 1e-12)).astype(np.float32)


def layer_logits(
    network: LayerNetwork,
    hidden: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    prior: Prior,
    scale: jax.Array,
    noise: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns logits [T, W, E] of one layer, in training and in the engine.

    Args:
        network: network of the layer.
        hidden: [T, P] reduced hidden states.
        experts, weights: [T, K] choices of the router.
        prior: the routers' forecast.
        scale: [] scale of the hidden state.
        noise: [T, P] noise that is added to the scaled hidden state, in training.
        key: random key of dropout, in training.
    """
    num_experts = network.gain.shape[1]
    prior_logits = router_margin(prior.logits(hidden), experts.shape[-1])
    inputs = hidden * scale
    if noise is not None:
        inputs += noise
    return network(inputs, spread(experts, weights, num_experts), prior_logits, key)


@dataclass(frozen=True)
class Batch:
    """Batch of B tokens: inputs of the forecast, and the chosen experts.

    Attributes:
        hidden: [B, L, P] float16.
        experts: [B, L, K].
        weights: [B, L, K] float16.
        following: [B, L, K] experts of the next token.
        has_next: [B] bool, whether there is one.
    """

    hidden: jax.Array | np.ndarray
    experts: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    following: jax.Array | np.ndarray
    has_next: jax.Array | np.ndarray


jax.tree_util.register_dataclass(Batch)


def targets(batch: Batch, look_ahead: int, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Returns the targets of the networks, [L, B, W, E] zeros and ones, and whether they are known [L, B, W].

    The last layers' look-ahead continues with the first layers of the next token's step.
    """
    layers = batch.experts.shape[1]
    both = jnp.concatenate([batch.experts, batch.following], 1).swapaxes(0, 1)  # [2L, B, K]
    hot = multi_hot(both, num_experts)
    ahead = np.arange(layers)[:, None] + 1 + np.arange(look_ahead)[None]  # [L, W]
    wraps = jnp.asarray(ahead >= layers)[:, None, :]
    known = ~wraps | batch.has_next[None, :, None]
    return hot[ahead].swapaxes(1, 2), known


def loss(logits: jax.Array, truth: jax.Array, weights: jax.Array, focal: float) -> jax.Array:
    """Returns the paper's loss summed over E: weighted binary cross-entropy and a focal term (gamma 2)."""
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, truth)
    total = weights * cross_entropy
    if focal:
        missed = jnp.abs(truth - jax.nn.sigmoid(logits))
        total += focal * missed * missed * cross_entropy
    return total.sum(-1)


def top_recall(logits: jax.Array, truth: jax.Array, choices: int) -> jax.Array:
    """Returns exact top-k recall [...]: the share of the K true experts [..., E] among the K likeliest."""
    threshold = jax.lax.top_k(logits, choices)[0][..., -1:]
    return jnp.where(logits >= threshold, truth, 0.0).sum(-1) / choices


def optimizer(stacked: Mapping[str, Stack], steps: int, clip: float) -> optax.GradientTransformation:
    """Returns AdamW with each group's rates, warm-up, cosine decay and clipping by each group's norm."""

    def of(stack: Stack) -> optax.GradientTransformation:
        rate = stack.config.learning_rate
        warm_up = min(100, max(1, steps // 10))
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, rate, warm_up, max(steps, warm_up + 1), 0.01 * rate
        )
        matrices = lambda params: jax.tree.map(lambda p: p.ndim > 2, params)  # noqa: E731
        # The norm is over all layers of a group, so the limit grows with their number.
        return optax.chain(
            optax.clip_by_global_norm(clip * len(stack.layers) ** 0.5),
            optax.adamw(schedule, weight_decay=stack.config.weight_decay, mask=matrices),
        )

    labels = lambda params: {name: name for name in params}  # noqa: E731
    return optax.partition({name: of(stack) for name, stack in stacked.items()}, labels)


def make_steps(
    stacked: Mapping[str, Stack],
    prior: Mapping[str, Prior],
    scale: jax.Array,
    class_weights: jax.Array,
    look_ahead: int,
    focal: float,
    update: optax.GradientTransformation,
) -> tuple[Callable, Callable]:
    """Returns the jitted `train(params, state, batch, key)` and `evaluate(params, batch)`.

    `train` returns the new parameters and state, and the loss; `evaluate` the sum of the exact recall over
    the batch and the number of rows with a target, each [L, W].
    """
    layers, num_experts = class_weights.shape

    def logits_of(params: Params, batch: Batch, key: jax.Array | None):
        hidden = batch.hidden.astype(jnp.float32).swapaxes(0, 1)  # [L, B, P]
        experts, weights = batch.experts.swapaxes(0, 1), batch.weights.swapaxes(0, 1)
        parts = []
        for name, stack in stacked.items():
            group = slice(stack.layers.start, stack.layers.stop)
            inputs = hidden[group, :, : stack.components]
            noise, keys = None, None
            if key is not None:
                keys = jax.random.split(jax.random.fold_in(key, stack.layers.start), len(stack.layers))
                if stack.config.noise:
                    noise = stack.config.noise * jax.random.normal(key, inputs.shape)

            def one_layer(params, *rest, graphdef=stack.graphdef):
                return layer_logits(nnx.merge(graphdef, params), *rest)

            axes = (0, 0, 0, 0, 0, 0, None if noise is None else 0, None if keys is None else 0)
            run = jax.vmap(one_layer, in_axes=axes)
            parts.append(
                run(
                    params[name],
                    inputs,
                    experts[group],
                    weights[group],
                    prior[name],
                    scale[group],
                    noise,
                    keys,
                )
            )
        return jnp.concatenate(parts)  # [L, B, W, E]

    target_layer = (np.arange(layers)[:, None] + 1 + np.arange(look_ahead)[None]) % layers
    weights_ahead = class_weights[target_layer][:, None]  # [L, 1, W, E]

    def objective(params: Params, batch: Batch, key: jax.Array):
        truth, known = targets(batch, look_ahead, num_experts)
        logits = logits_of(params, batch, key)
        each = loss(logits, truth, jnp.broadcast_to(weights_ahead, logits.shape), focal)
        # Layers learn independently: the sum over layers of the mean over each layer's known targets.
        counted = jnp.maximum(known.sum((1, 2), dtype=jnp.float32), 1.0)
        return (jnp.where(known, each, 0.0).sum((1, 2)) / counted).sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params: Params, state: optax.OptState, batch: Batch, key: jax.Array):
        total, grads = jax.value_and_grad(objective)(params, batch, key)
        updates, state = update.update(grads, state, params)
        return optax.apply_updates(params, updates), state, total / layers

    @jax.jit
    def evaluate(params: Params, batch: Batch):
        truth, known = targets(batch, look_ahead, num_experts)
        recall = top_recall(logits_of(params, batch, None), truth, batch.experts.shape[-1])
        return jnp.where(known, recall, 0.0).sum(1), known.sum(1)

    return train, evaluate
