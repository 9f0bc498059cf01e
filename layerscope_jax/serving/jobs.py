"""Jobs: HTTP requests while the engine generates for them, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import accumulate

from layerscope_jax.generation.completions import Token
from layerscope_jax.generation.handles import Handle
from layerscope_jax.runtime.sampling import NO_TOKEN
from layerscope_jax.serving.bodies import Asked
from layerscope_jax.serving.metrics import Ended, Metrics


class Job:
    """The samples of an HTTP request, each a choice of its answer; tokens arrive on the event loop.

    Tokens that the client has not taken yet are kept here, never more than the request may have. So a client
    that is slow delays nobody.

    Args:
        asked: what the request asks for.
        came: time (s) of `time.perf_counter` when it came.
        metrics: count its tokens.

    Attributes:
        handles: of its prompts.
        waiting, running: number of samples without a token, and with some but not all.
        left: whether the client has gone.
        error: why a step failed for it, if one did.
        new_tokens: number of tokens so far.
    """

    def __init__(self, asked: Asked, came: float, metrics: Metrics):
        self.asked, self._came, self._metrics = asked, came, metrics
        self.handles: list[Handle] = []
        self.waiting, self.running = asked.samples, 0
        self.left = False
        self.error: BaseException | None = None
        self.new_tokens = 0
        self._first = [0, *accumulate(request.n for request in asked.requests)]  # prompt -> its first choice
        self._counts = [0] * asked.samples
        self._begun = [came] * asked.samples  # time of the first token
        self._last = [came] * asked.samples  # time of the last token
        self._unfinished = [request.n for request in asked.requests]  # samples of each prompt
        self._fresh: list[tuple[int, Token]] = []
        self._news = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether no more tokens will come."""
        return self.error is not None or self.left or not (self.waiting or self.running)

    @property
    def cached_tokens(self) -> int:
        """Tokens of its prompts that a prefix cache held."""
        return sum([handle.cached_tokens for handle in self.handles])

    def receive(self, index: int, tokens: Sequence[Token], error: BaseException | None, now: float) -> None:
        """Takes new tokens of a prompt, and why its request failed if it did."""
        for token in tokens:
            choice = self._first[index] + token.index
            self._fresh.append((choice, token))
            self._count(choice, index, token, now)
        if error is not None:
            self.error = error
            self.cancel()
        self._news.set()

    def _count(self, choice: int, index: int, token: Token, now: float) -> None:
        if token.token_id != NO_TOKEN:
            is_first = not self._counts[choice]
            self._metrics.token(now - self._last[choice], is_first)
            self.new_tokens += 1
            if is_first:
                self.waiting, self.running = self.waiting - 1, self.running + 1
                self._begun[choice] = now
                if not token.index:
                    self._metrics.prefilled(self._prompt_tokens(index), self.handles[index].cached_tokens)
            self._counts[choice] += 1
            self._last[choice] = now
        if token.finish_reason is not None:
            if self._counts[choice]:
                self.running -= 1
            else:
                self.waiting -= 1
            self._end(choice, index, token, now)

    def _end(self, choice: int, index: int, token: Token, now: float) -> None:
        """Counts a sample that ends with a token."""
        parts_s = None
        if self._counts[choice]:
            scheduled, first = self.handles[index].scheduled(token.index), self._begun[choice]
            parts_s = scheduled - self._came, first - scheduled, self._last[choice] - first
        self._metrics.ended(
            Ended(
                token.finish_reason or "",
                self._prompt_tokens(index),
                self._counts[choice],
                now - self._came,
                parts_s,
            )
        )
        self._unfinished[index] -= 1
        if not self._unfinished[index]:
            self._metrics.longest(max(self._counts[self._first[index] : self._first[index + 1]]))

    def _prompt_tokens(self, index: int) -> int:
        return len(self.asked.requests[index].prompt or ())

    async def news(self) -> list[tuple[int, Token]]:
        """Waits for new tokens and returns them with their choices; empty if no more come."""
        while not self._fresh and not self.over:
            self._news.clear()
            await self._news.wait()
        fresh, self._fresh = self._fresh, []
        return fresh

    def cancel(self) -> None:
        """Ends the request at the next step."""
        for handle in self.handles:
            handle.cancel()

    def leave(self) -> None:
        """Notes that the client has gone, and frees the slots of its request."""
        self.left = True
        self.cancel()
        self._news.set()
