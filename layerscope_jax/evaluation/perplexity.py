"""Perplexity of texts: windows that slide over a text, and what their tokens' log-probabilities come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.checkpoints.tokenizer_settings import TokenizerSettings
from layerscope_jax.engine import Engine
from layerscope_jax.evaluation.scoring import most_tokens, score

CONTEXT = 2048
"""Most tokens that a window reads, unless told otherwise."""

TOGETHER = 64
"""Neighbouring tokens that the standard error takes as one sample, because they are not independent."""

AT_ONCE = 64
"""Windows that are scored before their log-probabilities are kept as numbers alone."""


class Window(NamedTuple):
    """Tokens that a window reads, and those of them that it scores, as places in a sequence."""

    start: int
    scored: int
    end: int


def windows(length: int, context: int, stride: int) -> list[Window]:
    """Returns the windows over a sequence, which score each of its tokens but the first once.

    A window reads at most `context` tokens and predicts the token after each. The first window scores all of
    these, every later one only the last `stride`, which have at least `context - stride` tokens before them.

    Args:
        length: number of tokens, a prefix included.
        context: most tokens before the last one of a window.
        stride: number of tokens that a window scores, but for the first one.

    >>> windows(length=8, context=4, stride=2)
    [Window(start=0, scored=1, end=5), Window(start=2, scored=5, end=7), Window(start=3, scored=7, end=8)]
    """
    found: list[Window] = []
    scored = 1
    while scored < length:
        end = min(length, scored + (stride if found else context))
        found.append(Window(max(0, end - 1 - context), scored, end))
        scored = end
    return found


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        tokens: number of tokens, each of which is scored once.
        bytes: size of the text in UTF-8.
        nats: mean negative log-probability of a token, in nats.
        nats_error: standard error of that mean, from sums over blocks of 64 neighbouring tokens; None for
            texts of less than two blocks.
    """

    tokens: int
    bytes: int
    nats: float
    nats_error: float | None

    @classmethod
    def of(cls, logprobs: Sequence[np.ndarray], size: int) -> Perplexity:
        """Returns the perplexity of texts, from the log-probabilities of each one's tokens.

        >>> found = Perplexity.of([np.full(200, -math.log(2.0))], size=100)
        >>> round(found.perplexity, 6), round(found.bits_per_byte, 6), round(found.nats_error, 6)
        (2.0, 2.0, 0.0)
        """
        count = sum(map(len, logprobs))
        nats = -float(sum([each.sum() for each in logprobs])) / count
        ends = [
            each[first : first + TOGETHER] for each in logprobs for first in range(0, len(each), TOGETHER)
        ]
        error = None
        if len(ends) > 1 and count >= 2 * TOGETHER:
            excess = np.array([float(-block.sum()) - nats * len(block) for block in ends])
            variance = float((excess**2).sum()) * len(ends) / (len(ends) - 1)
            error = math.sqrt(variance) / count
        return cls(count, size, nats, error)

    @property
    def perplexity(self) -> float:
        """The exponential of `nats`."""
        return math.exp(self.nats)

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of `perplexity`, to first order."""
        return None if self.nats_error is None else self.perplexity * self.nats_error

    @property
    def bits_per_byte(self) -> float:
        """Bits of all tokens over bytes of the text: compares models that have different tokenizers."""
        return self._bits(self.nats)

    @property
    def bits_per_byte_error(self) -> float | None:
        """Standard error of `bits_per_byte`."""
        return None if self.nats_error is None else self._bits(self.nats_error)

    def _bits(self, nats: float) -> float:
        return nats * self.tokens / math.log(2) / self.bytes


def prefix_token(model: Model) -> int:
    """Returns the token to put before a text, so that the first token of the text can be scored too.

    It is the token that begins texts, or else one that ends them.

    Raises:
        ValueError: if the checkpoint names neither.
    """
    if model.path is not None and model.tokenizer is not None:
        settings = TokenizerSettings.read(model.path)
        for role in ("bos_token", "eos_token"):
            text = settings.text(role)
            token = None if text is None else model.tokenizer.token_to_id(text)
            if token is not None:
                return token
    if model.config.stop_token_ids:
        return model.config.stop_token_ids[0]
    raise ValueError(
        "expected the checkpoint to name a token that begins or ends a text, because one is put before each "
        "text, got none; name a bos_token or an eos_token in tokenizer_config.json"
    )


def token_logprobs(
    engine: Engine,
    tokens: Sequence[int],
    *,
    prefix: int,
    context: int,
    stride: int,
    advance: Callable[[int], object] = lambda tokens: None,
) -> np.ndarray:
    """Returns the log-probability of each token of a text: [T] float64.

    Args:
        engine: scores them.
        tokens: token ids of the text.
        prefix: token that is put before the text.
        context, stride: as of `windows`.
        advance: as of `score`.

    Raises:
        ValueError: if a window does not fit into the model's context.
    """
    most = most_tokens(engine) - 1
    if not 1 <= stride <= context <= most:
        raise ValueError(
            f"stride and context must be 1 or more, stride at most context and context at most {most}, got "
            f"stride={stride} and context={context}"
        )
    sequence = [prefix, *tokens]
    spans, found = windows(len(sequence), context, stride), []
    for first in range(0, len(spans), AT_ONCE):
        pairs = [
            (sequence[span.start : span.scored], sequence[span.scored : span.end])
            for span in spans[first : first + AT_ONCE]
        ]
        found += [np.array(scored.logprobs) for scored in score(engine, pairs, advance)]
    return np.concatenate([np.zeros(0), *found])


def tokens_read(count: int, context: int, stride: int) -> int:
    """Returns how many tokens the windows over a text of `count` tokens read; some are read by several.

    >>> tokens_read(7, context=4, stride=2)
    15
    """
    return sum(span.end - span.start for span in windows(count + 1, context, stride))


def default_context(model: Model) -> int:
    """Returns the default number of tokens that a window reads."""
    return min(CONTEXT, model.config.max_position_embeddings - 2)
