"""How do prefill and decode grow with the batch, the prompt, the model, the budget and the link?

Around one base point each is varied alone: random models, everything else as it is. Time is set beside work:
the least that arithmetic and reading of the same step take, at the rates that this machine reaches in plain
products and plain reading (`work`): dense weights, attention and experts, each bound by whichever of the two
takes longer; for experts by (token, choice) pairs computed or by the bytes of the experts that were chosen.
Where work grows, time may grow with it. A step of an axis in which time grows more than 1.5 times as fast is
a cliff. With a larger budget or a faster link work stays the same, so there any such growth of time is one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.growth_view import draw, growths, tables
from benchmarks.random_models import random_model
from benchmarks.work import Rates, Step
from layerscope_jax import POLICIES, Engine, HardwareProfile, Model, ModelConfig, OffloadConfig
from layerscope_jax.scheduling.plan import LayerPlan
from layerscope_jax.scheduling.registry import FORECASTING
from predictor.scorecard_plots import need_matplotlib

RESIDENT, HOST_ONLY, UNPACED = "resident", "host-only", "unpaced"


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is varied.

    Attributes:
        batch: requests.
        prompt: tokens of each.
        experts: of a layer.
        layers: of the model.
        budget: percent of the bytes of all experts.
        link: bytes a second, or "unpaced".
    """

    batch: int = 4
    prompt: int = 128
    experts: int = 32
    layers: int = 2
    budget: int = 25
    link: str = "500MB"


AXES: dict[str, tuple[Any, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128),
    "prompt": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "experts": (8, 16, 32, 64, 128, 256),
    "layers": (1, 2, 4, 8, 16),
    "budget": (5, 10, 25, 50, 75, 100),
    "link": ("50MB", "500MB", "2GB", UNPACED),
}

QUICK: dict[str, tuple[Any, ...]] = {
    "batch": (2, 4),
    "prompt": (16, 32),
    "experts": (8, 32),
    "layers": (1, 2),
    "budget": (50, 100),
    "link": ("500MB", UNPACED),
}


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    axes: tuple[str, ...] = tuple(AXES)
    policies: tuple[str, ...] = (HOST_ONLY, "auto", RESIDENT)
    """"host-only" and "resident" only where neither budget nor link is varied."""
    new_tokens: int = 8
    rounds: int = 3
    plot: Path | None = None
    """Also draw the results, as PNG; needs matplotlib."""


def shape(point: Point, quick: bool) -> ModelConfig:
    return ModelConfig(
        family="mixtral",
        vocab_size=256 if quick else 2048,
        hidden_size=32 if quick else 256,
        num_layers=point.layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8 if quick else 64,
        num_experts=point.experts,
        experts_per_token=4,
        moe_intermediate_size=32 if quick else 256,
        normalize_top_k=True,
        max_position_embeddings=8192,
    )


class Profiles:
    """Costs for policies that go by them, once for each link: an expert is the same at all points."""

    def __init__(self) -> None:
        self._known: dict[str, HardwareProfile | None] = {}

    def of(self, model: Model, config: OffloadConfig, link: str) -> HardwareProfile | None:
        if link not in self._known:
            with Engine(model, config) as engine:
                self._known[link] = engine.runner.costs
        return self._known[link]


def config_of(policy: str, model: Model, point: Point, profiles: Profiles) -> OffloadConfig:
    if policy == RESIDENT:
        return OffloadConfig(numerics="auto", max_num_seqs=point.batch)
    config = OffloadConfig(
        device_budget=model.bank.total_bytes * point.budget // 100,
        policy=policy,
        numerics="auto",
        emulated_link_bandwidth=None if point.link == UNPACED else point.link,
        predictor="gate" if policy in FORECASTING else None,
        max_num_seqs=point.batch,
    )
    if POLICIES[policy].uses_costs and point.budget < 100:
        config = replace(config, profile=profiles.of(model, config, point.link))
    return config


