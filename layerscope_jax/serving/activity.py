"""Activity: a line now and then on what a server does, for whoever runs it."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """What a server is doing, and what it has done since it began.

    Attributes:
        running, waiting: number of requests, each sample counted.
        new_tokens: number of tokens so far.
        experts, expert_hits: experts that layers needed so far, and those of them that were resident.
    """

    running: int
    waiting: int
    new_tokens: int
    experts: int
    expert_hits: int


class Activity:
    """Says what a server has done since the last line; nothing of a time in which it did nothing.

    Args:
        every_s: time (s) between two lines.
        now: time (s) of the beginning.

    >>> activity = Activity(every_s=10, now=0)
    >>> activity.line(5, Work(1, 0, 20, 0, 0))
    >>> activity.line(10, Work(2, 1, 60, 80, 20))
    '2 requests run, 1 waits; 6.0 tokens/s; 25% of the experts needed were on the device'
    >>> activity.line(20, Work(0, 0, 60, 80, 20))
    """

    def __init__(self, every_s: float, now: float):
        self._every_s, self._told, self._before = every_s, now, Work(0, 0, 0, 0, 0)

    def line(self, now: float, work: Work) -> str | None:
        """Returns a line if one is due and there is something to tell, and None otherwise."""
        seconds = now - self._told
        if seconds < self._every_s:
            return None
        before, self._before, self._told = self._before, work, now
        tokens, experts = work.new_tokens - before.new_tokens, work.experts - before.experts
        if not (tokens or work.running or work.waiting):
            return None
        run, wait = "runs" if work.running == 1 else "run", "waits" if work.waiting == 1 else "wait"
        noun = "request" if work.running == 1 else "requests"
        told = f"{work.running} {noun} {run}, {work.waiting} {wait}; {tokens / seconds:.1f} tokens/s"
        if experts:
            hits = work.expert_hits - before.expert_hits
            told += f"; {hits / experts:.0%} of the experts needed were on the device"
        return told
