"""Choosing tokens by settings that few requests have: penalties, biases, log-probabilities.

A step returns its logits. Where a request of the batch has such settings, this program picks from them anew,
so that no step needs another program for them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layerscope_jax.runtime.sampling import NO_TOKEN, Sampling, sample


class Changes(NamedTuple):
    """How the logits of each row of a batch are changed before a token is picked by them."""

    repetition: jax.Array  # [B] float32, 1 for none
    presence: jax.Array  # [B] float32, 0 for none
    frequency: jax.Array  # [B] float32, 0 for none
    first_end: jax.Array  # [B] int32, position from which on tokens of `ends` may be chosen
    ends: jax.Array  # [B, V] bool, tokens that end the request
    bias: jax.Array  # [B, V] float32
    in_prompt: jax.Array  # [B, V] bool


class Chosen(NamedTuple):
    """What was chosen for each row of a batch."""

    tokens: jax.Array  # [B] int32
    counts: jax.Array | None  # [B, V] int32, with the new tokens
    logprob: jax.Array | None  # [B] float32, of each token
    top_ids: jax.Array | None  # [B, N] int32, likeliest first
    top_logprobs: jax.Array | None  # [B, N] float32


@functools.partial(jax.jit, static_argnames="top", donate_argnames="counts")
def choose(
    logits: jax.Array,
    found: jax.Array,
    positions: jax.Array,
    sampling: Sampling | None,
    changes: Changes | None,
    counts: jax.Array | None,
    top: int | None,
    allowed: jax.Array | None = None,
) -> Chosen:
    """Picks one token a row after the row's logits were changed, and reports log-probabilities.

    Args:
        logits: [B, V] float32.
        found: [B] int32 that the step picked: rows with `NO_TOKEN` keep it.
        positions: [B] int32 position the token will have in its sequence.
        sampling: None if every row is greedy.
        changes: None if no row has any.
        counts: [B, V] int32, how often each token is among the row's new ones; None without `changes`;
            donated.
        top: number N of the likeliest tokens to report, by the logits as they are; None for no
            log-probabilities.
        allowed: [B, V / 32] int32, a bit for each token that may be chosen; None if all may.
    """
    used = logits if changes is None or counts is None else changed(logits, positions, changes, counts)
    if allowed is not None:
        ids = jnp.arange(logits.shape[-1])
        used = jnp.where((allowed[:, ids // 32] >> (ids % 32)[None]) & 1 == 1, used, -jnp.inf)
    tokens = jnp.where(found == NO_TOKEN, NO_TOKEN, sample(used, positions, sampling))
    rows, vocabulary = jnp.arange(logits.shape[0]), logits.shape[-1]
    if counts is not None:
        counts = counts.at[rows, jnp.where(tokens == NO_TOKEN, vocabulary, tokens)].add(1, mode="drop")
    if top is None:
        return Chosen(tokens, counts, None, None, None)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, min(top, vocabulary))
    return Chosen(tokens, counts, logprobs[rows, tokens], top_ids, top_logprobs)


def changed(logits: jax.Array, positions: jax.Array, changes: Changes, counts: jax.Array) -> jax.Array:
    """Returns the logits that a batch's rows are picked by: [B, V] float32.

    The bias is added; the repetition penalty divides what is positive and multiplies what is negative
    (Keskar et al., 2019, as in transformers and vLLM); the other penalties are subtracted (as in OpenAI's
    API); tokens that end the request are excluded where it is too early.
    """
    logits = logits + changes.bias
    repeated = jnp.where(changes.in_prompt | (counts > 0), changes.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repeated, logits * repeated)
    logits = logits - changes.frequency[:, None] * counts.astype(jnp.float32)
    logits = logits - changes.presence[:, None] * (counts > 0).astype(jnp.float32)
    early = (positions < changes.first_end)[:, None]
    return jnp.where(early & changes.ends, -jnp.inf, logits)
