"""How far off is the simulator?

The machine is calibrated; a trained model continues real prompts under several policies on a paced link;
and the simulator, given what was calibrated and what the engine's layers asked for, says how long each step
should take. Both begin with an empty device and go through the same calls; those after the warm-up are
compared. Layers are calibrated at the run's own batch and context. The virtual clock stands still while a
policy thinks: how long each thought is measured, and added in a comparison beside.

Machines drift: two cores of a shared server are at times half as fast again as a minute before. So
calibrating and running take turns, and the means over all turns are compared.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.bench_policies import SHIPPED, read_prompts
from layerscope_jax import (
    POLICIES,
    Engine,
    HardwareProfile,
    LayerPlan,
    Model,
    OffloadConfig,
    PolicyBase,
    load,
)
from layerscope_jax.generation.scheduler import batch_rows, bucket
from layerscope_jax.profiling.calibrate import THOROUGH, calibrate
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.profiling.measure import Points
from layerscope_jax.scheduling.plan import Geometry, Observation
from layerscope_jax.scheduling.policy import completed
from layerscope_jax.scheduling.registry import FORECASTING
from layerscope_jax.simulation.simulator import Workload, simulate

APART = 1.05
"""Policies whose measured times differ by more have an order that the simulator should find."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to compare."""

    checkpoint: Path = SHIPPED
    prompts: Path | None = None
    """JSON lines with a "prompt" each; prompts.jsonl in the checkpoint's folder if left out."""
    policies: tuple[str, ...] = (
        "host-only",
        "lru",
        "fiddler",
        "hybrimoe",
        "presched",
        "presched-paper",
        "auto",
    )
    budget: int = 25
    """Percent of the bytes of all experts."""
    link: str = "100MB"
    """Bytes a second."""
    batch: int = 8
    new_tokens: int = 32
    turns: int = 4
    """Calibrations, each followed by runs."""
    rounds: int = 2
    """Timed runs of a turn."""


class Turn(NamedTuple):
    """What one layer of one step was about."""

    demand: Mapping[int, int]
    forecast: Sequence[Sequence[float]]
    plan_ms: float


