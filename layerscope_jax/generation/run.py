"""A run: the steps of requests that share slots, from the first that reaches an idle engine to the last.

New requests are prefilled in small caches of their own, whose keys and values are then put into the rows of
ended requests. With a prefix cache they begin with a copy of the slot that shares most with their prompt. A
request whose logits are not finite ends with an error; rows are independent, so the others go on.

Other requests in the batch change no number that a request is computed from, only the shapes of the products
that it is part of. If experts run on a CPU, in float32 or bfloat16, a row has the same bits whatever the
other rows are (`layerscope_jax.kernels.cpu`). So have attention, sums over experts and products with other
weights on a CPU, if the built-in loops support their sizes (`layerscope_jax.kernels.inside`). Stale keys have
zero weight. Everything else is computed by XLA, as are experts on an accelerator: it may round differently
for another number of rows, width of prompts or length of a cache. In float32 this hardly ever changes a
greedy token; in bfloat16, where two tokens often score nearly the same, it may. The same call alone has the
same shapes, and so the same bits again. With numerics="exact", on a CPU, XLA is kept from it (see
docs/numerics.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from layerscope_jax.generation.calls import RequestState
from layerscope_jax.generation.completions import PromptLogprobs, TokenLogprobs
from layerscope_jax.generation.limits import Limits
from layerscope_jax.generation.prompt_scores import PromptScores, holds_nan
from layerscope_jax.generation.row_settings import RowSettings
from layerscope_jax.generation.scheduler import (
    MIN_LENGTH,
    MIN_WIDTH,
    Decode,
    Prefill,
    Scheduler,
    Waiting,
    batch_rows,
    bucket,
)
from layerscope_jax.generation.shares import StepTimes
from layerscope_jax.generation.slots import Slots
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.runtime.sampling import NO_TOKEN
from layerscope_jax.support.units import next_power

Step = Callable[..., Any]

Placed = tuple[RequestState, int]
"""A request and the row that it gets."""


class Run:
    """Requests in slots, run one step at a time.

    Args:
        limits: on what runs at once.
        new_caches: `(rows, length)` -> empty caches.
        slots: rows of the batch, perhaps used by an earlier run.
        stop_token_ids: ids that end a request without stop tokens of its own.
        tokenizer: tokenizer that makes the text; None for no text.
        why_not_finite: returns why a step found no finite logits for a request.

    Attributes:
        decode_s: time (s) of each decode step, from the end of the step before it.
    """

    def __init__(
        self,
        limits: Limits,
        new_caches: Callable[[int, int], Any],
        slots: Slots,
        stop_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        why_not_finite: Callable[[], str],
    ):
        self.decode_s = StepTimes()
        place = None if slots.prefixes is None else self._place
        self._exact = limits.exact
        self._scheduler = Scheduler(limits.max_num_seqs, limits.prefill_chunk_size, slots.rows, place)
        self._slots = slots
        self._new_caches, self._chunk, self._least = new_caches, limits.prefill_chunk_size, limits.slot_tokens
        self._stop_tokens, self._tokenizer = stop_token_ids, tokenizer
        self._why_not_finite = why_not_finite
        self._states: dict[int, RequestState] = {}  # waiting and running requests, by id
        # Fixed for the run, because steps with and without sampling are different programs.
        self._samples = False
        self._settings: RowSettings | None = None  # of the slots; None if they have to be collected again
        self._ended = 0.0  # when the last step ended

    def add(self, states: Iterable[RequestState]) -> None:
        """Adds requests, new ones or ones that continue."""
        states = list(states)
        self._states |= {state.id: state for state in states}
        self._samples = self._samples or any(state.request.temperature > 0 for state in states)
        self._scheduler.add(
            [
                Waiting(
                    state.id,
                    len(state.prompt) + len(state.tokens),
                    state.room - len(state.tokens),
                    state.prefilled,
                )
                for state in states
            ]
        )
        self._ended = time.perf_counter()  # earlier time is not part of their steps

    def abort(self, state: RequestState) -> None:
        """Ends a waiting or running request."""
        if (row := self._scheduler.abort(state.id)) is not None:
            self._free(row, state)
        del self._states[state.id]
        state.end("abort")

    def step(self, step: Step, score: Step | None = None) -> list[RequestState]:
        """Runs the step that is scheduled next.

        Args:
            step: step of a runner; see `Runner.step`.
            score: step that scores prompts too; see `Runner.score`. None for no scores.

        Returns:
            The requests that got a token or an error; empty if there was nothing to do.
        """
        scheduled = self._scheduler.schedule()
        if isinstance(scheduled, Prefill):
            return self._prefill(step, score, scheduled)
        return [] if scheduled is None else self._decode(step, scheduled)

    def _prefill(self, step: Step, score: Step | None, scheduled: Prefill) -> list[RequestState]:
        """Begins a group of requests; those that share much of their prompts after the first of these."""
        slots, scheduler = self._slots, self._scheduler
        slots.fit(batch_rows(scheduler.slots), bucket(max(scheduler.length, self._least), MIN_LENGTH))
        group = [self._states[request] for request in scheduled.requests]
        left = list(zip(group, scheduled.rows, strict=True))
        while left:
            now, left = self._parted(left)
            self._prefill_together(step, score, *zip(*now, strict=True))
        self._settings = None  # the rows have changed
        self._ended = time.perf_counter()
        return group

    def _parted(self, left: list[Placed]) -> tuple[list[Placed], list[Placed]]:
        """Returns which requests to prefill now, and which after them, because they share much with these."""
        if self._slots.prefixes is None:
            return left, []
        prompts, sources = distinct_prompts([state for state, _ in left])
        first = set(self._slots.prefixes.first(prompts))
        pairs = list(zip(left, sources, strict=True))
        return [one for one, source in pairs if source in first], [
            one for one, source in pairs if source not in first
        ]

    def _prefill_together(
        self, step: Step, score: Step | None, group: Sequence[RequestState], places: Sequence[int]
    ) -> None:
        """Begins requests in the rows `places`: one step, or several for one long prompt.

        All steps of a long prompt have the shape [1, prefill_chunk_size] and caches as long as the slots', so
        a new prompt length compiles nothing. Samples of a prompt share a row of the step.
        """
        slots, prefixes, began = self._slots, self._slots.prefixes, time.perf_counter()
        prompts, sources = distinct_prompts(group)
        rows = next_power(len(prompts))
        scores = None if score is None else PromptScores.asked_by(group, prompts, rows)
        # Prompts that are to be scored are computed whole.
        found = [prefixes.find(prompt) if prefixes and scores is None else None for prompt in prompts]
        begun = [0 if each is None else each.length for each in found]
        longest = max([len(prompt) - start for prompt, start in zip(prompts, begun, strict=True)])
        width = min(bucket(longest, MIN_WIDTH), self._chunk)
        if any(begun):
            caches = slots.take([None if each is None else each.row for each in found], rows)
        else:
            caches = self._new_caches(rows, width if longest <= width else slots.length)
        picked, shared = next_power(len(group)), None
        if len(prompts) < len(group):
            shared = np.pad(np.array(sources, np.int32), (0, picked - len(group)))
        running = dict(enumerate(group))
        settings = RowSettings(running, picked, self._samples, self._stop_tokens, shared)
        for start in range(0, longest, width):
            firsts = [first + start for first in begun]
            tokens, positions, last = prefill_inputs(prompts, rows, firsts, width)
            inputs = tokens, positions, last, caches, settings.in_step
            if score is None or scores is None:
                next_tokens, logits, caches = step(*inputs)
            else:
                (next_tokens, logits, caches), part = score(*inputs, scores.targets(start, width), scores.top)
                scores.add(part)
        new = settings.pick(next_tokens, logits, positions[np.arange(rows), last])
        ended = time.perf_counter()
        slots.put(places, sources, caches, rows)
        for state, source, row, (token, logprobs) in zip(group, sources, places, new, strict=False):
            if state.first_token_s is None:
                state.first_token_s, state.cached_tokens = ended - state.call.began, begun[source]
                state.scheduled = began
            if prefixes is not None:
                prefixes.hold(row, prompts[source], runs=True)
            state.begin(self._tokenizer)
            told = None if scores is None else scores.of(state, source)
            self._enter(state, row, token, logprobs, told)

    def rehearse_copies(self, step: Step, states: Sequence[RequestState]) -> None:
        """Runs the programs of a prefill that begins with copies of slots; it changes nothing."""
        prompts, _ = distinct_prompts(states)
        rows = next_power(len(prompts))
        width = min(bucket(max(map(len, prompts)), MIN_WIDTH), self._chunk)
        inputs = prefill_inputs(prompts, rows, [0] * len(prompts), width)
        settings = RowSettings(
            dict(enumerate(states)), next_power(len(states)), self._samples, self._stop_tokens
        )
        step(*inputs, self._slots.take([None] * rows, rows), settings.in_step)

    def _decode(self, step: Step, scheduled: Decode) -> list[RequestState]:
        """Gives every running request one token."""
        slots = self._slots
        states = [self._states[request] for request in scheduled.requests]
        if self._settings is None:
            running = dict(zip(scheduled.rows, states, strict=True))
            self._settings = RowSettings(running, slots.rows, self._samples, self._stop_tokens)
        in_step, last = self._settings.in_step, np.zeros(slots.rows, np.int32)
        next_tokens, logits, slots.caches = step(slots.tokens, slots.positions, last, slots.caches, in_step)
        new = self._settings.pick(next_tokens, logits, slots.positions[:, 0])
        ended = time.perf_counter()
        self.decode_s.append(ended - self._ended)
        self._ended = ended
        for state, row in zip(states, scheduled.rows, strict=True):
            self._enter(state, row, *new[row])
        return states

    def _enter(
        self,
        state: RequestState,
        row: int,
        token: int,
        logprobs: TokenLogprobs | None,
        prompt_logprobs: PromptLogprobs | None = None,
    ) -> None:
        """Enters the new token of the request at `row`, and frees the row if it was its last."""
        if token == NO_TOKEN or holds_nan(prompt_logprobs):
            error = None if state.guide is None else state.guide.error()
            state.end("error", error or self._why_not_finite())
        else:
            state.advance(token, self._stop_tokens, logprobs, prompt_logprobs)
        if state.finish_reason is None:
            self._slots.enter(row, token, len(state.prompt) + len(state.tokens) - 1)
        else:
            self._scheduler.finish(state.id)
            self._free(row, state)
            del self._states[state.id]

    def _free(self, row: int, state: RequestState) -> None:
        """Frees the row of a request that has ended; other requests may reuse what it holds."""
        self._slots.free(row)
        if (prefixes := self._slots.prefixes) is None:
            return
        if state.finish_reason == "error":
            prefixes.drop(row)
        elif self._exact:  # tokens that were decoded may have other bits than if they had been prefilled
            prefixes.use(row)
        else:  # the last token has not been in any step
            prefixes.hold(row, [*state.prompt, *state.tokens][:-1])

    def _place(self, requests: Sequence[int], free: Sequence[int]) -> Sequence[int]:
        """Returns a free row for each request, so that as much as possible stays reusable."""
        assert self._slots.prefixes is not None
        states = [self._states[request] for request in requests]
        return self._slots.prefixes.place([[*state.prompt, *state.tokens] for state in states], free)


def distinct_prompts(group: Sequence[RequestState]) -> tuple[list[list[int]], list[int]]:
    """Returns what some requests prefill, the prompt of samples once, and which of it each request does."""
    numbers: dict[Hashable, int] = {}
    sources = [numbers.setdefault(state.prefilled, len(numbers)) for state in group]
    firsts = [group[sources.index(number)] for number in numbers.values()]
    return [[*state.prompt, *state.tokens] for state in firsts], sources


def prefill_inputs(
    prompts: Sequence[Sequence[int]], rows: int, starts: Sequence[int], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what a prefill step reads: tokens and positions [B, S], and the last index [B].

    Args:
        prompts: of the rows.
        rows: B.
        starts: position in each prompt from which on the step reads.
        width: S.

    >>> tokens, positions, last = prefill_inputs([[5, 6, 7], [8]], rows=2, starts=[1, 0], width=4)
    >>> tokens.tolist(), positions[:, 0].tolist(), last.tolist()
    ([[6, 7, 0, 0], [8, 0, 0, 0]], [1, 0], [1, 0])
    """
    tokens = np.zeros((rows, width), np.int32)
    positions = np.full((rows, width), PAD_POSITION, np.int32)
    last = np.zeros(rows, np.int32)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        part = prompt[start : start + width]
        tokens[row, : len(part)] = part
        positions[row, : len(part)] = np.arange(start, start + len(part))
        last[row] = len(part) - 1
    return tokens, positions, last
