"""Log-likelihoods of given tokens, by the prefill steps of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from layerscope_jax.engine import Engine
from layerscope_jax.generation.requests import Request
from layerscope_jax.generation.scheduler import MIN_WIDTH, bucket


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of tokens that follow others.

    Attributes:
        logprobs: natural logarithm of each token's probability.
        greedy: whether each token is the likeliest one at its place.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


def most_tokens(engine: Engine) -> int:
    """Returns how many tokens, contexts and continuations together, can be scored at once.

    One position of the model's context is left for the token that every request generates.
    """
    return engine.model.config.max_position_embeddings - 1


def score(
    engine: Engine,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Scored]:
    """Returns the log-probabilities of continuations of contexts.

    The tokens go through prefill steps as prompts do, so budget, policy and chunks are the engine's. Pairs of
    similar length share steps; the logits of a few tokens at a time are in memory.

    Args:
        engine: runs the steps.
        pairs: contexts, of a token at least, and continuations, as token ids.
        advance: called after each batch with its number of tokens.

    Raises:
        ValueError: if a context is empty, or a pair longer than `most_tokens`; if the model's logits are
            NaN or infinite.
    """
    most = most_tokens(engine)
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or len(context) + len(continuation) > most:
            raise ValueError(
                f"pair {index} must have a context of at least one token and, with its continuation, at most "
                f"{most}, got {len(context)} and {len(continuation)}; begin with a special token, or cut it"
            )
    found: list[Scored] = [Scored((), ())] * len(pairs)
    for batch in batches(engine, [len(context) + len(after) for context, after in pairs]):
        requests = [
            Request(
                prompt=[*pairs[index][0], *pairs[index][1]],
                max_new_tokens=1,
                prompt_logprobs=1,
                ignore_eos=True,
            )
            for index in batch
        ]
        for index, completion in zip(batch, engine.generate(requests), strict=True):
            if completion.prompt_logprobs is None:
                raise ValueError(completion.error or "the request was cancelled")
            tokens = pairs[index][1]
            told = completion.prompt_logprobs[len(pairs[index][0]) :]
            pairs_of = [(token, at) for token, at in zip(tokens, told, strict=True) if at is not None]
            found[index] = Scored(
                tuple([at.logprob for _, at in pairs_of]),
                tuple([bool(at.top) and at.top[0][0] == token for token, at in pairs_of]),
            )
        advance(sum(len(request.prompt or ()) for request in requests))
    return found


def batches(engine: Engine, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields the indices of prompts that fit in one prefill step together, the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    config, first = engine.config, 0
    while first < len(order):
        fits = config.prefill_chunk_size // bucket(lengths[order[first]], MIN_WIDTH)
        rows = 1 << max(0, fits.bit_length() - 1)  # steps have a power of two of rows
        count = min(rows, config.max_num_seqs)
        yield order[first : first + count]
        first += count
