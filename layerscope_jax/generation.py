"""Prompts in, tokens out: batches, stopping, streaming, results."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from layerscope_jax.detokenize import TextStream
from layerscope_jax.experts.grouping import next_power
from layerscope_jax.models.layers import PAD_POSITION, KVCache
from layerscope_jax.sampling import Sampling
from layerscope_jax.scheduling.plan import LayerPlan
from layerscope_jax.statistics import RunStats

Step = Callable[..., tuple[jax.Array, jax.Array, list[KVCache]]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how it is to be continued.

    Attributes:
        prompt: text, or token ids.
        max_new_tokens: at most so many; fewer where the model's context ends.
        temperature: 0 for the likeliest token each time.
        top_k, top_p: what sampling chooses from; 0 and 1 for everything.
        seed: of its sampling. What is drawn depends on it and the position, not on what shares the batch;
            only rounding does, which can part two runs in batches of different shapes, in bfloat16 above all.
        stop_tokens: ids that end it (kept as its last token); None for the model's own.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        problems = []

        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                problems.append(f"{name} must {expected}, got {repr(getattr(self, name))[:60]}")

        prompt, length, stops = self.prompt, self.max_new_tokens, self.stop_tokens
        heat, top_p = self.temperature, self.top_p
        check("prompt", isinstance(prompt, str) or are_ids(prompt), "be text or a list of token ids")
        check("max_new_tokens", is_integer(length) and 1 <= length < 2**31, "be a whole number in 1..2**31-1")
        check("temperature", is_number(heat) and 0 <= heat <= 1e6, "be a number from 0 (greedy) to 1e6")
        check("top_k", is_integer(self.top_k) and self.top_k >= 0, "be a whole number, 0 (all) or more")
        check("top_p", is_number(top_p) and 0 < top_p <= 1, "be a number in (0, 1]")
        check("seed", is_integer(self.seed) and 0 <= self.seed < 2**32, "be a whole number in 0..2**32-1")
        check("stop_tokens", stops is None or are_ids(stops), "be a list of token ids or None")
        if problems:
            raise ValueError("; ".join(problems))


def is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_integer(value) or isinstance(value, float | np.floating)


def are_ids(value: Any) -> bool:
    """Whether it holds whole numbers and can be read more than once."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        return False
    try:
        return all(not isinstance(token, bool) and operator.index(token) is not None for token in value)
    except TypeError:  # one is no whole number
        return False


def is_text(value: str) -> bool:
    """Whether all of it are characters: half a surrogate pair, which may stand for a wrong byte, is none."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


@dataclass(frozen=True)
class Token:
    """One new token, as `Engine.stream` yields it.

    Attributes:
        request: index of its prompt.
        token: its id.
        text: what it adds to the text; empty while a later token may still change it, or without a tokenizer.
        finish: None, or why the request ended with it: "stop" or "length".
    """

    request: int
    token: int
    text: str
    finish: str | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `Engine.generate` returns; lists are in the order of the prompts.

    Attributes:
        texts: continuations ("" without a tokenizer), stop tokens left out.
        tokens: their ids, a stop token included.
        finish: "stop" or "length" each.
        stats: of the whole call.
        plans: every layer's decision, if asked for; none where all is resident and a step is one function.
    """

    texts: list[str]
    tokens: list[list[int]]
    finish: list[str]
    stats: RunStats
    plans: list[LayerPlan] = field(default_factory=list, repr=False)


@dataclass
class Times:
    """Measured while generating."""

    prompt_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)


@dataclass
class Running:
    """A request in a batch."""

    index: int
    request: Request
    prompt: list[int]
    room: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    text: TextStream | None = None  # None without a tokenizer
    finish: str | None = None


