"""Results of requests: tokens as they are generated, and whole completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerscope_jax.generation.requests import Request, seed_of
from layerscope_jax.runtime.sampling import NO_TOKEN
from layerscope_jax.runtime.statistics import RunStats
from layerscope_jax.scheduling.plan import LayerPlan


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one token, of the model's own logits.

    Attributes:
        logprob: of the token.
        top: (token id, log-probability) of the likeliest tokens, likeliest first; as many as the request
            asked for, fewer if the others are impossible.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


PromptLogprobs = list[TokenLogprobs | None]


@dataclass(frozen=True)
class Token:
    """One new token, as `Engine.stream` yields it.

    Attributes:
        request: index of its prompt in the call.
        token_id: its id; -1, which is no token, if the request ended with an error or was cancelled.
        text: the text that it adds; empty while a later token may still change it, or without a tokenizer.
        finish_reason: None, or why the request ended with this token: "stop", "length", "error" if the logits
            held NaN or infinity, or "abort" if it was cancelled.
        error: a sentence on the cause if `finish_reason` is "error", otherwise None.
        index: which of the prompt's samples it belongs to.
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended the request; None for the
            model's own stop tokens.
        logprobs: log-probabilities at this token, if the request asked for them.
        prompt_logprobs: log-probabilities at each token of the prompt, None at the first; of a sample's first
            token alone, if the request asked for them.
    """

    request: int
    token_id: int
    text: str
    finish_reason: str | None
    error: str | None = None
    index: int = 0
    stop_reason: int | str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """One continuation of a prompt.

    Attributes:
        text: text of the continuation, without a stop token; empty without a tokenizer.
        token_ids: token ids of the continuation, including a stop token.
        finish_reason: "stop", "length", "error" or "abort"; for the last two, `text` and `token_ids` hold
            what was generated before it.
        error: a sentence on the cause if `finish_reason` is "error", otherwise None.
        index: which of the prompt's samples it is.
        seed: seed that it was sampled with.
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended it; None if it ended
            otherwise, or by one of the model's own stop tokens.
        logprobs: log-probabilities at each of `token_ids`; None if the request did not ask for them.
        prompt_logprobs: log-probabilities at each token of the prompt, None at the first; None if the request
            did not ask for them, or ended before its first token.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    error: str | None = None
    index: int = 0
    seed: int = 0
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of all its tokens; None if the request did not ask for log-probabilities."""
        return None if self.logprobs is None else sum([token.logprob for token in self.logprobs])


@dataclass(frozen=True, kw_only=True)
class Completion(Output):
    """One continuation of a prompt, as a call returns it.

    Attributes:
        stats: statistics of the whole call, shared by all its completions; see `RunStats`.
        request: index of its prompt in the call.
    """

    stats: RunStats = field(repr=False)
    request: int = 0


def output_of(events: Sequence[Token], request: Request) -> dict[str, Any]:
    """Returns the fields of the `Output` that the events of one sample of a request make.

    Args:
        events: all of the sample's tokens, the last with a `finish_reason`.
        request: the request, with a seed.
    """
    assert request.seed is not None
    last, told = events[-1], request.logprobs is not None
    return {
        "text": "".join([event.text for event in events]),
        "token_ids": [event.token_id for event in events if event.token_id != NO_TOKEN],
        "finish_reason": last.finish_reason or "",
        "error": last.error,
        "index": last.index,
        "seed": seed_of(request.seed, last.index),
        "stop_reason": last.stop_reason,
        "logprobs": [event.logprobs for event in events if event.logprobs is not None] if told else None,
        "prompt_logprobs": events[0].prompt_logprobs,
    }


class Gathering:
    """Puts the tokens of a call's requests together as they come.

    Args:
        requests: the requests of the call, with seeds.
    """

    def __init__(self, requests: Sequence[Request]):
        self._requests = requests
        self._events: dict[tuple[int, int], list[Token]] = defaultdict(list)
        self._left = [request.n for request in requests]

    def add(self, event: Token) -> list[Output] | None:
        """Returns all samples of a request, if the token is the last of them; None otherwise."""
        number, requests = event.request, self._requests
        self._events[number, event.index].append(event)
        if event.finish_reason is None:
            return None
        self._left[number] -= 1
        if self._left[number]:
            return None
        samples = [self._events.pop((number, index)) for index in range(requests[number].n)]
        return [Output(**output_of(sample, requests[number])) for sample in samples]


class Completions(list[Completion]):
    """List that `Engine.generate` returns: `n` `Completion`s for each prompt, in the order of the prompts.

    Attributes:
        stats: statistics of the whole call.
        plans: every layer's plan if `record_plans` was set; empty if all experts are resident and each step
            is one jitted function.
    """

    def __init__(self, completions: Iterable[Completion], stats: RunStats, plans: list[LayerPlan]):
        super().__init__(completions)
        self.stats = stats
        self.plans = plans

    @property
    def texts(self) -> list[str]:
        """Text of every completion, in the order of the prompts."""
        return [completion.text for completion in self]

    @property
    def token_ids(self) -> list[list[int]]:
        """Token ids of every completion, in the order of the prompts."""
        return [completion.token_ids for completion in self]
