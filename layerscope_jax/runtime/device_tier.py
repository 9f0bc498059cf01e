"""Moving: the experts in device memory, and the link that brings more; the books agree with both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.residency import Residency
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan


class DeviceTier:
    """Carries out what plans say of memory.

    Args:
        residency: the books.
        transfers: the link.
        keep: an expert's weights, as they came, in the form in which they are computed.
    """

    def __init__(self, residency: Residency, transfers: Transfers, keep: Callable[[Any], Any]):
        self.residency, self.transfers, self._keep = residency, transfers, keep

    def absorb(self) -> None:
        """Enters what the link has brought, or lost, since the last time into the books."""
        arrived, lost = self.transfers.arrivals()
        for expert, weights in arrived.items():
            self.residency.arrive(expert, self._keep(weights))
        for expert in lost:
            self.residency.release(expert)

    def follow(self, plan: LayerPlan) -> None:
        """Evicts, and queues what is to be copied; waits for nothing."""
        self.transfers.submit(self.residency.follow(plan, self.transfers.drop), plan.prefetch)

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those that are not there, in their order."""
        resident = self.residency.resident
        return [expert for expert in experts if (layer, expert) not in resident]

    def fetch(self, layer: int, missing: Sequence[int], count: int) -> None:
        """Waits until so many of the missing experts have arrived, or more.

        Raises:
            TransferError: if one of them cannot.
        """
        self.transfers.wait([ExpertId(layer, expert) for expert in missing], count)
        self.absorb()

    def settle(self) -> None:
        """Nothing is on its way any more; what was is where it had been.

        Raises:
            TransferError: if a copy does not end; its room stays reserved.
        """
        self.transfers.cancel()
        self.absorb()
        for expert in list(self.residency.coming):
            self.residency.release(expert)

    def hold(self, expert: ExpertId, weights: Any) -> None:
        """Has an expert there at once, past the link."""
        self.residency.reserve(expert, prefetched=False)
        self.residency.arrive(expert, weights)
