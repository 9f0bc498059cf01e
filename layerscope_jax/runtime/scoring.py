"""Log-probabilities of given tokens, from the hidden states of a whole step, a block of tokens at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layerscope_jax.models.decoder import Decoder

BLOCK = 64
"""Tokens whose logits are in memory at once. Always as many, so that sums over the vocabulary are the same
whatever the shape of the step."""


class Scores(NamedTuple):
    """Log-probabilities after each token of a step; they mean nothing at padding."""

    logprobs: jax.Array  # [B, S] float32, of the target
    top_ids: jax.Array  # [B, S, N] int32, likeliest first
    top_logprobs: jax.Array  # [B, S, N] float32


def scores_of(decoder: Decoder, hidden: jax.Array, targets: jax.Array, top: int) -> Scores:
    """Scores a token after each position.

    Args:
        decoder: norm and head of a model.
        hidden: [B, S, D] after the last layer.
        targets: [B, S] int32.
        top: number N of the likeliest tokens to report.
    """
    (rows, length, width), count = hidden.shape, targets.size
    padding = -count % BLOCK
    # Behind a barrier nothing of this is computed together with the step's own logits.
    flat = jax.lax.optimization_barrier(hidden).reshape(count, width)
    blocks = jnp.pad(flat, ((0, padding), (0, 0))).reshape(-1, BLOCK, width)
    wanted = jnp.pad(targets.reshape(count), (0, padding)).reshape(-1, BLOCK)

    def block(inputs: tuple[jax.Array, jax.Array]) -> Scores:
        states, follows = inputs
        logprobs = jax.nn.log_softmax(decoder.logits(states), axis=-1)  # [BLOCK, V]
        most, ids = jax.lax.top_k(logprobs, min(top, logprobs.shape[-1]))
        own = jnp.take_along_axis(logprobs, follows[:, None], axis=-1)[:, 0]
        return Scores(own, ids, most)

    scores = jax.lax.map(block, (blocks, wanted))
    total = count + padding
    return jax.tree.map(
        lambda x: x.reshape(total, *x.shape[2:])[:count].reshape(rows, length, *x.shape[2:]), scores
    )