def run_of(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Callable[[], harness.Parts]:
    """Prefills all prompts, in as many steps as that takes, then decodes them together."""

    def run() -> harness.Parts:
        waiting, steps, prefill = set(range(len(prompts))), [], 0.0
        last = time.perf_counter()
        for event in engine.stream(prompts, max_new_tokens=new_tokens, stop_token_ids=()):
            if waiting:
                waiting.discard(event.request)
                if not waiting:
                    now = time.perf_counter()
                    prefill, last = now - last, now
            elif event.request == 0:  # comes first in every step
                now = time.perf_counter()
                steps.append(now - last)
                last = now
        return {"prefill": prefill, "decode": steps}

    return run


def works(
    engine: Engine, prompts: list[list[int]], new_tokens: int, rates: Rates
) -> dict[str, dict[str, float]]:
    """Least seconds of the prefill, and of a decode step in the mean, part by part."""
    config, itemsize = engine.model.config, engine.model.bank.dtype.itemsize
    cache_itemsize = 4 if engine.device.platform == "cpu" else itemsize
    plans: list[LayerPlan] = engine.generate(
        prompts, max_new_tokens=new_tokens, stop_token_ids=(), record_plans=True
    ).plans
    steps = 1 + max(plan.step for plan in plans)
    prefills = steps - (new_tokens - 1)

    def experts(first: int, end: int) -> int:
        return sum(len(plan.device) + len(plan.host) for plan in plans if first <= plan.step < end)

    rows, width = len(prompts), len(prompts[0])
    read = experts(prefills, steps) // (new_tokens - 1)
    prefill = Step(rows, width, width, experts(0, prefills), prefills)
    decode = Step(rows, 1, width + new_tokens // 2, read)
    return {
        "prefill": prefill.seconds(config, itemsize, cache_itemsize, rates),
        "decode": decode.seconds(config, itemsize, cache_itemsize, rates),
    }


def measure(
    model: Model, point: Point, policies: Sequence[str], options: Options, profiles: Profiles, rates: Rates
) -> list[dict[str, Any]]:
    """All policies at one point, in turns."""
    size = (point.batch, point.prompt)
    prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, size).tolist()
    with contextlib.ExitStack() as stack:
        engines = {}
        for policy in policies:
            engines[policy] = stack.enter_context(Engine(model, config_of(policy, model, point, profiles)))
        samples = harness.measure(
            {name: run_of(engine, prompts, options.new_tokens) for name, engine in engines.items()},
            options.rounds,
        )
        work = {name: works(engine, prompts, options.new_tokens, rates) for name, engine in engines.items()}
    tokens = {"prefill": point.batch * point.prompt, "decode": point.batch}
    return [
        {
            "policy": policy,
            "ms": {phase: harness.spread(1e3 * s for s in found.parts[phase]) for phase in tokens},
            "tokens_per_s": {
                phase: harness.spread(count / s for s in found.parts[phase])
                for phase, count in tokens.items()
            },
            "work_ms": {
                phase: {part: 1e3 * s for part, s in work[policy][phase].items()} for phase in tokens
            },
            "warm_ups": found.warm_ups,
            "compiled_while_timed": found.compiled,
        }
        for policy, found in samples.items()
    ]


def main(options: Options) -> dict[str, Any]:
    unknown = set(options.axes) - set(AXES)
    if unknown:
        raise SystemExit(f"error: axes are {', '.join(AXES)}; got {', '.join(sorted(unknown))}")
    try:
        if options.plot is not None:
            need_matplotlib()  # before the work, not after it
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    base = Point()
    if options.quick:
        options = replace(options, new_tokens=3, rounds=1)
        base = replace(base, prompt=16, budget=50)
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    record, progress = harness.machine(), Console(stderr=True)
    rates, profiles, rows = Rates.measured(options.quick), Profiles(), []
    made: tuple[ModelConfig, Model] | None = None
    for axis in options.axes:
        policies = [
            policy
            for policy in options.policies
            if axis not in ("budget", "link") or policy not in (HOST_ONLY, RESIDENT)
        ]
        for value in (QUICK if options.quick else AXES)[axis] if policies else ():
            point = replace(base, **{axis: value})
            config = shape(point, options.quick)
            if made is None or made[0] != config:
                made = config, random_model(config)
            for row in measure(made[1], point, policies, options, profiles, rates):
                rows.append({"axis": axis, "value": value} | row)
            progress.print(f"measured {axis} {value}")
    result = {
        "benchmark": "growth",
        "quick": options.quick,
        "machine": record,
        "base": vars(base),
        "model": asdict(shape(base, options.quick)),
        "rates": vars(rates),
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "rows": rows,
        "growth": growths(rows),
    }
    tables(result)
    if options.plot is not None:
        draw(result, options.plot)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
