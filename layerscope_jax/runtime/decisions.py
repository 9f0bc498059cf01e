"""Deciding: what a policy sees of a layer, and the state that it goes by."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Set
from typing import Any

import numpy as np

from layerscope_jax.offload.residency import Residency
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.device_tier import DeviceTier
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan, Observation, Phase, ask, check_plan
from layerscope_jax.scheduling.policy import PolicyBase

Enter = Callable[[Observation, LayerPlan, Set[ExpertId]], None]
"""Counts and records a plan: what the policy saw, what it decided, prefetches not used yet."""


def decide(
    policy: PolicyBase,
    state: Any,
    seen: Observation,
    books: Residency,
    known: Container[ExpertId],
    enter: Enter,
) -> tuple[Any, LayerPlan]:
    """Asks a policy for one layer's plan, checks and enters it: in the engine and in the simulator.

    Args:
        policy, state: what decides.
        seen: what it is shown.
        books: of the device tier; the plan is not carried out yet.
        known: the experts of the model.
        enter: counts and records the plan.

    Returns:
        The policy's new state, and the plan.

    Raises:
        ValueError: if the plan is not one (see `check_plan`). What the policy raises passes through.
    """
    state, plan = ask(policy, state, seen)
    check_plan(plan, seen, books.slots, known, policy.name)
    enter(seen, plan, books.idle_prefetches)
    return state, plan


class Decisions:
    """Asks a policy for each layer's plan, and checks it.

    Args:
        policy: that decides.
        state: its first.
        tier: what it sees of the device.
        forecasts: what it sees of the coming layers.
        known: the experts that there are.

    Attributes:
        state: the policy's, as of its last plan.
    """

    def __init__(
        self,
        policy: PolicyBase,
        state: Any,
        tier: DeviceTier,
        forecasts: Forecasts,
        known: Container[ExpertId],
    ):
        self.policy, self.state = policy, state
        self._tier, self._forecasts, self._known = tier, forecasts, known
        self._planned_at: float | None = None  # when the layer before was planned, within a step
        self._last_ms = 0.0  # from the plan of the step's last layer to its end

    def plan(
        self,
        account: Account,
        layer: int,
        phase: Phase,
        demand: Mapping[int, int],
        expected: np.ndarray | None,
    ) -> tuple[Observation, LayerPlan]:
        """What the policy saw, and what it says.

        Args:
            account: of the call, in which the plan is entered.
            layer, phase, demand: see `Observation`.
            expected: [W, E] as the layer's program gave it, if it gave any.

        Raises:
            ValueError: if the plan is none (see `check_plan`). What the policy raises passes through.
        """
        tier, residency = self._tier, self._tier.residency
        tier.absorb()
        seen = Observation(
            step=account.steps,
            layer=layer,
            phase=phase,
            demand=demand,
            resident=residency.resident,
            in_flight=residency.coming,
            forecast=self._forecasts.read(layer, expected, sum(demand.values())),
            elapsed_ms=self._elapsed_ms(),
        )
        if seen.in_flight and self.policy.awaits_link(self.state, seen):
            tier.transfers.rest()
            tier.absorb()
        self.state, plan = decide(self.policy, self.state, seen, residency, self._known, account.enter)
        return seen, plan

    def end_step(self) -> None:
        """The step has gone through all layers."""
        self._last_ms, self._planned_at = self._elapsed_ms(), None

    def abandon_step(self) -> None:
        """It has not: no time is known until the next plan."""
        self._planned_at, self._last_ms = None, 0.0

    def _elapsed_ms(self) -> float:
        """Since the last plan; between steps, from the last one to the end of its step."""
        now = time.perf_counter()
        elapsed = self._last_ms if self._planned_at is None else 1e3 * (now - self._planned_at)
        self._planned_at = now
        return elapsed
