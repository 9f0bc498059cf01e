"""Totals of an engine's work since it was made, from the counts of one run after another."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from layerscope_jax.runtime.accounts import Account


@dataclass(frozen=True)
class Totals:
    """Counts of experts, bytes and seconds; sums of those of `Account`.

    >>> Totals(experts=4, expert_hits=1) + Totals(experts=4, expert_hits=3)
    Totals(experts=8, expert_hits=4, demand_bytes=0, prefetch_bytes=0, wasted_bytes=0, link_busy_s=0.0, \
host_busy_s=0.0, device_busy_s=0.0, foreseen=0, foreseeable=0)
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

    def __add__(self, other: Totals) -> Totals:
        return Totals(*[a + b for a, b in zip(astuple(self), astuple(other), strict=True)])


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
            self._past += totals_of(self._account)
        self._account = account
        self.totals = self._past + totals_of(account)
