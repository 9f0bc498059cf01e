"""Policies by name: those of this package, and those that other code registers."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, TypeVar

from layerscope_jax.scheduling.balanced import DALI, HybriMoE
from layerscope_jax.scheduling.baselines import HostOnly, OnDemand, Resident
from layerscope_jax.scheduling.caching import ARC, LFU, LRU, LeastStale
from layerscope_jax.scheduling.guard import Guard
from layerscope_jax.scheduling.hybrid import BandwidthSplit, Fiddler
from layerscope_jax.scheduling.in_step import InStep
from layerscope_jax.scheduling.plan import Policy
from layerscope_jax.scheduling.policy import PolicyBase
from layerscope_jax.scheduling.prefetching import Fate, Klotski, ProMoE
from layerscope_jax.scheduling.presched import PreSched
from layerscope_jax.scheduling.presched_paper import PaperPreSched
from layerscope_jax.support.plugins import entry_points_of, load

GROUP = "layerscope.policies"
"""Entry points of this group add policies: `fifo = "my_module:FIFO"`, under the name that the class has."""

PARTS = ("name", "uses_costs", "init", "plan")
"""What a policy must have; see `layerscope_jax.scheduling.plan.Policy`."""

Registered = TypeVar("Registered", bound=type[Any])

POLICIES: dict[str, type[PolicyBase]] = {
    policy.name: policy
    for policy in (
        OnDemand,
        LRU,
        LFU,
        ARC,
        LeastStale,
        InStep,
        HostOnly,
        Fiddler,
        BandwidthSplit,
        HybriMoE,
        DALI,
        Fate,
        ProMoE,
        Klotski,
        PaperPreSched,
        PreSched,
        Guard,
        Resident,
    )
}
"""Policies by name, as `OffloadConfig.policy` takes them."""

FORECASTING = {name for name, policy in POLICIES.items() if policy.uses_forecasts}
"""Names of the policies that use a predictor's forecasts."""


def register_policy(policy: Registered) -> Registered:
    """Makes a policy available by its name: in `OffloadConfig`, on the command line and in the simulator.

    It can be used as a decorator. Registering a class again has no effect.

    Args:
        policy: a class that can be instantiated without arguments. It has the attributes and methods of a
            `Policy`, and `uses_forecasts`: whether it uses `Observation.forecast`.

    Returns:
        The same class.

    Raises:
        ValueError: if it lacks a part, or another policy has its name.

    >>> class Nothing:
    ...     name, uses_costs, uses_forecasts = "lru", False, False
    ...     def init(self, geometry, profile): ...
    ...     def plan(self, state, seen): ...
    >>> register_policy(Nothing)
    Traceback (most recent call last):
    ValueError: a policy is named 'lru' already: layerscope_jax.scheduling.caching.LRU; choose another name
    """
    parts = (*PARTS, "uses_forecasts")
    missing = [part for part in parts if not hasattr(policy, part)]
    if not isinstance(policy, type) or missing:
        raise ValueError(
            f"a policy must be a class with {', '.join(parts)}; got {policy!r}, which "
            f"{'has no ' + ', '.join(missing) if missing else 'is not a class'}"
        )
    name: Any = policy.name  # type: ignore[attr-defined]
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a policy must be text, such as 'fifo', got {name!r}")
    other = POLICIES.setdefault(name, policy)
    if other is not policy:
        raise ValueError(
            f"a policy is named {name!r} already: {other.__module__}.{other.__qualname__}; "
            "choose another name"
        )
    if policy.uses_forecasts:  # type: ignore[attr-defined]
        FORECASTING.add(name)
    return policy


def policy_names() -> list[str]:
    """Returns the names of all policies, those of installed packages included, which are not imported."""
    return sorted({*POLICIES, *entry_points_of(GROUP)})


def is_policy(name: str) -> bool:
    """Whether there is a policy of this name; if an installed package adds it, it is imported.

    Raises:
        ValueError: if the package cannot be imported, or adds another policy than it says.
    """
    if name not in POLICIES and (point := entry_points_of(GROUP).get(name)) is not None:
        policy = register_policy(load(point))
        if policy.name != name:
            raise ValueError(
                f"entry point {name!r} must name a policy of that name, got {policy.name!r} ({point.value}); "
                "give both the same name"
            )
    return name in POLICIES


def make_policy(policy: str | Policy) -> Policy:
    """Makes a policy from its name; returns a `Policy` object as it is.

    Raises:
        ValueError: if it is neither, with the names of all policies.
    """
    if isinstance(policy, str) and is_policy(policy):
        return POLICIES[policy]()
    missing = [part for part in PARTS if not hasattr(policy, part)]
    if isinstance(policy, str | type) or missing:
        raise ValueError(
            f"policy must be one of {', '.join(policy_names())} or a Policy object, got {policy!r}"
            f"{_hint(policy, missing)}"
        )
    return policy


def _hint(policy: Any, missing: list[str]) -> str:
    """Returns what to change about a value that is not a policy."""
    if isinstance(policy, str):
        near = get_close_matches(policy, policy_names(), 1)
        return f"; did you mean {near[0]!r}?" if near else ""
    if isinstance(policy, type):
        return "; make an object of the class"
    return f", which has no {', '.join(missing)}"