class Recording(PolicyBase):
    """A policy, with a record of what it was shown and how long it thought; else it is as that policy."""

    def __init__(self, policy: PolicyBase):
        self.policy, self.turns = policy, list[Turn]()
        for name in inspect.get_annotations(PolicyBase):
            setattr(self, name, getattr(policy, name))

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> Any:
        return self.policy.init(geometry, profile)

    def wants_forecast(self, state: Any) -> bool:
        return self.policy.wants_forecast(state)

    def awaits_link(self, state: Any, seen: Observation) -> bool:
        return self.policy.awaits_link(state, seen)

    def report(self, state: Any) -> dict[str, Any] | None:
        return self.policy.report(state)

    def plan(self, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
        began = time.perf_counter()
        found = self.policy.plan(state, seen)
        self.turns.append(Turn(seen.demand, seen.forecast, 1e3 * (time.perf_counter() - began)))
        return found

    def calls(
        self, geometry: Geometry, steps: int, known: Sequence[Turn] = ()
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Counts [S, L, E] and forecasts [S, L, W, E] of each call of `steps` steps.

        Args:
            known: turns of a call with the same prompts, whose forecasts stand where this policy wanted none.
        """
        counts = np.zeros((len(self.turns), geometry.num_experts), int)
        for turn, (demand, *_) in enumerate(self.turns):
            counts[turn, list(demand)] = list(demand.values())
        forecasts = [turn.forecast for turn in self.turns]
        if known and any(forecasts):
            forecasts = [own or known[turn % len(known)].forecast for turn, own in enumerate(forecasts)]
        shape = (-1, steps, geometry.num_layers)
        found = counts.reshape(*shape, geometry.num_experts)
        if not all(forecasts):
            return [(call, None) for call in found]
        expected = np.array(forecasts)
        return list(zip(found, expected.reshape(*shape, *expected.shape[1:]), strict=True))


def simulated(
    recording: Recording,
    geometry: Geometry,
    costs: HardwareProfile,
    steps: int,
    tokens: tuple[int, int],
    known: Sequence[Turn] = (),
) -> list[list[float]]:
    """Milliseconds of each step of each call.

    Args:
        recording: of the engine's policy; another of its kind is simulated.
        geometry, costs: of model and machine.
        steps: of a call; the first is its prefill.
        tokens: that are computed in a prefill, padding too, and in a decode step.
        known: see `Recording.calls`.
    """
    workloads = []
    for counts, forecasts in recording.calls(geometry, steps, known):
        parts: Any = (("prefill", slice(0, 1)), ("decode", slice(1, None)))
        for (phase, part), size in zip(parts, tokens, strict=True):
            expected = None if forecasts is None else forecasts[part]
            workloads.append(Workload(phase=phase, tokens=size, counts=counts[part], forecasts=expected))
    found = simulate(type(recording.policy)(), workloads, geometry, costs)
    times = [run.step_ms for run in found]
    return [[*first, *rest] for first, rest in zip(times[::2], times[1::2], strict=True)]


def sizes(prompts: list[list[int]], new_tokens: int) -> tuple[int, int, int]:
    """Tokens computed in the prefill, padding too, and in a decode step; positions of the caches."""
    rows, longest = batch_rows(len(prompts)), max(map(len, prompts))
    return rows * bucket(longest, 16), rows, bucket(longest + new_tokens, 64)


def compare(
    model: Model, prompts: list[list[int]], profile: MachineProfile, options: Options
) -> dict[str, Any]:
    """Each policy, run and simulated after a calibration: ms of each step, medians over the rounds."""
    budget = model.bank.total_bytes * options.budget // 100
    geometry = profile.geometry(budget // model.bank.expert_bytes)
    recordings = {name: Recording(completed(POLICIES[name]())) for name in options.policies}

    def run(engine: Engine) -> Callable[[], harness.Parts]:
        return lambda: harness.run_engine(engine, prompts, options.new_tokens)[0]

    with contextlib.ExitStack() as stack:
        calls = {}
        for name, recording in recordings.items():
            config = OffloadConfig(
                device_budget=budget,
                policy=recording,
                emulated_link_bandwidth=options.link,
                numerics="auto",
                profile=profile,
                predictor="gate" if name in FORECASTING else None,
            )
            calls[name] = run(stack.enter_context(Engine(model, config)))
        samples = harness.measure(calls, options.rounds)
    tokens = sizes(prompts, options.new_tokens)[:2]
    found, each = {}, options.new_tokens * geometry.num_layers
    known: Sequence[Turn] = ()  # every call is of the same prompts
    for recording in recordings.values():
        if all(turn.forecast for turn in recording.turns[-each:]):
            known = recording.turns[-each:]
    for name, recording in recordings.items():
        parts = samples[name].parts
        predicted = simulated(recording, geometry, profile.costs, options.new_tokens, tokens, known)
        kept = np.array(predicted[-options.rounds :])
        measured = 1e3 * np.array(parts["step"]).reshape(options.rounds, -1)
        turns = recording.turns[-options.rounds * options.new_tokens * geometry.num_layers :]
        found[name] = {
            "prefill_ms": {
                "measured": float(np.median(parts["first"])) * 1e3,
                "predicted": float(np.median(kept[:, 0])),
            },
            "decode_ms": {
                "measured": np.median(measured, 0).tolist(),
                "predicted": np.median(kept[:, 1:], 0).tolist(),
            },
            "planning_ms": float(np.mean([turn.plan_ms for turn in turns])) * geometry.num_layers,
            "compiled_while_timed": samples[name].compiled,
        }
    return found


def together(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over turns of what `compare` returns; of what was compiled the sum."""

    def mean(*values: Any) -> Any:
        return np.mean(values, 0).tolist()

    return {
        name: {
            "prefill_ms": jax.tree.map(mean, *(turn[name]["prefill_ms"] for turn in turns)),
            "decode_ms": {
                way: mean(*(turn[name]["decode_ms"][way] for turn in turns))
                for way in ("measured", "predicted")
            },
            "planning_ms": mean(*(turn[name]["planning_ms"] for turn in turns)),
            "compiled_while_timed": sum(turn[name]["compiled_while_timed"] for turn in turns),
            "decode_ms_by_turn": {
                way: [float(np.mean(turn[name]["decode_ms"][way])) for turn in turns]
                for way in ("measured", "predicted")
            },
        }
        for name in turns[0]
    }


def ordering(measured: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, Any]:
    """Kendall's tau of two rankings, and pairs that are clearly apart but were ordered the other way.

    >>> ordering({"a": 1.0, "b": 2.0, "c": 2.02}, {"a": 3.0, "b": 2.0, "c": 1.0})
    {'kendall_tau': -1.0, 'wrong': [['a', 'b'], ['a', 'c']]}
    """
    signs, wrong = [], []
    for a, b in itertools.combinations(measured, 2):
        signs.append(np.sign(measured[a] - measured[b]) * np.sign(predicted[a] - predicted[b]))
        apart = max(measured[a], measured[b]) > APART * min(measured[a], measured[b])
        if apart and signs[-1] <= 0:
            wrong.append([a, b])
    return {"kendall_tau": float(np.mean(signs)) if signs else 1.0, "wrong": wrong}


def errors(row: Mapping[str, Any], planning: bool) -> np.ndarray:
    """Of each decode step, relative to what was measured; with the measured time of planning added or not."""
    predicted = np.array(row["decode_ms"]["predicted"]) + planning * row["planning_ms"]
    return predicted / np.array(row["decode_ms"]["measured"]) - 1


def summary(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Absolute errors over all policies and decode steps, and over prefills; the rankings."""
    found: dict[str, Any] = {}
    for name, planning in (("decode_error", False), ("decode_error_with_planning", True)):
        each = np.abs([errors(row, planning) for row in rows.values()])
        found[name] = {"mean": float(np.mean(each)), "p90": float(np.quantile(each, 0.9))}
    prefills = [row["prefill_ms"] for row in rows.values()]
    found["prefill_error"] = float(np.mean([abs(p["predicted"] / p["measured"] - 1) for p in prefills]))
    measured, predicted = (
        {name: float(np.mean(row["decode_ms"][way])) for name, row in rows.items()}
        for way in ("measured", "predicted")
    )
    return found | ordering(measured, predicted)


def table(rows: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    lines = []
    for name, row in rows.items():
        measured, predicted = (np.mean(row["decode_ms"][way]) for way in ("measured", "predicted"))
        first = row["prefill_ms"]
        each = np.abs(errors(row, False))
        lines.append(
            (
                name,
                f"{measured:.1f}",
                f"{predicted:.1f}",
                f"{100 * (predicted / measured - 1):+.0f}%",
                f"{100 * each.mean():.0f}% ({100 * np.quantile(each, 0.9):.0f}%)",
                f"{row['planning_ms']:.1f}",
                f"{100 * ((predicted + row['planning_ms']) / measured - 1):+.0f}%",
                f"{first['measured']:.0f}",
                f"{first['predicted']:.0f}",
                f"{100 * (first['predicted'] / first['measured'] - 1):+.0f}%",
            )
        )
    headings = ("policy", "decode step ms", "simulated", "off by", "of a step (p90)", "planning ms")
    more = ("with it off by", "prefill ms", "simulated", "off by")
    harness.print_table("Engine and simulator", (*headings, *more), lines)
    plain, planned = found["decode_error"], found["decode_error_with_planning"]
    wrong = ", ".join(" and ".join(pair) for pair in found["wrong"]) or "none"
    print(
        f"\nError of a decode step: mean {100 * plain['mean']:.1f}%, p90 {100 * plain['p90']:.1f}%; "
        f"with planning added: {100 * planned['mean']:.1f}%, {100 * planned['p90']:.1f}%; "
        f"of a prefill: mean {100 * found['prefill_error']:.1f}%\n"
        f"Kendall's tau of the rankings: {found['kendall_tau']:.2f}; "
        f"more than {100 * (APART - 1):.0f}% apart, but ordered the other way: {wrong}"
    )


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        options = Options(**(vars(options) | {"new_tokens": 3, "turns": 1, "rounds": 1}))
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    try:
        model = load(options.checkpoint)
        file = options.prompts or options.checkpoint / "prompts.jsonl"
        prompts = read_prompts(file, model, options.new_tokens)[: options.batch]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    record, progress = harness.machine(), Console(stderr=True)
    prefill, decode, context = sizes(prompts, options.new_tokens)
    points = Points(
        tokens=(1, 64) if options.quick else THOROUGH.tokens,
        decode=(decode,),
        prefill=(prefill,),
        context=context,
    )
    profiles, compared = [], []
    for turn in range(options.turns):
        profiles.append(
            calibrate(
                model,
                device_budget=model.bank.total_bytes * options.budget // 100,
                emulated_link_bandwidth=options.link,
                points=points,
                contexts=(),
            )
        )
        progress.print(f"turn {turn + 1}: calibrated in {profiles[-1].details['seconds']} s")
        compared.append(compare(model, prompts, profiles[-1], options))
    rows = together(compared)
    found = summary(rows)
    result = {
        "benchmark": "simulator",
        "quick": options.quick,
        "machine": record,
        "profiles": [profile.to_json() for profile in profiles],
        "budget_percent": options.budget,
        "link": options.link,
        "batch": len(prompts),
        "new_tokens": options.new_tokens,
        "turns": options.turns,
        "rounds": options.rounds,
        "summary": found,
        "policies": rows,
    }
    table(rows, found)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
