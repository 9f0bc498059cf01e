"""Weighs the routers' forecast before training: how sure it is differs by model, layer and distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from predictor.network import router_margin
from predictor.routers import Prior
from predictor.step import Batch, Params, Stack, targets

ROWS = 2048
"""Training rows that the weights are fitted to: two numbers each do not need more."""

STEPS = 30
"""Steps of the fit; a dozen are enough from most starts."""

FIRST_WEIGHT, RIDGE = 2.0, 1e-5
"""Weight where a router's forecast says nothing (past the last layer), and the pull towards it."""


def calibrated(
    params: Params, stacked: Mapping[str, Stack], prior: Mapping[str, Prior], rows: Batch
) -> Params:
    """Returns initial parameters whose forecast is that of the routers, as probabilities.

    Networks begin with outputs near zero (`LayerNetwork`). From a weight of 2, Adam would take thousands of
    steps to the 10 to 20 that routers with small logits need, and until then the networks' corrections would
    outweigh the routers where these know best, one layer ahead.

    Args:
        params: initial parameters.
        stacked: groups of layers.
        prior: the routers' forecast, by group.
        rows: training rows.
    """
    started = dict(params)
    for name, stack in stacked.items():
        look_ahead, experts = params[name]["gain"].shape[1:]
        truth, known = targets(rows, look_ahead, experts)
        parts = weights_and_biases(prior[name], rows, stack.layers, truth, known)
        weight, bias = (jnp.repeat(part[..., None], experts, -1) for part in parts)
        output = {**params[name]["output"], "bias": bias.reshape(len(bias), -1)}
        started[name] = {**params[name], "gain": weight, "output": output}
    return started


def weights_and_biases(
    prior: Prior, rows: Batch, layers: Sequence[int], truth: jax.Array, known: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns [L, H] weights and biases: the logistic regressions of choices on `router_margin`.

    Args:
        prior: the routers' forecast of H later layers, in `layers`.
        rows: B rows.
        layers: the L layers.
        truth, known: choices [all layers, B, H, E] of these later layers, and [all layers, B, H] whether
            they are known; see `targets`.
    """
    pairs = [
        weight_and_bias(
            jax.tree.map(lambda part, i=index: part[i], prior),
            rows.hidden[:, layer, : prior.matrix.shape[1]],
            rows.experts[:, layer],
            truth[layer],
            known[layer],
        )
        for index, layer in enumerate(layers)
    ]
    weights, biases = zip(*pairs, strict=True)
    return jnp.stack(weights), jnp.stack(biases)


@jax.jit
def weight_and_bias(
    prior: Prior, hidden: jax.Array, experts: jax.Array, truth: jax.Array, known: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns [H] weights and biases of one layer, by damped Newton steps; see `weights_and_biases`."""
    margin = router_margin(prior.logits(hidden.astype(jnp.float32)), experts.shape[-1])
    counted = known[..., None].astype(jnp.float32)
    total = jnp.maximum(counted.sum((0, 2)) * margin.shape[-1], 1.0)

    def mean(values: jax.Array) -> jax.Array:
        return (values * counted).sum((0, 2)) / total

    # In units of the margins' own size, so that steps are alike for all models.
    unit = jnp.sqrt(mean(margin * margin)) + 1e-9
    margin = margin / unit[None, :, None]
    middle = FIRST_WEIGHT * unit

    def logits_of(pair: jax.Array) -> jax.Array:
        return pair[0][None, :, None] * margin + pair[1][None, :, None]

    def loss(pair: jax.Array) -> jax.Array:
        logits = logits_of(pair)
        return mean(jax.nn.softplus(logits) - truth * logits) + 0.5 * RIDGE * (pair[0] - middle) ** 2

    def step(_: int, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        pair, least, damping = found
        chance = jax.nn.sigmoid(logits_of(pair))
        missed, curve = chance - truth, chance * (1.0 - chance)
        slope = jnp.stack([mean(missed * margin) + RIDGE * (pair[0] - middle), mean(missed)])
        across = mean(curve * margin)
        first, second = mean(curve * margin * margin) + RIDGE + damping, mean(curve) + damping
        scale = first * second - across * across
        moved = jnp.stack([second * slope[0] - across * slope[1], first * slope[1] - across * slope[0]])
        new = pair - moved / scale[None]
        reached = loss(new)
        better = reached < least
        damping = jnp.where(better, damping / 4.0, damping * 8.0)
        return jnp.where(better[None], new, pair), jnp.minimum(reached, least), damping

    start = jnp.stack([middle, jnp.full_like(middle, -1.0)])
    pair, *_ = jax.lax.fori_loop(0, STEPS, step, (start, loss(start), jnp.full_like(middle, 1e-3)))
    return pair[0] / unit, pair[1]
