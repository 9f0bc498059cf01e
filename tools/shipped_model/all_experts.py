"""A decoder's forward pass with every expert computed for every token.

For experts this small it takes less time than picking rows for each: training on one core gains a third.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from layerscope_jax.models.decoder import Between, Decoder, through
from layerscope_jax.models.experts import BiasedWeights, ExpertBody, products_of_rows
from layerscope_jax.models.router import Routing


def run_whole(model: Decoder, tokens: jax.Array) -> tuple[jax.Array, list[Routing]]:
    """Logits and routings of `tokens` [B, S], as calling the model gives them."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    body = model.config.expert_body

    def experts(number: int, inputs: jax.Array, routing: Routing) -> jax.Array:
        return mixed(inputs, routing, model.experts[number].weights(), body)

    held = [None] * model.config.num_layers
    hidden, routings, _ = through(
        model.config, model.layers, Between(model.embed(tokens)), positions, held, experts, add_mixed
    )
    return model.logits(hidden), routings


def add_mixed(state: Between) -> jax.Array:
    """Adds the outputs [T, D] of a layer's experts, if there are any yet."""
    return state.hidden if state.outputs is None else state.hidden + state.outputs.reshape(state.hidden.shape)


def mixed(x: jax.Array, routing: Routing, weights: object, body: ExpertBody) -> jax.Array:
    """Weighted sum [T, D] of the chosen experts' outputs for `x` [T, D], from three products.

    Args:
        x: [T, D].
        routing: of the T tokens.
        weights: stacks with a leading axis E, `ExpertWeights` or `BiasedWeights`.
        body: of the experts.
    """
    gate, up, down = weights.gate, weights.up, weights.down  # type: ignore[attr-defined]
    experts, inner, width = gate.shape
    tokens = len(x)
    rows = jnp.arange(tokens)[:, None]
    shares = jnp.zeros((tokens, experts), x.dtype).at[rows, routing.experts].add(routing.weights)
    gates = products_of_rows(x, gate.reshape(-1, width))  # [T, E * F]
    ups = products_of_rows(x, up.reshape(-1, width))
    if isinstance(weights, BiasedWeights):
        gates = gates + weights.bias[:, :inner].reshape(1, -1)
        ups = ups + weights.bias[:, inner:-width].reshape(1, -1)
    hidden = body.gated(gates, ups).reshape(tokens, experts, inner) * shares[..., None]
    total = hidden.reshape(tokens, -1) @ down.swapaxes(1, 2).reshape(-1, width)
    return total + shares @ weights.bias[:, -width:] if isinstance(weights, BiasedWeights) else total
