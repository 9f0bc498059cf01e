"""Inside a JAX pipeline: hidden states out of a jitted function, and a sampling loop of one's own.

    python examples/jax_pipeline.py [checkpoint]

`Model.whole` is a Flax NNX decoder with every expert on the device: it goes into `jit` and `grad` like any
other. Where the experts do not fit, `Engine.runner` runs a step at a time within a budget, and gives logits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import layerscope_jax as ls
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.rotary import PAD_POSITION

TEXTS = ["Call me Ishmael.", "It was the best of times, it was the worst of times.", "def main():"]


@nnx.jit
def mean_hidden(decoder: ls.Decoder, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns each row's mean hidden state after the last layer: [B, S] ids -> [B, D] float32."""
    hidden, _, _ = decoder.run(decoder.embed(tokens), positions, None)
    real = (positions != PAD_POSITION)[..., None].astype(jnp.float32)
    return (hidden.astype(jnp.float32) * real).sum(1) / real.sum(1)


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of ids as one array, and their positions: [B, S] each."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    positions = np.full(tokens.shape, PAD_POSITION, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], positions[row, : len(ids)] = ids, np.arange(len(ids))
    return tokens, positions


@jax.jit
def pick(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Samples the colder, the less sure the model is: [B, V] -> [B]."""
    entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1, keepdims=True)
    return jax.random.categorical(key, logits * (1.0 + entropy)).astype(jnp.int32)


def sampled(engine: ls.Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> np.ndarray:
    """Returns new tokens [B, N], picked by `pick`, while the engine decides where experts are."""
    step, model = partial(engine.runner.step, sampling=None), engine.model
    tokens, positions = padded(prompts)
    ends = np.array([len(ids) for ids in prompts], np.int32)
    length = tokens.shape[1] + new_tokens
    caches = new_caches(model.config, len(prompts), length, model.bank.dtype, model.device)
    found, last = [], ends - 1
    for number, key in enumerate(jax.random.split(jax.random.key(0), new_tokens)):
        _, logits, caches = step(tokens, positions, last, caches)
        found.append(np.asarray(pick(key, logits)))
        tokens, positions = found[-1][:, None], (ends + number)[:, None]
        last = np.zeros_like(ends)
    return np.stack(found, 1)


def main(checkpoint: str = "shipped") -> None:
    """Compares texts by their hidden states, then continues them within half of the experts' bytes."""
    model = ls.load(checkpoint)
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(text).ids for text in TEXTS]

    vectors = mean_hidden(model.whole(), *map(jnp.asarray, padded(prompts)))
    vectors /= jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    print("cosines of the texts' mean hidden states:")
    print(np.round(np.asarray(vectors @ vectors.T), 3))

    config = ls.OffloadConfig(device_budget=model.bank.total_bytes // 2, policy="lru")
    with ls.Engine(model, config) as engine:
        for text, ids in zip(TEXTS, sampled(engine, prompts, 8), strict=True):
            print(f"{text} | {model.tokenizer.decode(ids.tolist())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
