"""What a model must beat to have learned anything: unigram and bigram models of the same training tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Bigram:
    """Unigram and interpolated Kneser-Ney bigram probabilities, discount 0.75.

    p(b | a) = max(c(a, b) - d, 0) / c(a) + d |{b: c(a, b) > 0}| / c(a) * p_continuation(b), where
    p_continuation(b) is proportional to the number of different tokens seen before b, plus one half.

    Args:
        documents: arrays of token ids.
        vocab_size: V; counts take 4 V^2 bytes.

    >>> bigram = Bigram([np.array([0, 1, 0, 1, 0, 2])], vocab_size=3)
    >>> bool(bigram.loss(np.array([0, 1]))[1] < bigram.loss(np.array([0, 2]))[1])
    True
    """

    DISCOUNT = 0.75

    def __init__(self, documents: Iterable[np.ndarray], vocab_size: int):
        pairs = np.zeros(vocab_size * vocab_size, np.int32)
        for tokens in documents:
            wide = np.asarray(tokens, np.int64)
            pairs += np.bincount(wide[:-1] * vocab_size + wide[1:], minlength=len(pairs)).astype(np.int32)
        self.pairs = pairs.reshape(vocab_size, vocab_size)
        seen = self.pairs.sum(0) + 0.5
        self.unigram = seen / seen.sum()
        before = (self.pairs > 0).sum(0) + 0.5
        self.continuation = before / before.sum()
        self.followers = (self.pairs > 0).sum(1)
        self.total = self.pairs.sum(1)

    def log_probabilities(self) -> np.ndarray:
        """The logarithms of all p(b | a), [V, V]."""
        total = np.maximum(self.total, 1)[:, None]
        left = np.where(self.total > 0, self.DISCOUNT * self.followers / np.maximum(self.total, 1), 1.0)
        return np.log(np.maximum(self.pairs - self.DISCOUNT, 0) / total + left[:, None] * self.continuation)

    def loss(self, tokens: np.ndarray) -> tuple[float, float]:
        """Mean nats per token after the first, by the unigram and by the bigram model."""
        first, second = np.asarray(tokens[:-1], np.int64), np.asarray(tokens[1:], np.int64)
        total = np.maximum(self.total[first], 1)
        direct = np.maximum(self.pairs[first, second] - self.DISCOUNT, 0) / total
        left = np.where(self.total[first] > 0, self.DISCOUNT * self.followers[first] / total, 1.0)
        bigram = direct + left * self.continuation[second]
        return float(-np.log(self.unigram[second]).mean()), float(-np.log(bigram).mean())
