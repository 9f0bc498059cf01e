"""Base class of policies (`PolicyBase`): every method that engine and simulator call, with defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerscope_jax.scheduling.costs import HardwareProfile
    from layerscope_jax.scheduling.plan import Geometry, LayerPlan, Observation, Policy


class PolicyBase:
    """Base class for policies that do more than plan, with defaults for every method that is called.

    Attributes:
        name: name in statistics and tables.
        uses_costs: whether `init` needs a measured `HardwareProfile`.
        uses_forecasts: whether it uses `Observation.forecast`.
        spares_forecasts: whether `wants_forecast` may return false.
        uses_device, uses_host: whether it ever computes an expert on that side.
        predictor: name of the predictor to use if the config names none; None for no predictor.

    >>> class Blind(PolicyBase):
    ...     name, uses_forecasts, spares_forecasts = "blind", False, True
    ...     def wants_forecast(self, state):
    ...         return False
    >>> Blind().uses_costs, Blind().report(None)
    (False, None)
    """

    name: str
    uses_costs: bool = False
    uses_forecasts: bool = True
    spares_forecasts: bool = False
    uses_device: bool = True
    uses_host: bool = True
    predictor: str | None = None

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> Any:
        """Returns the initial state; raises ValueError if the budget is too small for this policy."""
        raise NotImplementedError

    def plan(self, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
        """Returns the next state and the plan for one layer of one step."""
        raise NotImplementedError

    def wants_forecast(self, state: Any) -> bool:
        """Returns whether the layer that begins may use a forecast; if not, no forecast is computed."""
        return True

    def awaits_link(self, state: Any, seen: Observation) -> bool:
        """Returns whether to wait until no copy is in flight before this layer is planned.

        The layer is then planned from what has arrived. It is asked only while copies are in flight, and is
        meant for policies whose plans are made already, such as `Replay`.
        """
        return False

    def report(self, state: Any) -> dict[str, Any] | None:
        """Returns what the policy reports in the statistics (`RunStats.ways`); None for nothing."""
        return None


EXTRAS = ("wants_forecast", "awaits_link", "report")
"""Methods that are called on a `PolicyBase` and not on other policies."""


class OnlyPlans(PolicyBase):
    """Wrapper that makes a `PolicyBase` of a class that has only the methods of a `Policy`."""

    def __init__(self, policy: Policy):
        self.name, self.uses_costs = policy.name, policy.uses_costs
        self.uses_forecasts = getattr(policy, "uses_forecasts", True)
        self._policy = policy

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> Any:
        return self._policy.init(geometry, profile)

    def plan(self, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
        return self._policy.plan(state, seen)


def completed(policy: Policy | PolicyBase) -> PolicyBase:
    """Returns a policy as a `PolicyBase`.

    Raises:
        ValueError: if it has methods of `PolicyBase` but is not derived from it: they would never be called.
    """
    if isinstance(policy, PolicyBase):
        return policy
    unasked = [name for name in EXTRAS if hasattr(policy, name)]
    if unasked:
        raise ValueError(
            f"policy {policy.name!r} has {', '.join(unasked)}, called only on classes derived from "
            f"layerscope_jax.PolicyBase, got {type(policy).__name__}; derive the class from PolicyBase"
        )
    return OnlyPlans(policy)
