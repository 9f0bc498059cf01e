"""Which of two ways to run a decode step is faster: planned layer by layer, or with the cache inside it.

A record of measured times and one function from record to record, so that the same decisions can be asked for
on any clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

FIRST_WAIT, LONGEST_WAIT, LONGER = 32, 8192, 4
"""Steps before a trial of the other way: by the first, policy "auto" has chosen its own ways. The wait grows
by `LONGER` after a trial that changes nothing, and never falls: a trial costs all resident experts."""

TRIAL, MEASURED = 24, 8
"""Steps of a trial, and how many of them are measured: the last, when the caches are warm."""

MARGIN = 0.06
"""Share of the time by which the other way must be faster."""

UNREHEARSED_S = 60.0
"""Seconds of decode steps before a trial whose program has not been compiled: compiling may take as long."""


@dataclass(frozen=True)
class Contest:
    """Two ways to run decode steps of about one size, and what they took.

    Attributes:
        in_step: whether the chosen way keeps the cache inside the step.
        trial: whether the other way is on trial.
        left: steps until the trial begins, or ends.
        pause: steps between the last trial and the next.
        times_s: newest times of the current way, at most `MEASURED`.
        chosen_s: median time of the chosen way before the trial.
        spent_s: time of all steps so far.
    """

    in_step: bool = False
    trial: bool = False
    left: int = FIRST_WAIT
    pause: int = FIRST_WAIT
    times_s: tuple[float, ...] = ()
    chosen_s: float = 0.0
    spent_s: float = 0.0

    @property
    def now_in_step(self) -> bool:
        """Whether the next step keeps its cache inside."""
        return self.in_step != self.trial


def after(contest: Contest, took_s: float, compiled: bool) -> Contest:
    """Returns the contest after a step that was run in the current way.

    Args:
        contest: before the step.
        took_s: time of the step, in seconds.
        compiled: whether the programs of the other way have been compiled.

    >>> contest = Contest()
    >>> for _ in range(FIRST_WAIT):
    ...     contest = after(contest, took_s=0.02, compiled=True)
    >>> contest.now_in_step, contest.trial
    (True, True)
    >>> for _ in range(TRIAL):
    ...     contest = after(contest, took_s=0.01, compiled=True)
    >>> contest.now_in_step, contest.trial
    (True, False)
    """
    times_s = (*contest.times_s[-MEASURED + 1 :], took_s)
    contest = replace(contest, times_s=times_s, spent_s=contest.spent_s + took_s)
    if contest.left > 1:
        return replace(contest, left=contest.left - 1)
    if contest.trial:
        better = median(times_s) < (1 - MARGIN) * contest.chosen_s
        pause = min(LONGEST_WAIT, contest.pause * (1 if better else LONGER))
        in_step = contest.in_step != better
        return replace(contest, in_step=in_step, trial=False, left=pause, pause=pause, times_s=())
    if not compiled and contest.spent_s < UNREHEARSED_S:
        return contest
    return replace(contest, trial=True, left=TRIAL, chosen_s=median(times_s), times_s=())
