"""A device's side of a runner: its experts, what copies them there, and who decides about them."""

from __future__ import annotations

from typing import Any

import jax

from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts, device_experts
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.residency import Residency
from layerscope_jax.runtime.decisions import Decisions, Reads
from layerscope_jax.runtime.device_tier import DeviceTier
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.scheduling.policy import PolicyBase


class DeviceSide:
    """What one device needs to compute experts within its budget.

    Args:
        bank: the experts that this process holds, in host memory.
        device: the device.
        own: which experts of a layer the device owns.
        held: number of the first expert in the bank.
        host: computes experts on the host, and has them where the device is this machine's CPU.
        policy, state: plans each layer; its initial state.
        residency: residency of the device.
        transfers: the link to it.
        reads: adds what plans need from the disk; None if every expert is in host memory.

    Attributes:
        bank: the experts that the device owns, numbered from 0, as in all that follows.
        within: where they are among the experts that this process holds.
        experts, tier, decisions: parts that compute, move and plan.
    """

    def __init__(
        self,
        bank: ExpertBank,
        device: jax.Device,
        own: range,
        held: int,
        host: HostExperts,
        policy: PolicyBase,
        state: Any,
        residency: Residency,
        transfers: Transfers,
        reads: Reads | None = None,
    ):
        self.device, self._host, self._policy, self.own = device, host, policy, own
        self.within = range(own.start - held, own.stop - held)
        self.bank = bank if len(own) == bank.num_experts else bank.part(self.within)
        self.residency, self.transfers = residency, transfers
        self.experts = self.another()
        self.experts.first = own.start
        self.occupy()
        residency.let_go = self.experts.release
        self.tier = DeviceTier(residency, transfers, self.experts.keep)
        self.decisions = Decisions(policy, state, self.tier, self.bank, reads)

    def another(self) -> DeviceExperts | SharedExperts:
        """Returns an executor for the device, with output arrays of its own."""
        experts = device_experts(self.device, self._host.cpu)
        experts.passes_rows_on &= self._policy.uses_host
        return experts

    def settle(self) -> None:
        """Waits until the device and its link are idle and the residency agrees with them, after a failure.

        Raises:
            TransferError: if a copy does not end; its room stays reserved.
        """
        self.experts.clear()
        if self.experts.lost:
            self.tier.lose()
            self.occupy()
        self.tier.settle()

    def occupy(self) -> None:
        """Takes the device's memory for experts, of which none is there."""
        self.experts.reserve(self.bank, self.residency.slots)

    def preload(self) -> None:
        """Makes every expert resident; see `LayerByLayer.preload`."""
        for expert in self.bank:
            if self.experts.waits:
                there = ExpertId(expert.layer, self.within.start + expert.expert)
                self.tier.hold(expert, self._host.weights(there))
            else:
                copied = jax.device_put(self.bank.parcel(expert), self.transfers.sharding)
                self.tier.hold(expert, self.experts.keep(jax.block_until_ready(copied), expert))

    def close(self) -> None:
        """Lets go of the device's memory, until `occupy`; the link is closed elsewhere."""
        self.residency.clear()
        self.experts.clear()
        self.experts.reserve(self.bank, 0)
