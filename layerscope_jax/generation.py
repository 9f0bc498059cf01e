"""Prompts in, tokens out: what a caller asks for, and what comes back."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from layerscope_jax.scheduling.plan import LayerPlan
from layerscope_jax.statistics import RunStats


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


def make_requests(
    prompts: Sequence[str | Sequence[int] | Request], settings: dict[str, Any]
) -> list[Request]:
    """One `Request` a prompt.

    Raises:
        ValueError: if there is no prompt, or something else was given than a list of prompts.
    """
    if isinstance(prompts, str | bytes | Request) or not isinstance(prompts, Collection):
        raise ValueError(f"prompts must be a list of prompts, got {str(prompts)[:40]!r}; put it in a list")
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt, got an empty list")
    if any(isinstance(prompt, int | np.integer) for prompt in prompts):
        raise ValueError(
            f"prompts must be a list of prompts, each text or a list of token ids, got {str(prompts)[:40]}; "
            "put the ids of a lone prompt in a list of their own"
        )
    return [p if isinstance(p, Request) else Request(prompt=p, **settings) for p in prompts]
