"""Continuous batching: requests of any length take turns in a fixed number of slots.

A slot is a row of the running batch: of its caches and of each decode step. When requests end, others that
wait are prefilled together, in small caches of their own; their keys and values are put into the free rows,
and decoding goes on with all. The slots' caches keep one length for the whole call, that of the longest
request there may be: so a call has one decode program. What it costs: one request that may become much longer
than the others makes every row as long, in memory and in what XLA's attention reads. Give it a call of its
own.

A request whose logits are not finite ends with an error; rows are apart, so the others go on.

What runs beside a request changes no number that it is computed from, only the shapes of the products that
it is a part of. Where experts run on a CPU, in float32 or bfloat16, a row has the same bits whatever the
other rows are (`layerscope_jax.kernels.cpu`), as do attention, sums over experts and products with other
weights there, where their sizes suit our loops (`layerscope_jax.kernels.inside`). Stale keys weigh nothing.
The rest is XLA's, as are experts on an accelerator: another number of rows, width of prompts or
length of a cache may round it differently. In float32 two greedy runs hardly ever part by that; in bfloat16,
where two tokens often score nearly the same, they may. The same call has the same shapes, and so the same
bits again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from layerscope_jax.generation.detokenize import TextStream
from layerscope_jax.generation.requests import Request, Token
from layerscope_jax.kernels.grouping import next_power
from layerscope_jax.models.cache import put_rows
from layerscope_jax.models.layers import PAD_POSITION
from layerscope_jax.runtime.sampling import NO_TOKEN, Sampling
from layerscope_jax.runtime.statistics import Times

Step = Callable[..., tuple[jax.Array, jax.Array, list[Any]]]

MIN_WIDTH = 16
"""Narrowest prefill step: shorter prompts are padded to it."""

PREFILL_STEPS = 4.0
"""What a prefill costs however few it is for, in decode steps. About so for the shipped model on a CPU; with
half or double of it, `joining` loses some 6% more than it must."""


@dataclass
class Running:
    """A request that waits or runs."""

    index: int
    request: Request
    prompt: list[int]
    room: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    text: TextStream | None = None  # None without a tokenizer
    finish_reason: str | None = None


def bucket(size: int, least: int) -> int:
    """`size` rounded up to a power of two or one and a half of one, `least` or more: few shapes to compile.

    >>> [bucket(n, 16) for n in (3, 17, 30, 33, 100)]
    [16, 24, 32, 48, 128]
    """
    power = max(least, next_power(size))
    return power * 3 // 4 if least < power and size <= power * 3 // 4 else power


def joining(slots: int, mean_tokens: float) -> int:
    """How many free slots newcomers wait for, where answers have so many tokens on average.

    If k join at once, (k - 1) / 2 slots are free on average, about k / 2, so a request takes mean / (slots -
    k / 2) decode steps and a k-th of a prefill's cost c. The sum is least where c / k^2 = mean / 2 / (slots -
    k / 2)^2, that is for k = slots / (1 / 2 + sqrt(mean / 2 c)). A power of two, since prefills have as many
    rows; and half of the slots at most: who ends together by chance is not to make the others wait for it.

    >>> [joining(32, mean) for mean in (1, 16, 64, 256, 1024, 4096)]
    [16, 16, 8, 4, 2, 1]
    """
    best = slots / (0.5 + math.sqrt(mean_tokens / (2 * PREFILL_STEPS)))
    return 2 ** max(0, min(round(math.log2(best)), (slots // 2).bit_length() - 1))


def batch_rows(requests: int) -> int:
    """Rows of a batch: a power of two, two at least, since products with one row are slow on CPUs."""
    return max(2, next_power(requests))


class Batch:
    """The requests of one call, and the slots that they take turns in, first come, first served.

    Args:
        requests: in the order in which they begin.
        slots: how many run at once.
        step: of a runner; see `LayerByLayer.step`.
        new_caches: empty ones for so many rows of such a length.
        prefill_chunk_size: tokens of a prefill step at most; see `OffloadConfig`.
        stop_token_ids: end a request that has none of its own.
        tokenizer: None if there is to be no text.
        times: what is measured is added to it.
        why_not_finite: says why a step found no token for somebody.
    """

    def __init__(
        self,
        requests: Sequence[Running],
        slots: int,
        step: Step,
        new_caches: Callable[[int, int], list[Any]],
        prefill_chunk_size: int,
        stop_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        times: Times,
        why_not_finite: Callable[[], str],
    ):
        self._waiting = deque(requests)
        self._slots: list[Running | None] = [None] * min(slots, len(requests))
        self._step, self._new_caches, self._chunk = step, new_caches, prefill_chunk_size
        self._stop_tokens, self._tokenizer, self._times = stop_token_ids, tokenizer, times
        self._why_not_finite = why_not_finite
        # Tokens so far and requests that ended, for the mean length of an answer; no more than what they may.
        self._made = self._finished = 0
        self._mean_room = sum(running.room for running in requests) / len(requests)
        self._length = bucket(max(len(running.prompt) + running.room for running in requests), 64)
        # Decided once for the call: a step that samples is another program than one that does not.
        self._samples = any(running.request.temperature > 0 for running in requests)
        rows = batch_rows(len(self._slots))
        self._tokens = np.zeros((rows, 1), np.int32)
        self._positions = np.full((rows, 1), PAD_POSITION, np.int32)
        self._sampling: Sampling | None = None
        self._caches: list[Any] = []
        self._began = self._ended = 0.0  # of the call, and of the last step

    def run(self) -> Iterator[list[Token]]:
        """Generates until all have ended, a step each time; its tokens come in the order of the slots."""
        self._began = time.perf_counter()
        self._caches = self._new_caches(len(self._tokens), self._length)
        while self._waiting or any(self._slots):
            yield from self._admit()
            if any(self._slots):
                yield self._decode()

    def _admit(self) -> Iterator[list[Token]]:
        """Gives free slots to those who wait, where enough are free.

        Beside requests that run, newcomers join by powers of two: a prefill has no rows of padding then.
        """
        began = False
        while self._waiting:
            free = [row for row, running in enumerate(self._slots) if running is None]
            if len(free) < len(self._next_group(self._enough())):
                break
            most = len(free)
            if most < len(self._waiting) and any(self._slots):
                most = next_power(most + 1) // 2
            group = self._next_group(most)
            for _ in group:
                self._waiting.popleft()
            yield self._prefill(group, free)
            began = True
        if began:
            self._sampling = self._sampling_of(self._slots, len(self._tokens))
            self._ended = time.perf_counter()

    def _enough(self) -> int:
        """`joining` for the mean answer so far; from counts alone, so the same in every run.

        Tokens of all by those that ended: the mean of the ended alone favours short ones, which end first.
        """
        mean = self._mean_room
        if self._finished:
            mean = min(mean, self._made / self._finished)
        return joining(len(self._slots), mean)

    def _next_group(self, most: int) -> list[Running]:
        """Those who wait longest, as many as one prefill step has room for."""
        group: list[Running] = []
        longest = 0
        for running in islice(self._waiting, most):
            longest = max(longest, len(running.prompt))
            if group and next_power(len(group) + 1) * bucket(longest, MIN_WIDTH) > self._chunk:
                break
            group.append(running)
        return group

    def _prefill(self, group: Sequence[Running], free: Sequence[int]) -> list[Token]:
        """Begins a group of requests in the first free rows: one step, or several for one long prompt.

        All steps of a long prompt have one shape, [1, prefill_chunk_size], and caches as long as the slots':
        its length compiles nothing.
        """
        rows = next_power(len(group))
        longest = max(len(running.prompt) for running in group)
        width = min(bucket(longest, MIN_WIDTH), self._chunk)
        caches = self._new_caches(rows, width if longest <= width else self._length)
        sampling = self._sampling_of(group, rows)
        for start in range(0, longest, width):
            tokens = np.zeros((rows, width), np.int32)
            positions = np.full((rows, width), PAD_POSITION, np.int32)
            last = np.zeros(rows, np.int32)
            for row, running in enumerate(group):
                part = running.prompt[start : start + width]
                tokens[row, : len(part)] = part
                positions[row, : len(part)] = np.arange(start, start + len(part))
                last[row] = len(part) - 1
            found, _, caches = self._step(tokens, positions, last, caches, sampling)
        new = np.asarray(found).tolist()
        took = time.perf_counter() - self._began
        at = np.full(rows, len(self._tokens), np.int32)  # past the last row: padding goes nowhere
        at[: len(group)] = free[: len(group)]
        self._caches = put_rows(self._caches, at, caches)
        events = []
        for row, running, token in zip(free, group, new, strict=False):
            self._slots[row] = running
            running.text = None if self._tokenizer is None else TextStream(self._tokenizer, running.prompt)
            self._times.prompt_tokens += len(running.prompt)
            self._times.first_token_s.append(took)
            events.append(self._enter(row, running, token))
        return events

    def _decode(self) -> list[Token]:
        """One token for every running request."""
        last = np.zeros(len(self._tokens), np.int32)
        found, _, self._caches = self._step(self._tokens, self._positions, last, self._caches, self._sampling)
        new = np.asarray(found).tolist()
        ended = time.perf_counter()
        self._times.decode_s.append(ended - self._ended)
        self._ended = ended
        return [
            self._enter(row, running, new[row])
            for row, running in enumerate(self._slots)
            if running is not None
        ]

    def _enter(self, row: int, running: Running, token: int) -> Token:
        """Enters the new token of the request at `row`, and frees the row if it was its last."""
        if token == NO_TOKEN:
            event = fail(running, self._why_not_finite())
        else:
            event = advance(running, token, self._stop_tokens)
        self._made += 1
        if running.finish_reason is None:
            self._tokens[row] = token
            self._positions[row] = len(running.prompt) + len(running.tokens) - 1
        else:
            self._finished += 1
            self._slots[row] = None
            self._positions[row] = PAD_POSITION
        return event

    def _sampling_of(self, running: Sequence[Running | None], rows: int) -> Sampling | None:
        """The sampling settings of each row, greedy where nobody runs; None if the whole call is greedy."""
        if not self._samples:
            return None
        nobody = Request(prompt=[0])
        requests = [nobody if one is None else one.request for one in running]
        requests += [nobody] * (rows - len(requests))
        return Sampling(
            seed=jnp.array([request.seed for request in requests], jnp.uint32),
            temperature=jnp.array([request.temperature for request in requests], jnp.float32),
            top_k=jnp.array([min(request.top_k, 2**31 - 1) for request in requests], jnp.int32),
            top_p=jnp.array([request.top_p for request in requests], jnp.float32),
        )


def advance(running: Running, token: int, stop_token_ids: Sequence[int]) -> Token:
    """Enters a request's new token."""
    running.tokens.append(token)
    stops = running.request.stop_token_ids
    if token in (stop_token_ids if stops is None else stops):
        running.finish_reason = "stop"
    elif len(running.tokens) >= running.room:
        running.finish_reason = "length"
    piece = ""
    if running.text is not None:
        if running.finish_reason != "stop":
            piece = running.text.add(token)
        if running.finish_reason is not None:
            piece += running.text.end(running.tokens, running.finish_reason)
    return Token(running.index, token, piece, running.finish_reason)


def fail(running: Running, error: str) -> Token:
    """Ends a request that has no further token, and says why."""
    running.finish_reason = "error"
    piece = "" if running.text is None else running.text.end(running.tokens, running.finish_reason)
    return Token(running.index, NO_TOKEN, piece, running.finish_reason, error)
