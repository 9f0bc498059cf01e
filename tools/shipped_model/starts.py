"""How a small likeness of a published model begins: as a bigram model, with layers that add little yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tools.shipped_model.baselines import Bigram

SCALE = 0.5
"""Root mean square of an average embedding."""


def started(
    params: dict[str, Any], documents: Iterable[np.ndarray], layers: int, seed: int
) -> dict[str, Any]:
    """Initial parameters of a decoder: random layers, and the embeddings and head of a bigram model.

    A million tokens are few to learn from nothing which token follows which. That is given, as well as 64
    numbers a token can hold it; what is trained is what the layers make of more than one token.

    Args:
        params: of a decoder with a head of its own, a pure dict; vectors stay as they are.
        documents: token arrays that the bigram model is of.
        layers: L; what is added to the residual stream is smaller by the square root of 2 L.
        seed: of the random matrices.
    """
    random, flat = np.random.default_rng(seed), flatten_dict(params)
    for key, array in flat.items():
        if array.ndim > 1:
            scale = array.shape[-1] ** -0.5
            scale /= (2 * layers) ** 0.5 if "o" in key or "down" in key else 1.0
            scale *= 0.2 if "router" in key else 1.0
            flat[key] = jnp.asarray(scale * random.standard_normal(array.shape), array.dtype)
    vocab_size, width = flat["embedding",].shape
    ends = bigram_ends(Bigram(documents, vocab_size), width)
    flat["embedding",], flat["head",] = (jnp.asarray(end, jnp.float32) for end in ends)
    return unflatten_dict(flat)


def bigram_ends(bigram: Bigram, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and head [V, D] whose products, with embeddings normalised, are near a bigram model's logits.

    They are the best of that rank where pairs are weighed by their tokens' frequencies.

    >>> text = np.arange(300) % 7
    >>> embedding, head = bigram_ends(Bigram([text], 8), 7)
    >>> scaled = embedding / np.sqrt((embedding**2).mean(1, keepdims=True))
    >>> (scaled @ head.T).argmax(1)[:7].tolist()
    [1, 2, 3, 4, 5, 6, 0]
    """
    logits = bigram.log_probabilities()
    logits -= logits.mean(1, keepdims=True)
    weight = np.sqrt(bigram.unigram)
    rank = min(width, len(logits) - 1)
    # All of them, half a minute for 4,096 tokens: an iterative method starts anew from random vectors where
    # values are equal, and two runs would train two models.
    left, values, right = np.linalg.svd(weight[:, None] * logits * weight[None])
    roots = np.sqrt(values[:rank])
    embedding, head = np.zeros((2, len(logits), width))
    embedding[:, :rank] = left[:, :rank] * roots / weight[:, None]
    head[:, :rank] = right[:rank].T * roots / weight[:, None]
    size = float((np.sqrt((embedding**2).mean(1)) * bigram.unigram).sum())
    return embedding * SCALE / size, head * size
