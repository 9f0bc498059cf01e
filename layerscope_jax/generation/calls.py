"""Calls of an engine while it is at them: which requests each brought, and what has come of them so far."""

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
    """A request that waits, runs or has ended.

    Attributes:
        id: names it among all requests of its engine.
        index: of it in its call.
        request: its settings.
        prompt: token ids.
        room: new tokens at most.
        call: that brought it.
        tokens: new ones so far.
        text: of those; None before its first token, and without a tokenizer.
        finish_reason: None until it has ended.
        first_token_s: from the beginning of its call.
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
        """Sets out to continue what there is: the prompt, and after a failure the tokens so far."""
        if tokenizer is not None:
            self.text = TextStream(tokenizer, self.prompt)
            for token in self.tokens:
                self.text.add(token)

    def advance(self, token: int, stop_token_ids: Iterable[int]) -> None:
        """Enters its new token; `stop_token_ids` end it unless it has its own."""
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
        """Ends it without a further token."""
        self.finish_reason = reason
        piece = "" if self.text is None else self.text.end(self.tokens, reason)
        self.call.log.append(Token(self.index, NO_TOKEN, piece, reason, error))

    def recall(self) -> None:
        """Agrees with the call's log again, after an interruption at any line above."""
        events = [event for event in self.call.log if event.request == self.index]
        self.tokens = [event.token_id for event in events if event.token_id != NO_TOKEN]
        self.finish_reason = events[-1].finish_reason if events else None


@dataclass(eq=False)
class Call:
    """Requests that came together, and are answered together.

    Attributes:
        record_plans, bound: what of the run is to be kept for it.
        states: its requests.
        log: every token so far, in the order in which they came. What is in it has happened, and nothing
            else has: one `append`, which no interrupt divides, says it to everybody.
        began: when it came.
        joined: how far the run was when it came into it; None until then.
        counted, times, total_s: what the run did from then on, once it has ended.
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
        """Its requests that have not ended."""
        return [state for state in self.states if state.finish_reason is None]


@dataclass(frozen=True)
class Joined:
    """How far a run was when a call came into it.

    Attributes:
        counts: records of what had been counted, by name.
        wasted_bytes: prefetched and not used until then.
        steps, decode_steps: that there had been.
        plans, decoded: how many of each had been kept.
    """

    counts: dict[str, Any]
    wasted_bytes: int
    steps: int
    decode_steps: int
    plans: int
    decoded: int
