"""LLaPor's networks: one for each MoE layer, in three groups, with an output for each layer ahead.

As in the LayerScope paper, layers near the input and the output route differently from those in the middle,
which get a deeper, gated network. The networks correct the forecast of the model's own routers, the best
forecast without training.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

BORDERS = (8 / 27, 21 / 27)
"""Relative depths between the groups: the paper's middle group is layers 8 to 20 of 27."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Network of a group's layers, and settings of its training.

    Attributes:
        components: number of PCA components that are read, at most those that exist.
        width, blocks: width and number of blocks of the network.
        gated: whether blocks are gated by a second branch.
        dropout: dropout rate within blocks.
        noise: noise added to the hidden state in training, relative to its standard deviation.
        learning_rate, weight_decay: settings of AdamW.
    """

    components: int = 256
    width: int = 128
    blocks: int = 3
    gated: bool = False
    dropout: float = 0.0
    noise: float = 0.0
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2


def group_layers(layers: int) -> dict[str, range]:
    """Returns the layers of each group; in a small model some groups are empty.

    >>> {name: list(layers) for name, layers in group_layers(6).items()}
    {'input': [0, 1], 'middle': [2, 3, 4], 'output': [5]}
    """
    first, second = (round(border * layers) for border in BORDERS)
    return {"input": range(first), "middle": range(first, second), "output": range(second, layers)}


def normed(x: jax.Array) -> jax.Array:
    """Returns the RMS norm of x without a scale, which the next matrix includes."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


class Block(nnx.Module):
    """Residual: `x + silu(n W) [* (n V)] U` with n the normed x."""

    def __init__(self, group: GroupConfig, rngs: nnx.Rngs):
        width = group.width
        self.inner = Dense(width, width, rngs)
        self.gate = Dense(width, width, rngs) if group.gated else None
        self.outer = Dense(width, width, rngs, gain=0.3)
        self.dropout = group.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        n = normed(x)
        inner = jax.nn.silu(self.inner(n))
        if self.gate is not None:
            inner *= self.gate(n)
        if key is not None and self.dropout:
            kept = jax.random.bernoulli(key, 1 - self.dropout, inner.shape)
            inner = jnp.where(kept, inner / (1 - self.dropout), 0.0)
        return x + self.outer(inner)


class Dense(nnx.Module):
    """`x @ weight + bias`."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, gain: float = 1.0):
        scale = gain * inputs**-0.5
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.weight[...]
        return y + jnp.broadcast_to(self.bias[...], y.shape)


class LayerNetwork(nnx.Module):
    """Maps one layer's reduced hidden states and chosen experts to logits of the experts of W later layers.

    Args:
        components: P, size of the reduced hidden state.
        experts: E.
        look_ahead: W.
        group: shape of the network.
        rngs: random numbers of the initial weights.

    >>> net = LayerNetwork(8, 4, 2, GroupConfig(width=16), nnx.Rngs(0))
    >>> net(jnp.ones((3, 8)), jnp.ones((3, 4)), jnp.zeros((3, 2, 4))).shape
    (3, 2, 4)
    """

    def __init__(self, components: int, experts: int, look_ahead: int, group: GroupConfig, rngs: nnx.Rngs):
        self.input = Dense(components + experts, group.width, rngs)
        self.blocks = nnx.List([Block(group, rngs) for _ in range(group.blocks)])
        # The initial forecast is about that of the routers, whose weight `predictor.calibration` measures.
        self.output = Dense(group.width, look_ahead * experts, rngs, gain=0.01)
        self.gain = nnx.Param(jnp.full((look_ahead, experts), 2.0, jnp.float32))

    def __call__(
        self, hidden: jax.Array, chosen: jax.Array, prior: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns logits [T, W, E].

        Args:
            hidden: [T, P] reduced hidden states.
            chosen: [T, E] weights of the chosen experts, zero elsewhere; see `spread`.
            prior: [T, W, E] forecast of the model's own routers; see `router_margin`.
            key: random key of dropout, in training.
        """
        inputs = jnp.concatenate([hidden, chosen], -1)
        x = self.input(inputs)
        for index, block in enumerate(self.blocks):
            x = block(x, None if key is None else jax.random.fold_in(key, index))
        # Not normed, so that the inputs also reach the output through a linear map, which is hard to beat one
        # layer ahead.
        logits = self.output(x).reshape(prior.shape)
        return logits + jnp.broadcast_to(self.gain[...], prior.shape) * prior


def spread(experts: jax.Array, weights: jax.Array, num_experts: int) -> jax.Array:
    """Returns [..., E] with K times the weight at each chosen expert [..., K], zero elsewhere."""
    choices = experts.shape[-1]
    hot = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32)
    return choices * jnp.einsum("...k,...ke->...e", weights.astype(jnp.float32), hot)


def multi_hot(experts: jax.Array, num_experts: int) -> jax.Array:
    """Returns [..., E] with ones at the chosen experts [..., K], zeros elsewhere."""
    return jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(-2)


def router_margin(logits: jax.Array, choices: int) -> jax.Array:
    """Returns the difference of each router logit [..., E] to the K-th largest: 0 or more if chosen.

    The K-th largest is located by bisection, to a thousandth of the logits' range, because sorting is slow on
    CPUs. The difference is a better input than a probability, because it alone decides whether an expert is
    chosen.

    >>> router_margin(jnp.array([1.0, 4.0, 2.0, 3.0]), 2).round(1).tolist()
    [-2.0, 1.0, -1.0, 0.0]
    """
    low, high = logits.min(-1, keepdims=True), logits.max(-1, keepdims=True)
    for _ in range(10):
        middle = 0.5 * (low + high)
        enough = (logits > middle).sum(-1, keepdims=True) >= choices
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle)
    return logits - low
