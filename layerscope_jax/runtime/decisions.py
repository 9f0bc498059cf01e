"""Asks the policy for each layer's plan: builds the observation and keeps the policy's state."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Set
from typing import Any, Protocol

from layerscope_jax.offload.residency import Residency
from layerscope_jax.prediction.forecasts import Forecast
from layerscope_jax.prediction.history import History, Popularity
from layerscope_jax.runtime.device_tier import DeviceTier
from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan, Observation, Phase, ask, check_plan
from layerscope_jax.scheduling.policy import PolicyBase
from layerscope_jax.scheduling.reads import with_reads

EXPECTED = Popularity()

Enter = Callable[[Observation, LayerPlan, Set[ExpertId]], None]
"""Function that counts and records a plan: `(observation, plan, prefetches not used yet)`."""


def decide(
    policy: PolicyBase,
    state: Any,
    seen: Observation,
    books: Residency,
    known: Container[ExpertId],
    enter: Enter,
    reads: Reads | None = None,
) -> tuple[Any, LayerPlan]:
    """Asks a policy for one layer's plan, checks and counts it; used by the engine and the simulator.

    Args:
        policy, state: the policy and its state.
        seen: the observation that it is shown.
        books: residency of the device, before the plan is carried out.
        known: experts of the model.
        enter: counts and records the plan.
        reads: adds what the plan needs from the disk; None if every expert is in host memory.

    Returns:
        The policy's new state, and the plan.

    Raises:
        ValueError: if the plan is invalid (see `check_plan`). Exceptions of the policy pass through.
    """
    state, plan = ask(policy, state, seen)
    check_plan(plan, seen, books.slots, known, policy.name)
    if reads is not None:
        plan = reads.added_to(plan, seen)
    enter(seen, plan, books.idle_prefetches)
    return state, plan


class HostMemory(Protocol):
    """Host memory that holds some of the experts.

    Attributes:
        slots: number of experts that it holds.
        present: experts that are there or being read.
    """

    @property
    def slots(self) -> int: ...

    @property
    def present(self) -> Container[ExpertId]: ...


class Reads:
    """Adds to every plan what its experts need from the disk; used by the engine and the simulator.

    Experts of coming layers are expected as the policy's predictor forecasts, without one as often as they
    were chosen before.

    Args:
        memory: host memory.
        model: numbers of the model's routed experts.
        history: forecasts where the policy's predictor does not; None to read nothing ahead.
    """

    def __init__(self, memory: HostMemory, model: RoutedExperts, history: History | None = EXPECTED):
        self.memory, self.history = memory, history
        self._layers = model.num_layers
        self._state = None if history is None else history.init(model)

    def added_to(self, plan: LayerPlan, seen: Observation) -> LayerPlan:
        """Returns the plan with `read` and `read_ahead`; see `scheduling.reads.with_reads`."""
        forecast: Any = ()
        if self.history is not None:
            self._state = self.history.update(self._state, seen)
            forecast = seen.forecast or self.history.expected(
                self._state, seen.layer, sum(seen.demand.values())
            )
        return with_reads(plan, seen, self.memory.present, forecast, self._layers, self.memory.slots)


class Decisions:
    """Asks a policy for each layer's plan, and checks it.

    Args:
        policy: the policy.
        state: its initial state.
        tier: experts in device memory.
        known: experts of the model.
        reads: adds what plans need from the disk; None if every expert is in host memory.

    Attributes:
        state: the policy's state after its last plan.
    """

    def __init__(
        self,
        policy: PolicyBase,
        state: Any,
        tier: DeviceTier,
        known: Container[ExpertId],
        reads: Reads | None = None,
    ):
        self.reads = reads
        self.policy, self.state = policy, state
        self._tier, self._known = tier, known
        self._planned_at: float | None = None  # when the previous layer of the step was planned
        self._last_ms = 0.0  # from the plan of the step's last layer to its end

    def plan(
        self,
        step: int,
        layer: int,
        phase: Phase,
        demand: Mapping[int, int],
        forecast: Forecast,
        enter: Enter,
    ) -> tuple[Observation, LayerPlan]:
        """Returns the observation and the plan of one layer.

        Args:
            step, layer, phase, demand, forecast: see `Observation`.
            enter: counts and records the plan.

        Raises:
            ValueError: if the plan is invalid (see `check_plan`). Exceptions of the policy pass through.
        """
        tier, residency = self._tier, self._tier.residency
        tier.absorb()
        seen = Observation(
            step=step,
            layer=layer,
            phase=phase,
            demand=demand,
            resident=residency.resident,
            in_flight=residency.coming,
            forecast=forecast,
            elapsed_ms=self._elapsed_ms(),
        )
        if seen.in_flight and self.policy.awaits_link(self.state, seen):
            tier.transfers.rest()
            tier.absorb()
        self.state, plan = decide(self.policy, self.state, seen, residency, self._known, enter, self.reads)
        return seen, plan

    def end_step(self) -> None:
        """Ends a step of which all layers were run."""
        self._last_ms, self._planned_at = self._elapsed_ms(), None

    def abandon_step(self) -> None:
        """Ends a step that failed: no elapsed time is known at the next plan."""
        self._planned_at, self._last_ms = None, 0.0

    def _elapsed_ms(self) -> float:
        """Returns the time (ms) since the last plan, or from it to the end of its step if that has ended."""
        now = time.perf_counter()
        elapsed = self._last_ms if self._planned_at is None else 1e3 * (now - self._planned_at)
        self._planned_at = now
        return elapsed
