"""A call's share of the counts of a run: what was counted between its beginning and its end."""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import fields, replace
from typing import Any, TypeVar

from layerscope_jax.generation.calls import Call, Joined
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.statistics import Times
from layerscope_jax.runtime.timeline import Timeline

COUNTS = ("meter", "link", "host", "device", "disk")

FORGOTTEN = 1000
"""Number of steps whose times are forgotten together."""

C = TypeVar("C")


class StepTimes:
    """Times (s) of a run's decode steps, of which it keeps those that a call may still ask for.

    Steps are counted from the first of the run, which lasts as long as there are requests: in a server that
    is never idle, for weeks.

    >>> times = StepTimes()
    >>> for time in (0.1, 0.2, 0.3):
    ...     times.append(time)
    >>> times.forget(2)  # too few to bother
    >>> len(times), times.since(1)
    (3, [0.2, 0.3])
    """

    def __init__(self) -> None:
        self._kept: tuple[int, list[float]] = (0, [])  # how many are forgotten, and the others

    def __len__(self) -> int:
        """Returns the number of steps so far."""
        forgotten, times = self._kept
        return forgotten + len(times)

    def append(self, seconds: float) -> None:
        """Adds a step."""
        self._kept[1].append(seconds)

    def since(self, step: int) -> list[float]:
        """Returns the times from a step on."""
        forgotten, times = self._kept
        return times[step - forgotten :]

    def forget(self, step: int) -> None:
        """Forgets the times before a step."""
        forgotten, times = self._kept
        if step - forgotten >= FORGOTTEN:
            self._kept = step, times[step - forgotten :]  # at once: an interrupt may come between two lines


def join(call: Call, account: Account, decode_s: StepTimes) -> None:
    """Records the counts of a run when a call joins it, and has the run keep the records that the call needs.

    Args:
        call: the call that joins.
        account: account of the run, which must not be counting at the moment.
        decode_s: times (s) of the run's decode steps so far.
    """
    if call.record_plans and account.plans is None:
        account.plans = []
    if call.bound and account.decoded is None:
        account.decoded = []
    if call.timeline and account.timeline is None:
        account.timeline = Timeline()
    call.joined = Joined(
        counts={name: copy.deepcopy(getattr(account, name)) for name in COUNTS},
        wasted_bytes=account.wasted_bytes,
        decode_steps=len(decode_s),
        plans=len(account.plans or ()),
        decoded=len(account.decoded or ()),
        when=time.perf_counter(),
        left_out=0 if account.timeline is None else account.timeline.left_out,
    )


def leave(call: Call, account: Account, decode_s: StepTimes, now: float) -> None:
    """Stores in an ended call what the run has counted since the call joined.

    Args:
        call: the call that has ended.
        account: account of the run, which must not be counting at the moment.
        decode_s: times (s) of the run's decode steps so far.
        now: current time (s) of `time.perf_counter`.
    """
    assert call.joined is not None
    before = call.joined
    counts = {name: difference(getattr(account, name), before.counts[name]) for name in COUNTS}
    call.counted = Account(
        plans=(account.plans or [])[before.plans :] if call.record_plans else None,
        decoded=(account.decoded or [])[before.decoded :] if call.bound else None,
        peaks=[account.peak_bytes],
        wasted=[max(0, account.wasted_bytes - before.wasted_bytes)],
        links=[counts.pop("link")],
        **counts,
    )
    if call.timeline and account.timeline is not None:
        lost = account.timeline.left_out - before.left_out
        call.recording = replace(call.recording, spans=account.timeline.since(before.when), left_out=lost)
    began = [state for state in call.states if state.first_token_s is not None]
    call.times = Times(
        prompt_tokens=sum([len(state.prompt) for state in began]),
        cached_tokens=sum([state.cached_tokens for state in began]),
        first_token_s=[state.first_token_s for state in began if state.first_token_s is not None],
        decode_s=decode_s.since(before.decode_steps),
    )
    call.total_s = now - call.began


def difference(later: C, earlier: C) -> C:
    """Returns what was counted between two states of one record of counts.

    >>> from layerscope_jax.offload.link import LinkStats
    >>> difference(LinkStats(retries=5, dropped=1), LinkStats(retries=2)).retries
    3
    """
    counts: Any = copy.copy(later)
    for field in fields(counts):
        now, then = getattr(later, field.name), getattr(earlier, field.name)
        if isinstance(now, int | float | Counter):
            setattr(counts, field.name, now - then)
    return counts
