"""A runner made of arithmetic: a token is a function of all that its row has cached.

So a row that was mixed up with another, or not filled again, says something else.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.generation.limits import Limits
from layerscope_jax.generation.loop import Loop
from layerscope_jax.generation.structured import Structures
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.runner import RunnerStats
from layerscope_jax.runtime.sampling import sample
from layerscope_jax.runtime.scoring import Scores
from layerscope_jax.runtime.turns import Turns

WORDS, CONTEXT = 101, 96


def next_token(tokens):
    return sum((place + 3) * (token + 1) for place, token in enumerate(tokens)) % WORDS


def alone(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Held(NamedTuple):
    """A cache of tokens."""

    tokens: jax.Array  # [B, P]

    @staticmethod
    def position_axes():
        return (1,)


class Arithmetic:
    """A runner whose caches hold the tokens themselves."""

    mode = "arithmetic"
    score = None  # there are no logits

    def __init__(self):
        self.account, self.steps, self.shapes, self.fails = Account(), 0, [], 0

    def reset(self, account):
        self.account = account or Account()

    def stats(self, account):
        return RunnerStats(
            policy="none", mode=self.mode, format="none", dense_kernels={}, peak_expert_bytes=0
        )

    def step(self, tokens, positions, last, caches, sampling):
        self.steps += 1
        self.shapes.append((*tokens.shape, caches[0].tokens.shape[1]))
        cache = np.array(caches[0].tokens)
        caches[0].tokens.delete()  # as what is donated
        if self.fails:
            self.fails -= 1
            raise OSError("injected")
        found = np.zeros(len(tokens), np.int32)
        for row, places in enumerate(positions):
            for token, place in zip(tokens[row], places, strict=True):
                if place != PAD_POSITION:
                    cache[row, place] = token
            if places[last[row]] != PAD_POSITION:
                found[row] = next_token(cache[row, : places[last[row]] + 1].tolist())
        return found, None, [Held(jnp.asarray(cache))]


class Scoring(Arithmetic):
    """As that, with logits, whose largest is the token."""

    def step(self, tokens, positions, last, caches, sampling):
        _, _, caches = super().step(tokens, positions, last, caches, sampling)
        logits, cache = np.zeros((len(tokens), WORDS), np.float32), np.asarray(caches[0].tokens)
        for row, place in enumerate(positions[np.arange(len(tokens)), last]):
            if place != PAD_POSITION:
                logits[row] = scores(cache[row, : place + 1].tolist())
        logits = jnp.asarray(logits)
        return jitted(logits, positions[np.arange(len(tokens)), last] + 1, sampling), logits, caches

    def score(self, tokens, positions, last, caches, sampling, targets, top):
        stepped = self.step(tokens, positions, last, caches, sampling)
        cache = np.asarray(stepped[2][0].tokens)
        logprobs = np.full((*tokens.shape, WORDS), np.nan, np.float32)
        for row, column in np.argwhere(positions != PAD_POSITION):
            logits = scores(cache[row, : positions[row, column] + 1].tolist())
            logprobs[row, column] = logits - np.log(np.exp(logits).sum())
        ids = np.argsort(-logprobs, axis=-1)[..., :top]
        own = np.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        return stepped, Scores(own, ids, np.take_along_axis(logprobs, ids, axis=-1))


jitted = jax.jit(sample)


def scores(tokens):
    """The logits that follow tokens."""
    total = sum((place + 3) * (token + 1) for place, token in enumerate(tokens))
    return np.random.default_rng(total).standard_normal(WORDS).astype(np.float32) * 2


def looped(
    max_num_seqs=3,
    chunk=32,
    closed=(),
    runner=None,
    tokenizer=None,
    stop_token_ids=(WORDS,),
    vocab_size=WORDS,
    prefix_cache=False,
):
    """A loop over such a runner; the runner."""
    config = SimpleNamespace(max_position_embeddings=CONTEXT, stop_token_ids=stop_token_ids)
    runner = runner or Arithmetic()
    made = Loop(
        SimpleNamespace(config=config, tokenizer=tokenizer),
        runner,
        Turns(),
        lambda: bool(closed),
        lambda rows, length: [Held(jnp.zeros((rows, length), jnp.int32))],
        Limits(max_num_seqs, chunk, prefix_cache),
        0,
        Structures(tokenizer, vocab_size, stop_token_ids),
    )
    return made, runner
