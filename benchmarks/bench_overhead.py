"""What does a layer cost beyond arithmetic and copying?

An engine decodes within a budget, layer by layer, once as it is and once with its parts' calls timed: for
each, the microseconds of a layer that its own Python and dispatching take. Time in which some thread
computes is arithmetic, wherever the engine's thread is meanwhile; what is left is time in which none does.
The timed calls wrap those of the real engine, in this process alone; what timing costs is taken off, and the
parts are added up again and compared with the steps that were not timed.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.bench_policies import SHIPPED
from benchmarks.random_models import random_decoder
from benchmarks.stopwatch import Stopwatch
from layerscope_jax import Engine, Model, ModelConfig, OffloadConfig, load, save
from layerscope_jax.kernels import cpu
from layerscope_jax.runtime import decisions, layerwise
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.scheduling.guard import Guard
from layerscope_jax.scheduling.registry import FORECASTING

ARITHMETIC = ("attention", "experts", "experts, meanwhile")
COPYING = ("waiting for copies",)
REST = "reading back, and the rest"
RESIDENT = "resident"


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    models: tuple[str, ...] = ("wide", "shipped")
    """wide: random weights, some 10 ms a layer; shipped: the model that comes with the package."""
    policies: tuple[str, ...] = ("auto", "presched", "host-only", RESIDENT)
    batch: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 33
    budget: int = 25
    """Percent of the bytes of all experts; "resident" has them all."""
    rounds: int = 2


def wide(quick: bool) -> ModelConfig:
    """Four layers of 64 experts of 7 MB, of which 8 tokens read about 42: 300 MB a layer."""
    sizes = (
        {"hidden_size": 32, "moe_intermediate_size": 8}
        if quick
        else {"hidden_size": 1024, "moe_intermediate_size": 1152}
    )
    return ModelConfig(
        family="olmoe",
        vocab_size=256,
        num_layers=2 if quick else 4,
        num_heads=2 if quick else 16,
        num_kv_heads=2 if quick else 4,
        head_dim=16 if quick else 64,
        num_experts=64,
        experts_per_token=8,
        normalize_top_k=False,
        qk_norm="all",
        max_position_embeddings=256,
        **sizes,
    )


@contextlib.contextmanager
def timed_parts(engine: Engine, watch: Stopwatch) -> Iterator[None]:
    """Puts timed calls in place of the engine's own, as long as this is entered."""
    runner = engine.runner
    assert isinstance(runner, layerwise.LayerByLayer)
    device, host, residency = runner.device_experts, runner.host_experts, runner.residency

    def attending(call: Callable) -> Callable:
        dispatch = watch.timed(call, "dispatching attention")
        await_ = watch.timed(jax.block_until_ready, "attention")

        def attend(*arguments: Any) -> Any:
            found = dispatch(*arguments)
            await_((found[2], found[5]))
            return found

        return attend

    def products(call: Callable) -> Callable:
        """XLA's products, waited for."""
        return watch.timed(lambda *some: jax.block_until_ready(call(*some)), "experts", arithmetic=True)

    def looping(call: Callable) -> Callable:
        def loops(*arguments: Any) -> tuple[Callable, int]:
            share, count = call(*arguments)
            return watch.timed(share, "experts", arithmetic=True), count

        return loops

    def starting(call: Callable) -> Callable:
        def start(*arguments: Any) -> Any:
            future = call(*arguments)
            future.result = watch.timed(future.result, "waiting for the host's thread")
            return future

        return watch.timed(start, "starting the host's thread")

    policy = engine.policy
    parts: list[tuple[Any, str, str | Callable]] = [
        (runner.dense, "attend_alone", attending),
        (layerwise, "Assignments", "sorting assignments"),
        (runner.tier, "absorb", "arrivals"),
        (runner, "_decide", "deciding, the rest"),
        (runner.forecasts, "read", "forecast"),
        (policy, "plan", "policy.plan"),
        (decisions, "check_plan", "check_plan"),
        (Meter, "count", "statistics"),
        (residency, "follow", "residency.follow"),
        (runner.transfers, "drop", "transfers.drop"),
        (runner.transfers, "submit", "transfers.submit"),
        (runner.transfers, "wait", "waiting for copies"),
        (layerwise, "read", "reading back"),
        (device, "begin", "experts before the routing is read"),
        (device, "run", "around the experts"),
        (device, "take", "rows of the device"),
        (device, "place", "rows of the device"),
        (host, "compute", "around the experts"),
        (host, "start", starting),
        (runner.forecasts, "learn", "forecasts.learn"),
        (cpu.CpuExperts, "_loops", looping),
        (cpu, "grouped_rows", products),
    ]
    programs = runner.dense.programs
    with contextlib.ExitStack() as stack:
        runner.dense.programs = programs._replace(attend_and_route=attending(programs.attend_and_route))
        stack.callback(setattr, runner.dense, "programs", programs)
        for owner, name, part in parts:
            call = getattr(owner, name)
            new = watch.timed(call, part) if isinstance(part, str) else part(call)
            stack.enter_context(replaced(owner, name, new))
        stack.enter_context(replaced(runner, "_layer", watch.outermost(runner._layer, REST)))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """An attribute, for a while."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def timed_run(engine: Engine, prompts: list[list[int]], options: Options) -> dict[str, Any]:
    """One `generate` with timed parts: for each decode step, the mean seconds of a layer in each part."""
    watch = Stopwatch()
    with timed_parts(engine, watch):
        found, _ = harness.run_engine(engine, prompts, options.new_tokens)
    layers = engine.model.config.num_layers
    turns = watch.parts(hidden="experts, meanwhile")
    steps = [turns[first : first + layers] for first in range(layers, len(turns), layers)]
    names = {name for turn in turns for name in turn}
    means = [{name: sum(turn.get(name, 0.0) for turn in step) / layers for name in names} for step in steps]
    calls = [
        [len(turn) for turn in watch.turns[first : first + layers]]
        for first in range(layers, len(turns), layers)
    ]
    # A step without its layers, and without what timing them cost.
    assert isinstance(found["step"], list)
    spans = [
        sum(turn[-1].ended - turn[0].began for turn in watch.turns[first : first + layers])
        for first in range(layers, len(turns), layers)
    ]
    outside = [step - span for step, span in zip(found["step"], spans, strict=True)]
    return {"parts": means, "outside": outside, "timed_calls": float(np.mean(calls)) / 2}


def measure(model: Model, prompts: list[list[int]], options: Options) -> list[dict[str, Any]]:
    """All policies on one model."""
    budget = model.bank.total_bytes * options.budget // 100
    with contextlib.ExitStack() as stack:
        engines = {}
        for policy in options.policies:
            resident = policy == RESIDENT
            config = OffloadConfig(
                device_budget=None if resident else budget,
                policy=Guard() if policy == "auto" else policy,  # by layers alone, also on an accelerator
                numerics="auto",
                predictor="gate" if policy in FORECASTING else None,
                max_num_seqs=options.batch,
            )
            engine = engines[policy] = stack.enter_context(Engine(model, config))
            if isinstance(engine.runner, layerwise.LayerByLayer):
                # Without a tap a step of everything resident has no layers to take apart.
                engine.runner.tap = lambda *layer: None
        found: dict[str, list[dict[str, Any]]] = {policy: [] for policy in engines}

        def plain(engine: Engine) -> Callable[[], harness.Parts]:
            return lambda: harness.run_engine(engine, prompts, options.new_tokens)[0]

        def parts(policy: str) -> Callable[[], harness.Parts]:
            def call() -> harness.Parts:
                began = time.perf_counter()
                found[policy].append(timed_run(engines[policy], prompts, options))
                return {"seconds": time.perf_counter() - began}

            return call

        candidates = {f"{name}, plain": plain(engine) for name, engine in engines.items()}
        candidates |= {f"{name}, timed": parts(name) for name in engines}
        samples = harness.measure(candidates, options.rounds)
    rows = []
    for policy, runs in found.items():
        runs = runs[samples[f"{policy}, timed"].warm_ups :]
        steps = [step for run in runs for step in run["parts"]]
        names = sorted({name for step in steps for name in step})
        us = {name: harness.spread(1e6 * step.get(name, 0.0) for step in steps) for name in names}
        neither = {*ARITHMETIC, *COPYING}
        layer = [sum(step.values()) for step in steps]
        over = [sum(us for name, us in step.items() if name not in neither) for step in steps]
        layers = model.config.num_layers
        outside = [each for run in runs for each in run["outside"]]
        whole = [layers * inside + each for inside, each in zip(layer, outside, strict=True)]
        step_ms = harness.spread(1e3 * s for s in samples[f"{policy}, plain"].parts["step"])
        rows.append(
            {
                "policy": policy,
                "us": us,
                "layer_us": harness.spread(1e6 * s for s in layer),
                "overhead_us": harness.spread(1e6 * s for s in over),
                "overhead_share": harness.spread(a / b for a, b in zip(over, layer, strict=True)),
                "outside_us": harness.spread(1e6 * s for s in outside),
                "step_ms": step_ms,
                "step_of_parts_ms": harness.spread(1e3 * s for s in whole),
                "timed_calls_a_layer": float(np.mean([run["timed_calls"] for run in runs])),
                "compiled_while_timed": sum(
                    samples[f"{policy}, {way}"].compiled for way in ("plain", "timed")
                ),
            }
        )
    return rows


def table(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Parts down, policies across."""
    neither = (*ARITHMETIC, *COPYING)
    parts = {part for row in rows for part in row["us"]} - set(neither)
    most = {part: max(row["us"].get(part, {"median": 0.0})["median"] for row in rows) for part in parts}
    order = sorted(parts, key=lambda part: -most[part])

    def cell(value: dict[str, float] | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value['median']:.{digits}f} ({value['p90']:.{digits}f})"

    lines: list[tuple[str, ...]] = [
        (part, *(cell(row["us"].get(part)) for row in rows)) for part in (*order, *neither)
    ]
    lines.append(("**all but arithmetic and copying**", *(cell(row["overhead_us"]) for row in rows)))
    lines.append(("a layer", *(cell(row["layer_us"]) for row in rows)))
    lines.append(("part of it", *(f"{100 * row['overhead_share']['median']:.1f}%" for row in rows)))
    lines.append(("outside of layers, a step", *(cell(row["outside_us"]) for row in rows)))
    lines.append(("a step of all these, ms", *(cell(row["step_of_parts_ms"], 2) for row in rows)))
    lines.append(("a step that was not timed, ms", *(cell(row["step_ms"], 2) for row in rows)))
    title = f"{name}: microseconds of a layer in decode, median (p90) over steps"
    harness.print_table(title, ("part", *(row["policy"] for row in rows)), lines)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {"batch": 2, "prompt_tokens": 4, "new_tokens": 4, "rounds": 1}
        options = replace(options, **changes)
    record, progress = harness.machine(), Console(stderr=True)
    results = []
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="bench_overhead_") as folder:
            if name == "wide":
                save(random_decoder(wide(options.quick)), folder, dtype="bfloat16")
            elif name != "shipped":
                raise SystemExit(f"error: models are wide, shipped; got {name}")
            model = load(SHIPPED if name == "shipped" else Path(folder))
            size = (options.batch, options.prompt_tokens)
            prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, size).tolist()
            try:
                rows = measure(model, prompts, options)
            except ValueError as error:
                raise SystemExit(f"error: {error}") from None
        results.append({"model": name, "rows": rows})
        progress.print(f"measured {name}")
    for result in results:
        table(result["model"], result["rows"])
    watch = Stopwatch()
    own = {"within_us": round(1e6 * watch.within, 3), "around_us": round(1e6 * watch.around, 3)}
    print(
        f"\nA timed call costs {own['within_us']:.2f} us of its own time and {own['around_us']:.2f} us of "
        "that of the call around it: taken off."
    )
    result = {
        "benchmark": "overhead",
        "quick": options.quick,
        "machine": record,
        "batch": options.batch,
        "budget_percent": options.budget,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "timing": own,
        "models": results,
    }
    return harness.finish(options, result)


if __name__ == "__main__":
    if jax.config.values["jax_num_cpu_devices"] < 0:
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    main(tyro.cli(Options, description=__doc__))
