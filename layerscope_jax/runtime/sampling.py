"""From logits to tokens. A request's randomness is its own: a function of its seed and the position."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layerscope_jax.support.jax_settings import PRNG

NO_TOKEN = -1
"""Stands for the token of a row whose logits are no numbers to choose by."""


class Sampling(NamedTuple):
    """How each row of a batch picks its tokens."""

    seed: jax.Array  # [B] uint32
    temperature: jax.Array  # [B] float32, 0 for greedy
    top_k: jax.Array  # [B] int32, 0 for all
    top_p: jax.Array  # [B] float32, 1 for all
    min_p: jax.Array | None = None  # [B] float32, 0 for all; None if every row has 0


def sample(logits: jax.Array, positions: jax.Array, sampling: Sampling | None) -> jax.Array:
    """Picks one token a row.

    Temperature, then the `top_k` likeliest, then the fewest of them whose probability reaches `top_p`, then
    those at least `min_p` times as likely as the likeliest; one is drawn by adding Gumbel noise, keyed by
    (seed, position) and laid out by token, to each log-probability. What shares the batch has no part in it.

    Args:
        logits: [B, V] float32.
        positions: [B] int32 position the token will have in its sequence.
        sampling: None if every row is greedy: skips the sort.

    Returns:
        [B] int32; the likeliest token where the temperature is 0, the lowest id among equals. `NO_TOKEN`
        where a row's largest logit is not finite: where there is NaN or plus infinity, or nothing else than
        minus infinity.

    >>> logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    >>> sample(logits, jnp.array([4]), None)
    Array([0], dtype=int32)
    >>> row = Sampling(jnp.array([7], jnp.uint32), jnp.ones(1), jnp.array([1]), jnp.ones(1))
    >>> sample(logits, jnp.array([4]), row)  # only the likeliest is left
    Array([0], dtype=int32)
    """
    # Behind a barrier this is not fused with what made the logits, whose bits must not change by it.
    best = jax.lax.optimization_barrier(logits).max(axis=-1)  # NaN where there is one
    return jnp.where(jnp.isfinite(best), _pick(logits, positions, sampling), NO_TOKEN)


def _pick(logits: jax.Array, positions: jax.Array, sampling: Sampling | None) -> jax.Array:
    """As `sample`, where there are numbers to choose by."""
    greedy = jax.lax.top_k(logits, 1)[1][:, 0]  # as `argmax`, which takes up to four times as long on CPUs
    if sampling is None:
        return greedy

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        # What `jax.random.key(seed)` is, but for settings that choose another kind of keys or add to seeds.
        key = jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(seed), seed]), impl=PRNG)
        return jax.random.gumbel(
            jax.random.fold_in(key, position), logits.shape[-1:], jnp.float32, mode="low"
        )

    drawn, vocabulary = jax.vmap(noise)(sampling.seed, positions), logits.shape[-1]

    def by_token() -> jax.Array:
        scores = heated(logits, sampling)
        if sampling.min_p is not None:
            scores = jnp.where(scores >= jnp.log(sampling.min_p)[:, None], scores, -jnp.inf)
        return jnp.argmax(scores + drawn, axis=-1).astype(jnp.int32)

    def by_rank() -> jax.Array:
        ranked, token = ranked_scores(logits, sampling)
        best = jnp.argmax(ranked + jnp.take_along_axis(drawn, token, axis=-1), axis=-1, keepdims=True)
        return jnp.take_along_axis(token, best, axis=-1)[:, 0].astype(jnp.int32)

    # Sorting the vocabulary takes most of the time, on CPUs above all; both ways compare the same sums.
    whole = ((sampling.top_k <= 0) | (sampling.top_k >= vocabulary)) & (sampling.top_p >= 1)
    sorts_nothing = jnp.all(whole | (sampling.temperature <= 0))
    return jnp.where(sampling.temperature > 0, jax.lax.cond(sorts_nothing, by_token, by_rank), greedy)


def heated(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns unnormalised log-probabilities [B, V] at each row's temperature; temperature 0 counts as 1."""
    warmth = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    # Counted from the largest, so that near temperature 0 the others overflow to minus infinity, not all.
    return (logits - logits.max(axis=-1, keepdims=True)) / warmth[:, None]


def ranked_scores(logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Returns unnormalised log-probabilities, minus infinity for what is not sampled from, and their tokens.

    Both are [B, V], likeliest first.
    """
    ranked, token = jax.lax.top_k(heated(logits, sampling), logits.shape[-1])  # [B, V] likeliest first
    rank = jnp.arange(logits.shape[-1])[None]
    limit = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    ranked = jnp.where(rank < limit[:, None], ranked, -jnp.inf)
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    top_p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)  # the sum may be rounded to 1 too early
    ranked = jnp.where((before < top_p[:, None]) | (rank == 0), ranked, -jnp.inf)
    if sampling.min_p is not None:
        ranked = jnp.where(ranked >= jnp.log(sampling.min_p)[:, None], ranked, -jnp.inf)
    return ranked, token
