"""All policies by name."""

from __future__ import annotations

from layerscope_jax.scheduling.balanced import DALI, HybriMoE
from layerscope_jax.scheduling.baselines import HostOnly, OnDemand, Resident
from layerscope_jax.scheduling.caching import ARC, LFU, LRU, LeastStale
from layerscope_jax.scheduling.guard import Guard
from layerscope_jax.scheduling.hybrid import BandwidthSplit, Fiddler
from layerscope_jax.scheduling.plan import Policy
from layerscope_jax.scheduling.policy import PolicyBase
from layerscope_jax.scheduling.prefetching import Fate, Klotski, ProMoE
from layerscope_jax.scheduling.presched import PreSched
from layerscope_jax.scheduling.presched_paper import PaperPreSched

POLICIES: dict[str, type[PolicyBase]] = {
    policy.name: policy
    for policy in (
        OnDemand,
        LRU,
        LFU,
        ARC,
        LeastStale,
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

FORECASTING = frozenset(name for name, policy in POLICIES.items() if policy.uses_forecasts)
"""Those that make use of a predictor."""


def make_policy(policy: str | Policy) -> Policy:
    """A policy from its name, or the object itself.

    Raises:
        ValueError: with the names there are, if it is neither.
    """
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]()
    parts = ("name", "uses_costs", "init", "plan")
    if isinstance(policy, str | type) or not all(hasattr(policy, part) for part in parts):
        hint = "; make an object of the class" if isinstance(policy, type) else ""
        raise ValueError(
            f"policy must be one of {', '.join(sorted(POLICIES))} or a Policy object, with "
            f"{', '.join(parts)}, got {policy!r}{hint}"
        )
    return policy
