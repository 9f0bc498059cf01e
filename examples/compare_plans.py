"""Comparing plans: what two policies decided in the same run, and what they would cost on another machine.

python examples/compare_plans.py [checkpoint]
"""

from __future__ import annotations

import sys
from collections import Counter

import layerscope_jax as ls

POLICIES = ("lru", "least-stale")


def decided(model: ls.Model, policy: str) -> dict[tuple[int, int], ls.LayerPlan]:
    """Returns a policy's plans, by step and layer."""
    config = ls.OffloadConfig(device_budget=model.bank.total_bytes // 2, policy=policy)
    with ls.Engine(model, config) as engine:
        completions = engine.generate(["Call me Ishmael."], max_new_tokens=6, record_plans=True)
    assert completions.plans is not None
    return {(plan.step, plan.layer): plan for plan in completions.plans}


def main(checkpoint: str = "shipped") -> None:
    """Prints totals, where the plans part first, and simulated times on a machine of the paper."""
    model = ls.load(checkpoint)
    plans = {policy: decided(model, policy) for policy in POLICIES}
    for policy, of_policy in plans.items():
        totals = Counter[str]()
        for plan in of_policy.values():
            totals.update({name: len(getattr(plan, name)) for name in ("device", "host", "load", "evict")})
        print(f"{policy:12} " + ", ".join(f"{count} x {name}" for name, count in totals.items()))

    first, second = plans.values()
    parted = [at for at in first if set(first[at].load) != set(second[at].load)]
    for step, layer in parted[:1]:
        for policy, mine, other in zip(POLICIES, (first, second), (second, first), strict=True):
            only = set(mine[step, layer].load).difference(other[step, layer].load)
            names = ", ".join(str(expert.expert) for expert in sorted(only)) or "none"
            print(f"step {step}, layer {layer}: only {policy} loads {names}")

    policies = [*POLICIES, "fiddler", "presched"]
    comparison = ls.simulate_profile("mixtral-8x7b", batches=[1], steps=8, policies=policies)
    for row in comparison.rows:
        if row.phase == "decode":
            print(f"{row.policy:12} {1e3 * row.step_s:7.1f} ms a step, {row.share_of_bound:.0%} of the bound")


if __name__ == "__main__":
    main(*sys.argv[1:])
