"""A policy of one's own: the one that docs/write_policy.md writes, against two of the package's.

    python examples/own_policy.py [checkpoint]

`examples/extend/policy.py` is one that can be installed, so that the command line knows it too.
"""

from __future__ import annotations

import sys

import layerscope_jax as ls
from layerscope_jax.scheduling.demand import answer, busiest_first, present


@ls.register_policy
class Twice:
    """Copies an expert when it is needed for the second time."""

    name = "twice"
    uses_costs = False  # `init` needs no measured costs
    uses_forecasts = False  # `plan` looks at no forecast

    def init(self, geometry, profile):
        return geometry.slots, {}  # how many experts fit; when each was last used

    def plan(self, state, seen):
        slots, used = state
        needed = [ls.ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
        ready = [expert for expert in needed if present(expert, seen)]
        again = [expert for expert in needed if expert in used and expert not in ready]

        room = slots - len(seen.resident) - len(seen.in_flight)
        oldest = sorted(set(seen.resident) - set(needed), key=lambda expert: (used.get(expert, -1), expert))
        evict = oldest[: max(0, len(again) - room)]
        load = again[: room + len(evict)]

        device = [expert.expert for expert in ready + load]  # the host computes the others
        now = 1 + max(used.values(), default=0)
        return (slots, used | dict.fromkeys(needed, now)), answer(seen, device, evict=evict, load=load)


def main(checkpoint: str = "shipped") -> None:
    """Prints what three policies did with the same prompts: the tokens are the same, the work is not."""
    model, prompts = ls.load(checkpoint), ["Call me Ishmael.", "def main():"]
    tokens = []
    for policy in ("lru", "host-only", "twice"):
        config = ls.OffloadConfig(device_budget=model.bank.total_bytes // 2, policy=policy)
        with ls.Engine(model, config) as engine:
            completions = engine.generate(prompts, max_new_tokens=8)
        stats = completions.stats
        tokens.append(completions.token_ids)
        print(f"{policy:10} {stats.hit_rate:4.0%} hits, {stats.bytes_moved / 1e6:5.1f} MB moved")
    assert tokens[0] == tokens[1] == tokens[2]


if __name__ == "__main__":
    main(*sys.argv[1:])
