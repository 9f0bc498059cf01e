"""Calls in progress: the requests of each, and their tokens so far."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from layerscope_jax.generation.completions import Token
from layerscope_jax.generation.detokenize import TextStream
from layerscope_jax.generation.requests import Request
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.sampling import NO_TOKEN
from layerscope_jax.runtime.statistics import Times


@dataclass(eq=False)
class RequestState:
    """State of a request that waits, runs or has ended.

    Attributes:
        id: identifies the request; unique in its engine.
        index: index of the request in its call.
        request: its settings.
        prompt: token ids of its prompt.
        room: maximum number of new tokens.
        call: the call that it belongs to.
        tokens: new tokens so far.
        text: text of the new tokens; None before the first one, and without a tokenizer.
        finish_reason: why it ended; None until then.
        first_token_s: time (s) from the beginning of its call to its first token.
    """

    id: int
    index: int
    request: Request
    prompt: list[int]
    room: int
    call: Call = field(repr=False)
    tokens: list[int] = field(default_factory=list)
    text: TextStream | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None

    def begin(self, tokenizer: Tokenizer | None) -> None:
        """Prepares the text to follow the prompt and, after a failed step, the tokens so far."""
        if tokenizer is not None:
            self.text = TextStream(tokenizer, self.prompt)
            for token in self.tokens:
                self.text.add(token)

    def advance(self, token: int, stop_token_ids: Iterable[int]) -> None:
        """Appends a new token; `stop_token_ids` end the request unless it has stop tokens of its own."""
        self.tokens.append(token)
        stops = self.request.stop_token_ids
        if token in (stop_token_ids if stops is None else stops):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.room:
            self.finish_reason = "length"
        piece = ""
        if self.text is not None:
            if self.finish_reason != "stop":
                piece = self.text.add(token)
            if self.finish_reason is not None:
                piece += self.text.end(self.tokens, self.finish_reason)
        self.call.log.append(Token(self.index, token, piece, self.finish_reason))

    def end(self, reason: str, error: str | None = None) -> None:
        """Ends the request without another token."""
        self.finish_reason = reason
        piece = "" if self.text is None else self.text.end(self.tokens, reason)
        self.call.log.append(Token(self.index, NO_TOKEN, piece, reason, error))

    def recall(self) -> None:
        """Restores its tokens and `finish_reason` from the call's log, after an interrupt at any point."""
        events = [event for event in self.call.log if event.request == self.index]
        self.tokens = [event.token_id for event in events if event.token_id != NO_TOKEN]
        self.finish_reason = events[-1].finish_reason if events else None


@dataclass(eq=False)
class Call:
    """Requests that are submitted together and answered together.

    Attributes:
        record_plans, bound: which records of the run to keep for the call.
        states: its requests.
        log: every token so far, in order. The log alone decides what has happened: a token is published by
            one `append`, which no interrupt can divide.
        began: time (s) of `time.perf_counter` when it was submitted.
        joined: counts of the run when the call joined it; None until then.
        counted, times, total_s: what the run did from then on, set when the call has ended.
        cancelled: whether its requests are to end at the next step.
        ended: whether all of its requests have ended, and `log` is complete.
    """

    record_plans: bool = False
    bound: bool = False
    states: list[RequestState] = field(default_factory=list)
    log: list[Token] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    joined: Joined | None = None
    counted: Account | None = None
    times: Times = field(default_factory=Times)
    total_s: float = 0.0
    cancelled: bool = False
    ended: bool = False

    @property
    def unfinished(self) -> list[RequestState]:
        """Requests of the call that have not ended."""
        return [state for state in self.states if state.finish_reason is None]


@dataclass(frozen=True)
class Joined:
    """Counts of a run at the time when a call joined it.

    Attributes:
        counts: copies of the run's counts, by name.
        wasted_bytes: bytes prefetched and not used until then.
        decode_steps: number of decode steps until then.
        plans, decoded: number of records kept until then.
    """

    counts: dict[str, Any]
    wasted_bytes: int
    decode_steps: int
    plans: int
    decoded: int