def encode_prompts(
    requests: Sequence[Request], tokenizer: Tokenizer | None, max_positions: int, vocab_size: int
) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        ValueError: naming every prompt that is empty, too long, no text or outside the vocabulary.
    """
    prompts, problems = [], []
    for index, request in enumerate(requests):
        if isinstance(request.prompt, str):
            if tokenizer is None:
                raise ValueError(
                    f"prompt {index} is text, but the model came without tokenizer.json; pass token ids"
                )
            if not is_text(request.prompt):
                problems.append(
                    f"prompt {index} holds half a surrogate pair (\\ud800 to \\udfff, or a byte that is not "
                    "UTF-8), which is no character"
                )
                continue
            ids = tokenizer.encode(request.prompt).ids
        else:
            ids = [operator.index(token) for token in request.prompt]
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if not ids:
            problems.append(f"prompt {index} is empty; it needs at least one token")
        if len(ids) >= max_positions:
            problems.append(
                f"prompt {index} has {len(ids)} tokens; the model's context holds {max_positions} "
                "with at least one new one: shorten it"
            )
        if outside:
            problems.append(f"prompt {index} has ids outside 0..{vocab_size - 1}: {outside[:5]}")
        prompts.append(ids)
    if problems:
        raise ValueError("; ".join(problems))
    return prompts


def bucket(size: int, least: int) -> int:
    """`size` rounded up to a power of two or one and a half of one, `least` or more: few shapes to compile.

    >>> [bucket(n, 16) for n in (3, 17, 30, 33, 100)]
    [16, 24, 32, 48, 128]
    """
    power = max(least, next_power(size))
    return power * 3 // 4 if least < power and size <= power * 3 // 4 else power


def batch_rows(requests: int) -> int:
    """Rows of a batch: a power of two, two at least, since products with one row are slow on CPUs."""
    return max(2, next_power(requests))


def run_batch(
    batch: list[Running],
    step: Step,
    new_caches: Callable[[int, int], list[KVCache]],
    stop_tokens: Sequence[int],
    tokenizer: Tokenizer | None,
    times: Times,
) -> Iterator[Token]:
    """Generates for the requests of one batch until all have ended."""
    rows = batch_rows(len(batch))
    width = bucket(max(len(running.prompt) for running in batch), 16)
    length = bucket(max(len(running.prompt) + running.room for running in batch), 64)
    caches = new_caches(rows, max(length, width))
    sampling = sampling_of([running.request for running in batch], rows)

    tokens = np.zeros((rows, width), np.int32)
    positions = np.full((rows, width), PAD_POSITION, np.int32)
    last = np.zeros(rows, np.int32)
    for row, running in enumerate(batch):
        size = len(running.prompt)
        tokens[row, :size] = running.prompt
        positions[row, :size] = np.arange(size)
        last[row] = size - 1
        running.text = None if tokenizer is None else TextStream(tokenizer)
        times.prompt_tokens += size

    began = time.perf_counter()
    times_of_step = times.first_token_s
    while True:
        found, _, caches = step(tokens, positions, last, caches, sampling)
        new = np.asarray(found).tolist()
        ended = time.perf_counter()
        times_of_step.append(ended - began)
        began, times_of_step = ended, times.decode_s
        if tokens.shape[1] > 1:
            tokens = np.zeros((rows, 1), np.int32)
            positions = np.full((rows, 1), PAD_POSITION, np.int32)
            last = np.zeros(rows, np.int32)
        events = []
        for row, running in enumerate(batch):
            positions[row] = PAD_POSITION
            if running.finish is None:
                events.append(advance(running, new[row], stop_tokens))
            if running.finish is None:
                tokens[row] = new[row]
                positions[row] = len(running.prompt) + len(running.tokens) - 1
        yield from events
        if all(running.finish is not None for running in batch):
            return


def advance(running: Running, token: int, stop_tokens: Sequence[int]) -> Token:
    """Enters a request's new token."""
    running.tokens.append(token)
    stops = running.request.stop_tokens
    if token in (stop_tokens if stops is None else stops):
        running.finish = "stop"
    elif len(running.tokens) >= running.room:
        running.finish = "length"
    piece = ""
    if running.text is not None:
        if running.finish != "stop":
            piece = running.text.add(token)
        if running.finish is not None:
            piece += running.text.end(running.tokens, running.finish)
    return Token(running.index, token, piece, running.finish)


def sampling_of(requests: Sequence[Request], rows: int) -> Sampling | None:
    """The sampling settings of a batch padded to `rows`; None if every request is greedy."""
    if all(request.temperature == 0 for request in requests):
        return None
    padded = [*requests, *[Request(prompt=[0])] * (rows - len(requests))]
    return Sampling(
        seed=jnp.array([request.seed for request in padded], jnp.uint32),
        temperature=jnp.array([request.temperature for request in padded], jnp.float32),
        top_k=jnp.array([min(request.top_k, 2**31 - 1) for request in padded], jnp.int32),
        top_p=jnp.array([request.top_p for request in padded], jnp.float32),
    )
