"""What a policy can do besides planning, said by its class, with defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerscope_jax.scheduling.costs import HardwareProfile
    from layerscope_jax.scheduling.plan import Geometry, LayerPlan, Observation, Policy


class PolicyBase:
    """A `Policy`, and all else that engine and simulator ask of one; derive from it to say more than plans.

    Attributes:
        name: as in statistics and tables.
        uses_costs: whether `init` needs a measured `HardwareProfile`.
        uses_forecasts: whether it uses `Observation.forecast`.
        spares_forecasts: whether `wants_forecast` is ever false.
        uses_device, uses_host: whether it ever computes an expert there.
        predictor: the predictor that an engine gives it where none was chosen; None for no predictor.

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
        """The first state. Raises ValueError if the budget is too small for this policy."""
        raise NotImplementedError

    def plan(self, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
        """Decides one layer of one step."""
        raise NotImplementedError

    def wants_forecast(self, state: Any) -> bool:
        """Whether the layer that begins may make use of a forecast; if not, it is not computed."""
        return True

    def awaits_link(self, state: Any, seen: Observation) -> bool:
        """Whether this layer is to be planned only when nothing is on its way any more.

        What is seen then has arrived. Asked only where something is on its way; for policies whose plans are
        made already, as `Replay`'s.
        """
        return False

    def report(self, state: Any) -> dict[str, Any] | None:
        """What the policy has to say in the statistics (`RunStats.ways`); None for nothing."""
        return None


EXTRAS = ("wants_forecast", "awaits_link", "report")
"""What is asked of a `PolicyBase` and not of other policies."""


class OnlyPlans(PolicyBase):
    """A policy that has the parts of a `Policy` and no more."""

    def __init__(self, policy: Policy):
        self.name, self.uses_costs = policy.name, policy.uses_costs
        self.uses_forecasts = getattr(policy, "uses_forecasts", True)
        self._policy = policy

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> Any:
        return self._policy.init(geometry, profile)

    def plan(self, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
        return self._policy.plan(state, seen)


def completed(policy: Policy | PolicyBase) -> PolicyBase:
    """A policy with all that may be asked of it.

    Raises:
        ValueError: if it has methods that would not be called, as its class does not say that it has them.
    """
    if isinstance(policy, PolicyBase):
        return policy
    unasked = [name for name in EXTRAS if hasattr(policy, name)]
    if unasked:
        raise ValueError(
            f"policy {policy.name!r} has {', '.join(unasked)}, asked only of classes derived from "
            f"layerscope_jax.PolicyBase, got {type(policy).__name__}; derive it from that"
        )
    return OnlyPlans(policy)
