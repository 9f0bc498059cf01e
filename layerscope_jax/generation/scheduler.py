"""The scheduler: decides which requests are prefilled or decoded next, and in which slot each runs.

Slots are rows of the running batch. When requests end, waiting requests are prefilled together and take the
free rows; then all running requests are decoded together. Decisions depend only on counts (no array, no
clock), so the same requests are scheduled the same way each time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from layerscope_jax.generation.prefixes import Place
from layerscope_jax.support.units import next_power

MIN_WIDTH = 16
"""Minimum tokens of a row of a prefill step: shorter prompts are padded to it."""

MIN_LENGTH = 64
"""Minimum length (positions) of the caches."""

PREFILL_STEPS = 4.0
"""Fixed cost of a prefill, however few its requests, in decode steps. Roughly right for the shipped model on
a CPU; with half or double this value, the number that `joining` picks costs about 6% more than the best."""


class Waiting(NamedTuple):
    """A request that waits to be scheduled.

    Attributes:
        id: identifies the request; unique in the scheduler.
        prompt_tokens: number of tokens to prefill.
        room: maximum number of new tokens.
        prompt: identifies these tokens; those of several requests with one `prompt` are prefilled once if the
            requests are scheduled together. None for tokens of its own.
    """

    id: int
    prompt_tokens: int
    room: int
    prompt: Hashable = None


class Prefill(NamedTuple):
    """A step that prefills requests.

    Attributes:
        requests: their ids.
        rows: the slot of each request.
    """

    requests: tuple[int, ...]
    rows: tuple[int, ...]


class Decode(NamedTuple):
    """A step that gives every running request one token.

    Attributes:
        requests: their ids, in the order of their slots.
        rows: the slot of each request.
    """

    requests: tuple[int, ...]
    rows: tuple[int, ...]


class Scheduler:
    """Queue of waiting and running requests, first come, first served.

    Each step that it schedules must be carried out before the next is asked for.

    Args:
        max_num_seqs: maximum number of requests that run at once.
        prefill_chunk_size: maximum tokens of a prefill step, including padding; a longer prompt is prefilled
            alone.
        rows: number of slots that there are already.
        place: chooses the slots of requests among the free ones; None for the first of them.

    Attributes:
        slots: number of rows, in use or free: the most requests that there ever were at once, at most
            `max_num_seqs`.
        length: cache positions that the longest request so far may need: its prompt and its new tokens.

    >>> scheduler = Scheduler(max_num_seqs=2, prefill_chunk_size=4096)
    >>> scheduler.add([Waiting(id, prompt_tokens=5, room=8) for id in (7, 8, 9)])
    >>> scheduler.schedule()
    Prefill(requests=(7, 8), rows=(0, 1))
    >>> scheduler.finish(7)
    >>> scheduler.schedule()
    Prefill(requests=(9,), rows=(0,))
    >>> scheduler.schedule()
    Decode(requests=(9, 8), rows=(0, 1))
    """

    def __init__(self, max_num_seqs: int, prefill_chunk_size: int, rows: int = 0, place: Place | None = None):
        self.slots = self.length = 0
        self._most, self._chunk = max_num_seqs, prefill_chunk_size
        self._waiting: dict[int, Waiting] = {}  # in order of arrival
        self._place = place
        self._rows: list[int | None] = [None] * rows  # slot -> its running request
        self._running: dict[int, int] = {}  # running request -> its slot
        self._decode: Decode | None = None  # the next decode step, kept until the running requests change
        # For the mean length of an answer: tokens made per ended request, at most the mean of their limits.
        self._made = self._finished = self._added = self._room = 0

    def __len__(self) -> int:
        """Returns how many requests wait or run."""
        return len(self._waiting) + len(self._running)

    def add(self, requests: Iterable[Waiting]) -> None:
        """Appends requests to those that wait."""
        for request in requests:
            self._waiting[request.id] = request
            self._added += 1
            self._room += request.room
            self.length = max(self.length, request.prompt_tokens + request.room)
        self.slots = max(self.slots, min(self._most, len(self)))
        self._rows += [None] * (batch_rows(self.slots) - len(self._rows))

    def schedule(self) -> Prefill | Decode | None:
        """Returns the next step: prefill if requests wait and enough slots are free, else decode or None."""
        if self._waiting and (group := self._group()):
            free = [row for row, request in enumerate(self._rows) if request is None]
            chosen = self._place([request.id for request in group], free) if self._place else free
            rows = tuple(chosen[: len(group)])
            for request, row in zip(group, rows, strict=True):
                del self._waiting[request.id]
                self._rows[row] = request.id
                self._running[request.id] = row
            self._made += len(group)
            self._decode = None
            return Prefill(tuple([request.id for request in group]), rows)
        if not self._running:
            return None
        if self._decode is None:
            taken = [(request, row) for row, request in enumerate(self._rows) if request is not None]
            self._decode = Decode(*zip(*taken, strict=True))
        self._made += len(self._running)
        return self._decode

    def finish(self, request: int) -> None:
        """Frees the slot of a running request that has received its last token."""
        self._leave(request)
        self._finished += 1

    def abort(self, request: int) -> int | None:
        """Removes a waiting or running request; returns the slot that it frees, None if it was waiting."""
        return self._leave(request) if self._waiting.pop(request, None) is None else None

    def _leave(self, request: int) -> int:
        row = self._running.pop(request)
        self._rows[row] = self._decode = None
        return row

    def _group(self) -> Sequence[Waiting]:
        """Returns the waiting requests to prefill now; empty if too few slots are free.

        If other requests are running and more are waiting than slots are free, the size of the group is a
        power of two, so that the prefill has no rows of padding.
        """
        free = self.slots - len(self._running)
        if free < len(self._first(self._enough())):
            return ()
        if free < len(self._waiting) and self._running:
            free = next_power(free + 1) // 2
        return self._first(free)

    def _enough(self) -> int:
        """Returns `joining` for the mean length of an answer so far; depends on counts alone.

        The mean is the tokens of all requests, divided by the number of ended requests: a mean over the ended
        requests alone would be too low, because short ones end first.
        """
        mean = self._room / self._added
        if self._finished:
            mean = min(mean, self._made / self._finished)
        return joining(self.slots, mean)

    def _first(self, most: int) -> list[Waiting]:
        """Returns the requests that have waited longest: at most `most`, and as many as fit in a prefill."""
        group: list[Waiting] = []
        prompts: set[Hashable] = set()
        longest = 0
        for request in islice(self._waiting.values(), most):
            if request.prompt not in prompts:
                longest = max(longest, request.prompt_tokens)
                prompts.add(request.id if request.prompt is None else request.prompt)
                if group and next_power(len(prompts)) * bucket(longest, MIN_WIDTH) > self._chunk:
                    break
            group.append(request)
        return group


def joining(slots: int, mean_tokens: float) -> int:
    """Returns the number of free slots at which waiting requests are prefilled, for a mean answer length.

    If k requests join at once, (k - 1) / 2 slots are free on average, about k / 2, so a request takes
    mean / (slots - k / 2) decode steps and a k-th of a prefill's cost c. The sum is least where
    c / k^2 = mean / 2 / (slots - k / 2)^2, that is for k = slots / (1 / 2 + sqrt(mean / 2 c)). The result is
    rounded to a power of two, because prefills have that many rows, and is at most half of the slots: waiting
    requests should not depend on many running ones ending at the same time by chance.

    Args:
        slots: number of slots.
        mean_tokens: mean number of new tokens of a request.

    >>> [joining(32, mean) for mean in (1, 16, 64, 256, 1024, 4096)]
    [16, 16, 8, 4, 2, 1]
    """
    best = slots / (0.5 + math.sqrt(mean_tokens / (2 * PREFILL_STEPS)))
    return 2 ** max(0, min(round(math.log2(best)), (slots // 2).bit_length() - 1))


def bucket(size: int, least: int) -> int:
    """Returns `size` rounded up to a power of two or 1.5 times one, at least `least`.

    The rounding keeps the number of compiled shapes small.

    >>> [bucket(n, 16) for n in (3, 17, 30, 33, 100)]
    [16, 24, 32, 48, 128]
    """
    power = max(least, next_power(size))
    return power * 3 // 4 if least < power and size <= power * 3 // 4 else power


def batch_rows(requests: int) -> int:
    """Returns the rows of a batch: a power of two, at least two, because a single row is slow on CPUs."""
    return max(2, next_power(requests))
