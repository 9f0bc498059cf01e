"""Experts in device memory: keeps the residency in agreement with the link that copies experts there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.residency import Residency
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan


class DeviceTier:
    """Carries out the evictions and copies of plans.

    Args:
        residency: which experts are resident or in flight.
        transfers: the link.
        keep: converts an expert's copied arrays into the form from which it is computed.
    """

    def __init__(self, residency: Residency, transfers: Transfers, keep: Callable[[Any, ExpertId], Any]):
        self.residency, self.transfers, self._keep = residency, transfers, keep

    def absorb(self) -> None:
        """Updates the residency with the copies that have arrived or failed since the last call."""
        arrived, lost = self.transfers.arrivals()
        for expert, weights in arrived.items():
            self.residency.arrive(expert, self._keep(weights, expert))
        for expert in lost:
            self.residency.release(expert)

    def follow(self, plan: LayerPlan) -> None:
        """Evicts experts and queues copies, as planned; does not wait."""
        self.transfers.submit(self.residency.follow(plan, self.transfers.drop), plan.prefetch)

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Returns the experts that are not resident, in the same order."""
        resident = self.residency.resident
        return [expert for expert in experts if (layer, expert) not in resident]

    def fetch(self, layer: int, missing: Sequence[int], count: int) -> None:
        """Waits until at least `count` of the missing experts have arrived.

        Raises:
            TransferError: if one of them could not be copied.
        """
        most = self.transfers.most_staged
        if most is not None:
            count = min(count, most)
        self.transfers.wait([ExpertId(layer, expert) for expert in missing], count)
        self.absorb()

    def settle(self) -> None:
        """Cancels every copy in flight; the experts stay where they were.

        Raises:
            TransferError: if a copy does not end; its memory stays reserved.
        """
        self.transfers.cancel()
        self.absorb()
        for expert in list(self.residency.coming):
            self.residency.release(expert)

    def lose(self) -> None:
        """Evicts every expert, because the device's memory of them was lost."""
        for expert in list(self.residency.resident):
            self.residency.evict(expert)

    def hold(self, expert: ExpertId, weights: Any) -> None:
        """Makes an expert resident at once, without the link."""
        self.residency.reserve(expert, prefetched=False)
        self.residency.arrive(expert, weights)
