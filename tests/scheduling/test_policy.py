"""What a policy can do besides planning is said by its class."""

import pytest

from layerscope_jax import POLICIES, LayerPlan, PolicyBase, Replay
from layerscope_jax.scheduling.baselines import HostOnly, Resident
from layerscope_jax.scheduling.oracle import Oracle
from layerscope_jax.scheduling.policy import EXTRAS, completed


class Plain:
    """What the documentation asks of a policy, and no more."""

    name, uses_costs = "plain", True

    def init(self, geometry, profile):
        return [geometry, profile]

    def plan(self, state, seen):
        return [*state, seen], LayerPlan(step=0, layer=0)


def test_a_policy_that_only_plans_has_the_defaults():
    policy = Plain()
    whole = completed(policy)
    assert (whole.name, whole.uses_costs) == ("plain", True)
    assert whole.init(1, 2) == [1, 2]
    assert whole.plan([1], "seen") == ([1, "seen"], LayerPlan(step=0, layer=0))
    assert whole.wants_forecast(None)
    assert not whole.awaits_link(None, None)
    assert whole.report(None) is None
    assert completed(whole) is whole


@pytest.mark.parametrize("extra", EXTRAS)
def test_methods_that_would_not_be_called_are_refused(extra):
    policy = type("Mine", (Plain,), {extra: lambda *_: True})()
    with pytest.raises(ValueError, match=f"policy 'plain' has {extra}, .*PolicyBase, got Mine; derive the"):
        completed(policy)
    derived = type("Derived", (Plain, PolicyBase), {extra: lambda *_: True})()
    assert completed(derived) is derived


@pytest.mark.parametrize("policy", [*POLICIES.values(), Replay, Oracle])
def test_our_policies_say_what_they_can_do(policy):
    assert issubclass(policy, PolicyBase)
    says = policy.wants_forecast is not PolicyBase.wants_forecast
    assert policy.spares_forecasts == says
    assert policy.uses_host == (policy is not Resident)
    assert policy.uses_device == (policy is not HostOnly)
