"""A layer's decision, as the engine and the simulator take it: asked for, checked, counted, recorded."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from layerscope_jax.offload.residency import Residency
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan, Observation, Policy, ask, check_plan


def decide(
    policy: Policy,
    state: Any,
    seen: Observation,
    books: Residency,
    known: Container[ExpertId],
    meter: Meter,
    record: Callable[[LayerPlan], None] | None,
) -> tuple[Any, LayerPlan]:
    """Asks a policy for the plan of the layer whose turn it is; gives its new state and the plan.

    Args:
        policy, state: what decides.
        seen: what it is shown.
        books: of the device tier; the plan is not entered yet.
        known: the experts that there are.
        meter: counts what the layer found resident.
        record: is given the plan, if not None.

    Raises:
        ValueError: if the plan is not one (see `check_plan`). What the policy raises passes through.
    """
    state, plan = ask(policy, state, seen)
    check_plan(plan, seen, books.slots, known, policy.name)
    meter.count(seen, books.idle_prefetches)
    if record is not None:
        record(plan)
    return state, plan
