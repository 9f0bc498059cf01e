"""Which of two ways to run decode steps is faster: planned layer by layer, or with the cache inside them.

A record of measured times and one function from record to record, so that the same decisions can be asked for
on any clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

FIRST_WAIT, LONGEST_WAIT, LONGER = 64, 8192, 4
"""Decode steps before a trial of the other way: by the first, policy "auto" has tried its own ways. The wait
grows by `LONGER` after a trial that changes nothing, and never falls: a trial costs all resident experts."""

TRIAL, MEASURED = 24, 8
"""Steps of a trial, and how many of them are measured: the last, when the cache is warm. Of the chosen way as
many are kept, the newest of each number of requests."""

MARGIN = 0.06
"""Share of the time by which the other way must be faster."""

UNREHEARSED_S = 60.0
"""Seconds of decode steps before a trial whose program has not been compiled: compiling may take as long."""


@dataclass(frozen=True)
class Contest:
    """Two ways to run decode steps, and what they took.

    Attributes:
        in_step: whether the chosen way keeps the cache inside the step.
        trial: whether the other way is on trial.
        left: steps until the trial begins, or ends.
        pause: steps between the last trial and the next.
        chosen_s, tried_s: newest times of the chosen way and of this trial, by the number of requests.
        spent_s: time of all steps so far.
    """

    in_step: bool = False
    trial: bool = False
    left: int = FIRST_WAIT
    pause: int = FIRST_WAIT
    chosen_s: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    tried_s: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    spent_s: float = 0.0

    @property
    def now_in_step(self) -> bool:
        """Whether the next step keeps its cache inside."""
        return self.in_step != self.trial


def after(contest: Contest, requests: int, took_s: float, compiled: bool) -> Contest:
    """Returns the contest after a decode step that was run in the current way.

    Args:
        contest: before the step.
        requests: how many the step had: only steps of as many are compared.
        took_s: time of the step, in seconds.
        compiled: whether the programs of the other way have been compiled.

    >>> contest = Contest()
    >>> for _ in range(FIRST_WAIT):
    ...     contest = after(contest, requests=1, took_s=0.02, compiled=True)
    >>> contest.now_in_step, contest.trial
    (True, True)
    >>> for _ in range(TRIAL):
    ...     contest = after(contest, requests=1, took_s=0.01, compiled=True)
    >>> contest.now_in_step, contest.trial
    (True, False)
    """
    contest = replace(contest, spent_s=contest.spent_s + took_s)
    if not contest.trial:
        contest = replace(contest, chosen_s=added(contest.chosen_s, requests, took_s))
    elif contest.left <= MEASURED:
        contest = replace(contest, tried_s=added(contest.tried_s, requests, took_s))
    if contest.left > 1:
        return replace(contest, left=contest.left - 1)
    if not contest.trial:
        if not compiled and contest.spent_s < UNREHEARSED_S:
            return contest
        return replace(contest, trial=True, left=TRIAL, tried_s={})
    better = is_better(contest)
    pause = min(LONGEST_WAIT, contest.pause * (1 if better else LONGER))
    known = contest.tried_s if better else contest.chosen_s
    return replace(
        contest, in_step=contest.in_step != better, trial=False, left=pause, pause=pause, chosen_s=known
    )


def added(
    times: Mapping[int, tuple[float, ...]], requests: int, took_s: float
) -> dict[int, tuple[float, ...]]:
    """Returns the newest times of each number of requests, with one more."""
    return {**times, requests: (*times.get(requests, ())[-MEASURED + 1 :], took_s)}


def is_better(contest: Contest) -> bool:
    """Whether the other way took less in its trial, over the numbers of requests that both have had.

    Each time is weighed as often as it came in the trial. Of several the lower quarter counts, which knows
    nothing of steps in which policy "auto" tried a way that is slower, or the machine did something else.
    """
    both = [requests for requests in contest.tried_s if requests in contest.chosen_s]
    tried, chosen = (
        sum(usual(times[requests]) * len(contest.tried_s[requests]) for requests in both)
        for times in (contest.tried_s, contest.chosen_s)
    )
    return tried < (1 - MARGIN) * chosen


def usual(times_s: tuple[float, ...]) -> float:
    """Returns the lower quarter of some times, of which there is at least one.

    >>> usual((3.0, 1.0, 2.0, 9.0))
    2.0
    """
    return sorted(times_s)[len(times_s) // 4]
