"""Makes simulated.json: what a step takes under every policy on every shipped profile, on the virtual clock.

`tests/simulation/test_simulated_golden.py` compares. Where a change of these times is meant:

    python tools/make_simulated.py

prints what changed and writes the file anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from layerscope_jax.profiling.machine_profile import MachineProfile, names
from layerscope_jax.simulation.policies import BATCHES, SIMULATED, refusals, run, workloads
from layerscope_jax.simulation.routing import PROFILES, Routing
from layerscope_jax.support.files import write_file
from layerscope_jax.support.json_fields import readable

FILE = Path(__file__).parents[1] / "tests" / "golden" / "simulated.json"
COMMAND = "python tools/make_simulated.py"

DEFAULTS = ("presched", "auto")
"""Policies that no change may make slower."""

PHASES = ("prefill", "decode")
PREDICTOR = "llapor"
STEPS = 16
"""Decode steps that are compared: some tell as much as all, and sooner."""
SAME = 1e-9
"""Relative difference of times that count as equal."""


class Step(NamedTuple):
    """Which step a time is of."""

    profile: str
    batch: int
    policy: str
    phase: str


class Change(NamedTuple):
    """A time in milliseconds, before and now; None where there is none."""

    step: Step
    before: float | None
    after: float | None

    @property
    def slower(self) -> bool:
        return self.before is not None and self.after is not None and self.after > self.before

    @property
    def forbidden(self) -> bool:
        return self.step.policy in DEFAULTS and (self.slower or self.after is None)


def profiles() -> list[str]:
    """Shipped profiles, each over its own link, whose routing is there."""
    base = [name for name in names() if "@" not in name]
    return [name for name in base if (PROFILES / f"{MachineProfile.load(name).routing}.npz").is_file()]


def measure(
    profile: MachineProfile, routing: Routing, batches: Iterable[int], policies: Iterable[str]
) -> dict[Step, float]:
    """Milliseconds of the prefill, and of a decode step on average, of policies that run in the budget."""
    geometry, costs, routing = profile.geometry(), profile.costs, routing.shortened(STEPS)
    refused = refusals(policies := tuple(policies), geometry, costs)
    found = {}
    for batch in batches:
        demand = workloads(routing, batch, PREDICTOR)
        for policy in policies:
            if policy not in refused:
                for part, result in zip(demand, run(policy, demand, geometry, costs), strict=True):
                    step_ms = result.total_ms / len(result.step_ms)
                    found[Step(profile.name, batch, policy, part.phase)] = step_ms
    return found


def changes(before: Mapping[Step, float], after: Mapping[Step, float]) -> list[Change]:
    """What is not the same: the forbidden first, then by what it is of."""
    steps = sorted(before.keys() | after.keys())
    found = [Change(step, before.get(step), after.get(step)) for step in steps]
    differing = [
        change
        for change in found
        if change.before is None
        or change.after is None
        or abs(change.after - change.before) > SAME * abs(change.before)
    ]
    return sorted(differing, key=lambda change: not change.forbidden)


def report(found: Iterable[Change]) -> str:
    """A table of changes, the slower default policies marked, and what to do."""
    found = list(found)
    lines = [f"  {'profile':18}{'batch':>5} {'policy':16}{'phase':8}{'before':>12}{'after':>12}{'ratio':>10}"]
    for change in found:
        step, before, after = change
        times = "".join(f"{'-' if ms is None else format(ms, '.6g'):>12}" for ms in (before, after))
        ratio = f"{after / before:10.6f}" if before and after is not None else f"{'-':>10}"
        lines.append(
            f"{'!' if change.forbidden else ' '} {step.profile:18}{step.batch:5} {step.policy:16}"
            f"{step.phase:8}{times}{ratio}"
        )
    if any(change.forbidden for change in found):
        lines.append(f"slower by default (!): {' and '.join(DEFAULTS)} must not lose time anywhere")
    lines.append(f"if this is meant, make {FILE.name} again: {COMMAND}")
    return "\n".join(lines)


def read(file: Path = FILE) -> dict[Step, float]:
    """The times in the file."""
    return {
        Step(profile, int(batch), policy, phase): ms
        for profile, batches in json.loads(file.read_text()).items()
        for batch, policies in batches.items()
        for policy, both in policies.items()
        for phase, ms in zip(PHASES, both, strict=True)
    }


def write(times: Mapping[Step, float], file: Path = FILE) -> None:
    """Writes the file: profile -> batch -> policy -> milliseconds of prefill and of decode."""
    nested: dict = {}
    for step in times:
        batch = nested.setdefault(step.profile, {}).setdefault(str(step.batch), {})
        batch[step.policy] = [times[step._replace(phase=phase)] for phase in PHASES]
    text = readable(nested) + "\n"
    write_file(file, text)


def main() -> None:
    """Measures everything, prints what changed and writes it."""
    after: dict[Step, float] = {}
    for name in profiles():
        profile = MachineProfile.load(name)
        after |= measure(profile, Routing.shipped(str(profile.routing)), BATCHES, SIMULATED)
    before = read() if FILE.is_file() else {}
    found = changes(before, after)
    print(report(found) if before and found else f"{len(after)} times, {len(found)} of them new")
    write(after)


if __name__ == "__main__":
    main()
