"""Totals of an engine's work since it was made, from the counts of one run after another."""

from __future__ import annotations

import operator
from typing import NamedTuple

from layerscope_jax.runtime.accounts import Account


class Totals(NamedTuple):
    """Counts of experts, bytes and seconds; sums of those of `Account`.

    >>> Totals(experts=4, expert_hits=1).plus(Totals(experts=4, expert_hits=3))[:2]
    (8, 4)
    """

    experts: int = 0
    expert_hits: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    wasted_bytes: int = 0
    link_busy_s: float = 0.0
    host_busy_s: float = 0.0
    device_busy_s: float = 0.0
    foreseen: int = 0
    foreseeable: int = 0

    def plus(self, other: Totals) -> Totals:
        """Returns the sums of both."""
        return Totals(*map(operator.add, self, other))


def totals_of(account: Account) -> Totals:
    """Returns what an account has counted so far."""
    meter, link = account.meter, account.link
    return Totals(
        experts=meter.experts,
        expert_hits=meter.expert_hits,
        demand_bytes=link.demand_bytes,
        prefetch_bytes=link.prefetch_bytes,
        wasted_bytes=account.wasted_bytes,
        link_busy_s=link.busy_s,
        host_busy_s=account.host.busy_s,
        device_busy_s=meter.device_busy_s,
        foreseen=meter.foreseen,
        foreseeable=meter.foreseeable,
    )


class Tally:
    """Adds the counts of one run after another; updated between steps by the thread that runs them.

    Attributes:
        totals: the sum so far; any thread may read it.
    """

    def __init__(self) -> None:
        self.totals = Totals()
        self._past = Totals()  # of the runs before this one
        self._account: Account | None = None

    def update(self, account: Account) -> None:
        """Counts the run in progress, which is another one if its account is."""
        if account is not self._account and self._account is not None:
            self._past = self._past.plus(totals_of(self._account))
        self._account = account
        self.totals = self._past.plus(totals_of(account))
