"""Deciding which requests are prefilled together or decoded next, and in which slot each is.

Slots are rows of the running batch. When requests end, others that wait are prefilled together and take the
free rows, while decoding goes on with all. Nothing but counts goes into a decision (no array, no clock), so
the same requests are scheduled the same way each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from layerscope_jax.kernels.grouping import next_power

MIN_WIDTH = 16
"""Narrowest prefill step: shorter prompts are padded to it."""

MIN_LENGTH = 64
"""Shortest caches."""

PREFILL_STEPS = 4.0
"""What a prefill costs however few it is for, in decode steps. About so for the shipped model on a CPU; with
half or double of it, `joining` loses some 6% more than it must."""


class Waiting(NamedTuple):
    """A request that is to be scheduled.

    Attributes:
        id: names it; no other request of the scheduler has it.
        prompt_tokens: to be prefilled.
        room: new tokens at most.
    """

    id: int
    prompt_tokens: int
    room: int


class Prefill(NamedTuple):
    """A step that begins requests.

    Attributes:
        requests: their ids.
        rows: the slot of each.
    """

    requests: tuple[int, ...]
    rows: tuple[int, ...]


class Decode(NamedTuple):
    """A step that gives every running request one token.

    Attributes:
        requests: their ids, in the order of their slots.
        rows: the slot of each.
    """

    requests: tuple[int, ...]
    rows: tuple[int, ...]


class Scheduler:
    """Requests that wait or run, first come, first served.

    It expects each step that it schedules to be carried out before it is asked for the next.

    Args:
        max_num_seqs: requests that run at once at most.
        prefill_chunk_size: tokens of a prefill step at most, padding counted; a longer prompt is alone.

    Attributes:
        slots: rows in use or free for use; as many as there ever were requests at once, up to `max_num_seqs`.
        length: positions that the longest of all requests so far may come to need.

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

    def __init__(self, max_num_seqs: int, prefill_chunk_size: int):
        self.slots = self.length = 0
        self._most, self._chunk = max_num_seqs, prefill_chunk_size
        self._waiting: dict[int, Waiting] = {}  # in the order in which they came
        self._rows: list[int | None] = []  # who is in each slot
        self._running: dict[int, int] = {}  # the slot of each
        self._decode: Decode | None = None  # of those who run, until that changes
        # For the mean length of an answer: tokens so far by requests that ended; no more than what they may.
        self._made = self._finished = self._added = self._room = 0

    def __len__(self) -> int:
        """Returns how many wait or run."""
        return len(self._waiting) + len(self._running)

    def add(self, requests: Iterable[Waiting]) -> None:
        """Enters requests behind those that wait."""
        for request in requests:
            self._waiting[request.id] = request
            self._added += 1
            self._room += request.room
            self.length = max(self.length, request.prompt_tokens + request.room)
        self.slots = max(self.slots, min(self._most, len(self)))
        self._rows += [None] * (self.slots - len(self._rows))

    def schedule(self) -> Prefill | Decode | None:
        """Returns the next step, None if there is none; newcomers join where enough slots are free."""
        if self._waiting and (group := self._group()):
            free = [row for row, request in enumerate(self._rows) if request is None]
            rows = tuple(free[: len(group)])
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
        """Frees the slot of a running request that has got its last token."""
        self._leave(request)
        self._finished += 1

    def abort(self, request: int) -> int | None:
        """Lets go of a request, whether it waits or runs; returns the slot that it frees, if any."""
        return self._leave(request) if self._waiting.pop(request, None) is None else None

    def _leave(self, request: int) -> int:
        row = self._running.pop(request)
        self._rows[row] = self._decode = None
        return row

    def _group(self) -> Sequence[Waiting]:
        """Returns who of those that wait is prefilled now; nobody where too few slots are free.

        Beside requests that run, newcomers join by powers of two: a prefill has no rows of padding then.
        """
        free = self.slots - len(self._running)
        if free < len(self._first(self._enough())):
            return ()
        if free < len(self._waiting) and self._running:
            free = next_power(free + 1) // 2
        return self._first(free)

    def _enough(self) -> int:
        """Returns `joining` for the mean answer so far; from counts alone, so the same in every run.

        Tokens of all by those that ended: the mean of the ended alone favours short ones, which end first.
        """
        mean = self._room / self._added
        if self._finished:
            mean = min(mean, self._made / self._finished)
        return joining(self.slots, mean)

    def _first(self, most: int) -> list[Waiting]:
        """Returns those who wait longest, as many as one prefill step has room for."""
        group: list[Waiting] = []
        longest = 0
        for request in islice(self._waiting.values(), most):
            longest = max(longest, request.prompt_tokens)
            if group and next_power(len(group) + 1) * bucket(longest, MIN_WIDTH) > self._chunk:
                break
            group.append(request)
        return group


def joining(slots: int, mean_tokens: float) -> int:
    """Returns how many free slots newcomers wait for, where answers have so many tokens on average.

    If k join at once, (k - 1) / 2 slots are free on average, about k / 2, so a request takes mean / (slots -
    k / 2) decode steps and a k-th of a prefill's cost c. The sum is least where c / k^2 = mean / 2 / (slots -
    k / 2)^2, that is for k = slots / (1 / 2 + sqrt(mean / 2 c)). A power of two, since prefills have as many
    rows; and half of the slots at most: who ends together by chance is not to make the others wait for it.

    >>> [joining(32, mean) for mean in (1, 16, 64, 256, 1024, 4096)]
    [16, 16, 8, 4, 2, 1]
    """
    best = slots / (0.5 + math.sqrt(mean_tokens / (2 * PREFILL_STEPS)))
    return 2 ** max(0, min(round(math.log2(best)), (slots // 2).bit_length() - 1))


def bucket(size: int, least: int) -> int:
    """Returns `size` rounded up to a power of two or one and a half of one, `least` or more.

    So there are few shapes to compile.

    >>> [bucket(n, 16) for n in (3, 17, 30, 33, 100)]
    [16, 24, 32, 48, 128]
    """
    power = max(least, next_power(size))
    return power * 3 // 4 if least < power and size <= power * 3 // 4 else power


def batch_rows(requests: int) -> int:
    """Returns the rows of a batch: a power of two, two at least, since one row is slow on CPUs."""
    return max(2, next_power(requests))
