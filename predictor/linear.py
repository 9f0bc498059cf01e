"""Linear map of LLaPor's inputs: the baseline that a network has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.support.jax_settings import with_promotion
from predictor.calibration import ROWS, weights_and_biases
from predictor.dataset import Rows
from predictor.network import router_margin, spread
from predictor.pca import Basis
from predictor.routers import Prior, Routers
from predictor.step import Batch, input_scale, loss, targets
from predictor.train import bar, batch_of

EPOCHS, BATCH, LEARNING_RATE = 4, 512, 3e-2


@dataclass(frozen=True)
class LinearParams:
    """Parameters of all layers, or of one layer without the first axis; a pytree.

    Attributes:
        weight: [L, P + E, H, E] weights of the scaled hidden state and the chosen experts.
        bias: [L, H, E].
        gain: [L, H, E] weight of the routers' forecast.
        prior: the routers' forecast; not learned.
        scale: [L] scale of the hidden state; not learned.
    """

    weight: Any
    bias: Any
    gain: Any
    prior: Prior
    scale: Any


jax.tree_util.register_dataclass(LinearParams)


def linear_logits(
    params: LinearParams, hidden: jax.Array, experts: jax.Array, weights: jax.Array
) -> jax.Array:
    """Returns a layer's logits [T, H, E] from reduced hidden states [T, P] and router choices [T, K]."""
    hidden = hidden.astype(jnp.float32)
    chosen = spread(experts, weights, params.weight.shape[-1])
    inputs = jnp.concatenate([hidden * params.scale, chosen], -1)
    logits = jnp.einsum("ti,ihe->the", inputs, params.weight) + params.bias[None]
    return logits + params.gain[None] * router_margin(params.prior.logits(hidden), experts.shape[-1])


def first_linear(
    model: ModelIdentity, basis: Basis, routers: Routers, horizons: tuple[int, ...], share: np.ndarray
) -> LinearParams:
    """Returns initial parameters: the experts' popularity, and the routers' forecast, which `fit` weighs.

    Args:
        share: [L, E] share of the training rows that choose each expert.
    """
    layers, experts = model.num_layers, model.num_experts
    popular = share[(np.arange(layers)[:, None] + np.array(horizons)[None]) % layers].clip(1e-3, 1 - 1e-3)
    return LinearParams(
        weight=np.zeros((layers, basis.width + experts, len(horizons), experts), np.float32),
        bias=np.log(popular / (1 - popular)).astype(np.float32),
        gain=np.full((layers, len(horizons), experts), 2.0, np.float32),
        prior=routers.prior(basis, range(layers), horizons, basis.width),
        scale=input_scale(basis),
    )


def fit(
    params: LinearParams,
    rows: Rows,
    horizons: tuple[int, ...],
    *,
    progress: bool = True,
) -> LinearParams:
    """Trains all layers at once with LLaPor's loss, rows and weight of the routers' forecast to begin with.

    The rate falls as a cosine; the loss is convex.

    Args:
        params: initial parameters, from `first_linear`.
        rows: rows to train on.
        horizons: layers ahead that are forecast.
        progress: whether to show a progress bar.
    """
    learned = {name: jnp.asarray(getattr(params, name)) for name in ("weight", "bias", "gain")}
    fixed = jax.tree.map(jnp.asarray, {"prior": params.prior, "scale": params.scale})
    size = min(BATCH, len(rows))
    total = EPOCHS * (len(rows) // size)
    update = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, total, 0.01))
    picked = np.array(horizons) - 1
    num_experts = params.bias.shape[-1]
    first = batch_of(rows, np.arange(min(ROWS, len(rows))))
    truth, known = targets(first, max(horizons), num_experts)
    pairs = weights_and_biases(
        fixed["prior"], first, range(len(params.bias)), truth[:, :, picked], known[..., picked]
    )
    learned["gain"] = jnp.repeat(pairs[0][..., None], num_experts, -1)

    def objective(learned: dict[str, Any], batch: Batch) -> jax.Array:
        truth, known = targets(batch, max(horizons), num_experts)
        truth, known = truth[:, :, picked], known[..., picked].astype(jnp.float32)
        hidden, experts, weights = (
            jnp.swapaxes(part, 0, 1) for part in (batch.hidden, batch.experts, batch.weights)
        )
        logits = jax.vmap(linear_logits)(LinearParams(**learned, **fixed), hidden, experts, weights)
        each = loss(logits, truth, jnp.ones_like(logits), 0.0)
        return ((each * known).sum((1, 2)) / jnp.maximum(known.sum((1, 2)), 1)).sum()

    @jax.jit
    def step(learned: dict[str, jax.Array], state: optax.OptState, batch: Batch):
        value, grads = jax.value_and_grad(objective)(learned, batch)
        updates, state = update.update(grads, state, learned)
        return optax.apply_updates(learned, updates), state, value

    state, done = update.init(learned), 0
    with with_promotion(), bar(total, progress) as advance:
        advance(0, "linear map")
        for epoch in range(EPOCHS):
            order = np.random.default_rng(epoch).permutation(len(rows))
            for start in range(0, len(rows) - size + 1, size):
                batch = batch_of(rows, np.sort(order[start : start + size]))
                learned, state, value = step(learned, state, batch)
                done += 1
                if done % 10 == 0:
                    advance(done, f"linear map, loss {float(value) / len(params.scale):.3f}")
    arrays = {name: np.asarray(array) for name, array in learned.items()}
    return LinearParams(**arrays, prior=params.prior, scale=params.scale)
