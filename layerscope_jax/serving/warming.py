"""Warm-up of a server: what its requests need is compiled before the first of them comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from layerscope_jax.engine import Engine
from layerscope_jax.generation.scheduler import MIN_WIDTH, bucket
from layerscope_jax.support.units import next_power

SAMPLED = {"temperature": 1.0, "top_p": 1.0}


def shapes(most: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Yields the batches to compile for: numbers of requests, and tokens of their prompts.

    A single prompt may have any length, because most requests come one by one; groups have a quarter of
    `tokens`. Every number of requests needs a decode program of its own.

    Args:
        most: most requests at once.
        tokens: most tokens of a prompt and its answer.

    >>> list(shapes(5, 64))
    [(1, 16), (1, 24), (1, 32), (1, 48), (1, 63), (2, 16), (4, 16), (5, 16)]
    """
    widths = sorted({bucket(size, MIN_WIDTH) for size in range(1, tokens)})
    yield from [(1, min(width, tokens - 1)) for width in widths]
    for power in range(1, next_power(most).bit_length()):
        yield min(2**power, most), max(1, tokens // 4)


def warm(engine: Engine, tokens: int, check: Callable[[], object]) -> int:
    """Compiles what requests of up to so many tokens need, greedy ones and those that sample.

    Args:
        engine: the engine, whose slots have `tokens` positions or more.
        tokens: most tokens of a prompt and its answer.
        check: called between two programs; may raise.

    Returns:
        The number of programs.
    """
    found = 0
    for requests, prompt_tokens in shapes(engine.config.max_num_seqs, tokens):
        for settings in ({"temperature": 0.0}, SAMPLED):
            check()
            found += engine.warmup(
                prompt_tokens=prompt_tokens,
                max_num_seqs=requests,
                new_tokens=tokens - prompt_tokens,
                **settings,
            ).programs
    return found
