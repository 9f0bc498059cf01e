"""Calls in progress: the requests of each, and their tokens so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from layerscope_jax.generation.completions import (
    Completion,
    PromptLogprobs,
    Token,
    TokenLogprobs,
    output_of,
)
from layerscope_jax.generation.detokenize import TextStream
from layerscope_jax.generation.requests import Request
from layerscope_jax.generation.stop_strings import StopStrings
from layerscope_jax.generation.structured import Guide
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.sampling import NO_TOKEN
from layerscope_jax.runtime.statistics import RunStats, Times
from layerscope_jax.runtime.timeline import Recording


@dataclass(eq=False)
class RequestState:
    """State of a request, or of one of its samples, that waits, runs or has ended.

    Attributes:
        id: identifies the request; unique in its engine.
        index: index of the request in its call.
        request: its settings, with a seed.
        prompt: token ids of its prompt.
        room: maximum number of new tokens.
        call: the call that it belongs to.
        sample: which of the request's samples it is.
        guide: where it is in its grammar; None without one.
        tokens: new tokens so far.
        text: text of the new tokens; None before the first one, and without a tokenizer.
        stops: looks for stop strings in the text; None without any.
        finish_reason: why it ended; None until then.
        scheduled: time (s) of `time.perf_counter` when its prompt began to be computed.
        first_token_s: time (s) from the beginning of its call to its first token.
        cached_tokens: tokens of its prompt that were not computed, because a slot held them already.
    """

    id: int
    index: int
    request: Request
    prompt: list[int]
    room: int
    call: Call = field(repr=False)
    sample: int = 0
    guide: Guide | None = None
    tokens: list[int] = field(default_factory=list)
    text: TextStream | None = None
    stops: StopStrings | None = None
    finish_reason: str | None = None
    scheduled: float | None = None
    first_token_s: float | None = None
    cached_tokens: int = 0

    def ends(self, stop_token_ids: Collection[int]) -> Collection[int]:
        """Returns the ids that end the request: its own, or `stop_token_ids`, which are the model's."""
        if self.request.stop_token_ids is not None:
            return self.request.stop_token_ids
        return () if self.request.ignore_eos else stop_token_ids

    @property
    def prefilled(self) -> Hashable:
        """Identifies the tokens to prefill; samples of a request have the same until they have new ones."""
        return self.id if self.tokens else (self.call, self.index)

    def begin(self, tokenizer: Tokenizer | None) -> None:
        """Prepares the text to follow the prompt and, after a failed step, the tokens so far."""
        if tokenizer is None:
            return
        self.text = TextStream(tokenizer, self.prompt, not self.request.skip_special_tokens)
        self.stops = None
        if self.request.stops:
            self.stops = StopStrings(self.request.stops, self.request.include_stop_str_in_output)
        for number, token in enumerate(self.tokens, 1):
            self._certain(self.text.add(token), number)

    def advance(
        self,
        token: int,
        stop_token_ids: Collection[int],
        logprobs: TokenLogprobs | None = None,
        prompt_logprobs: PromptLogprobs | None = None,
    ) -> None:
        """Appends a new token; `stop_token_ids` end the request unless it has stop tokens of its own."""
        self.tokens.append(token)
        reason: str | None = None
        stop_reason: int | str | None = None
        is_end = token in self.ends(stop_token_ids)
        if is_end:
            reason = "stop"
            stop_reason = token if self.request.stop_token_ids is not None else None
        elif self.guide is not None and self.guide.is_complete(self.tokens):
            reason = "stop"
        elif len(self.tokens) >= self.room:
            reason = "length"
        piece = ""
        if self.text is not None:
            if not is_end:
                piece = self.text.add(token)
            if reason is not None:
                piece += self.text.end(self.tokens, "stop" if is_end else "length")
            piece = self._certain(piece, len(self.tokens))
            if self.stops is not None and self.stops.found is not None:
                reason, stop_reason = "stop", self.stops.found
            elif self.stops is not None and reason is not None:
                piece += self.stops.end()
        self.finish_reason = reason
        self.call.log.append(
            Token(
                self.index,
                token,
                piece,
                reason,
                index=self.sample,
                stop_reason=stop_reason,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
        )

    def end(self, reason: str, error: str | None = None) -> None:
        """Ends the request without another token."""
        self.finish_reason = reason
        piece = ""
        if self.text is not None:
            piece = self._certain(self.text.end(self.tokens, reason), len(self.tokens))
            piece += "" if self.stops is None else self.stops.end()
        self.call.log.append(Token(self.index, NO_TOKEN, piece, reason, error, self.sample))

    def _certain(self, piece: str, number: int) -> str:
        """Returns the text that no stop string can change any more, after a piece of the nth token."""
        if self.stops is None:
            return piece
        return self.stops.add(piece, number > self.request.min_new_tokens)

    def recall(self) -> None:
        """Restores its tokens and `finish_reason` from the call's log, after an interrupt at any point."""
        own = (self.index, self.sample)
        events = [event for event in self.call.log if (event.request, event.index) == own]
        self.tokens = [event.token_id for event in events if event.token_id != NO_TOKEN]
        self.finish_reason = events[-1].finish_reason if events else None


@dataclass(eq=False)
class Call:
    """Requests that are submitted together and answered together.

    Attributes:
        record_plans, bound, timeline: which records of the run to keep for the call.
        states: its requests.
        log: every token so far, in order. The log alone decides what has happened: a token is published by
            one `append`, which no interrupt can divide.
        began: time (s) of `time.perf_counter` when it was submitted.
        joined: counts of the run when the call joined it; None until then.
        counted, times, total_s, recording: what the run did from then on, set when the call has ended.
        cancelled: whether its requests are to end at the next step.
        ended: whether all of its requests have ended, and `log` is complete.
    """

    record_plans: bool = False
    bound: bool = False
    timeline: bool = False
    states: list[RequestState] = field(default_factory=list)
    log: list[Token] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    joined: Joined | None = None
    counted: Account | None = None
    times: Times = field(default_factory=Times)
    total_s: float = 0.0
    recording: Recording = field(default_factory=Recording)
    cancelled: bool = False
    ended: bool = False

    @property
    def unfinished(self) -> list[RequestState]:
        """Requests of the call that have not ended."""
        return [state for state in self.states if state.finish_reason is None]

    @property
    def cached_tokens(self) -> int:
        """Tokens of its prompts that a prefix cache held."""
        return sum([state.cached_tokens for state in self.states if not state.sample])

    def completions(self, stats: RunStats) -> list[Completion]:
        """Returns the completion of each request of an ended call; `stats` are those of the whole call."""
        events: dict[tuple[int, int], list[Token]] = defaultdict(list)
        for event in self.log:
            events[event.request, event.index].append(event)
        return [
            Completion(
                **output_of(events[state.index, state.sample], state.request),
                stats=stats,
                request=state.index,
            )
            for state in self.states
        ]


@dataclass(frozen=True)
class Joined:
    """Counts of a run at the time when a call joined it.

    Attributes:
        counts: copies of the run's counts, by name.
        wasted_bytes: bytes prefetched and not used until then.
        decode_steps: number of decode steps until then.
        plans, decoded: number of records kept until then.
        when: that time (s), of `time.perf_counter`.
        left_out: number of spans that the timeline had left out.
    """

    counts: dict[str, Any]
    wasted_bytes: int
    decode_steps: int
    plans: int
    decoded: int
    when: float
    left_out: int
