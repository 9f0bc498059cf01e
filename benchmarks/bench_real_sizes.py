"""Which policy is fastest for models of real size?

Layers of the sizes of DeepSeek-V2-Lite, Qwen3-30B-A3B and Mixtral-8x7B (`random_models.PUBLISHED` says what
was left out), as many as host memory holds, with random weights in bfloat16, or made from them, in formats of
fewer bits. The device has room for the part of the bfloat16 experts that a card of 24 GB holds beside
everything else (the shipped profiles' slots): what is left out are whole layers, each like the others.
Requests of a few tokens are decoded in batches, and a long prompt is prefilled, under each policy, by the
costs that were calibrated before.

A random router sends each token to other experts, nearly uniformly: nothing is popular, little is used again
in the next step, and only the next layers' routers (the predictor here) know anything of what comes. Trained
models are kinder to caches and to forecasts.

The engines run one after the other, since the device has no room for two: a machine that drifts drifts
between them. Within one, every decode step is timed by itself.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.memory_facts import pool_bytes
from benchmarks.random_models import PUBLISHED, published, random_model
from layerscope_jax import Engine, MachineProfile, Model, ModelConfig, OffloadConfig, parse_bytes
from layerscope_jax.generation.completions import Completions, Token
from layerscope_jax.profiling.calibrate import calibrate
from layerscope_jax.profiling.measure import Points
from layerscope_jax.runtime.alternating import Alternating
from layerscope_jax.scheduling.contest import FIRST_WAIT, TRIAL
from layerscope_jax.scheduling.registry import FORECASTING
from layerscope_jax.support import machine
from layerscope_jax.support.errors import TransferError

WARM_UPS = 3
SETTLING = FIRST_WAIT + TRIAL + 2
"""Decode steps in which policy "auto" finds out whether it keeps its cache inside the step."""
LEAST_LAYERS = 2
"""With fewer there is nothing to look ahead to."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    models: tuple[str, ...] = tuple(PUBLISHED)
    formats: tuple[str, ...] = ("bfloat16",)
    """Of the experts; all get the same bytes of the device."""
    policies: tuple[str, ...] = (
        "on-demand",
        "host-only",
        "lru",
        "fiddler",
        "hybrimoe",
        "presched",
        "in-step",
        "auto",
    )
    batches: tuple[int, ...] = (1, 4, 16, 64)
    """Requests that are decoded together."""
    prompt_tokens: int = 16
    new_tokens: int = 9
    """Of each of them: the first comes from the prefill, each other from a decode step."""
    prefill_tokens: tuple[int, ...] = (512,)
    """Lengths of prompts that are prefilled alone."""
    memory: str | None = None
    """Host memory for experts; three quarters of what is free if left out, and no more than can be pinned."""
    rounds: int = 1


class Work(NamedTuple):
    """What an engine is given."""

    requests: int
    prompt_tokens: int
    new_tokens: int

    @property
    def name(self) -> str:
        if self.new_tokens == 1:
            return f"prefill of {self.prompt_tokens}"
        return f"decode, batch {self.requests}"


def works(options: Options) -> list[Work]:
    decoded = [Work(batch, options.prompt_tokens, options.new_tokens) for batch in options.batches]
    return decoded + [Work(1, tokens, 1) for tokens in options.prefill_tokens]


def sized(name: str, options: Options, memory: int) -> tuple[ModelConfig, int]:
    """A model of as many layers as memory has room for, and how many of its experts the device holds.

    Raises:
        ValueError: if there is room for next to none.
    """
    config, profile = published(name, options.quick), MachineProfile.load(name)
    slots = profile.geometry().slots
    layer = config.num_experts * config.expert_bytes(2)
    layers = min(config.num_layers, memory // layer)
    if layers < LEAST_LAYERS:
        raise ValueError(f"a layer has {layer / 1e9:.2f} GB of experts; there is room for {memory / 1e9:.2f}")
    config = replace(config, num_layers=layers)
    return config, slots * layers * config.num_experts // profile.model.total_experts


def run(engine: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[harness.Parts, Completions]:
    """Seconds until the first tokens and of each decode step, and what the engine says of the same run."""
    times: list[float] = []

    def note(event: Token) -> None:
        if event.request == 0:  # the first of each step
            times.append(time.perf_counter())

    # Steps with the cache inside are not made of plans.
    plans = engine.policy.name != "in-step" and not isinstance(engine.runner, Alternating)
    began = time.perf_counter()
    result = engine.generate(
        prompts,
        max_new_tokens=new_tokens,
        stop_token_ids=(),
        on_token=note,
        record_plans=plans,
        bound=plans and new_tokens > 1,
    )
    return {"first": times[0] - began, "step": np.diff(times).tolist()}, result


def measured(engine: Engine, work: Work, options: Options) -> dict[str, Any]:
    """One policy at one work."""
    size = (work.requests, work.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, engine.model.config.vocab_size, size).tolist()
    found: list[Completions] = []
    if isinstance(engine.runner, Alternating) and work.new_tokens > 1:
        engine.warmup(prompt_tokens=work.prompt_tokens, max_num_seqs=work.requests, new_tokens=SETTLING)
        engine.generate(prompts, max_new_tokens=SETTLING, stop_token_ids=())

    def call() -> harness.Parts:
        parts, result = run(engine, prompts, work.new_tokens)
        found[:] = [result]
        return parts

    samples = harness.measure({work.name: call}, options.rounds, WARM_UPS)[work.name]
    (result,) = found
    decoding = work.new_tokens > 1
    active = [len(plan.device) + len(plan.host) for plan in result.plans if (plan.step > 0) == decoding]
    steps = samples.parts.get("step")
    return {
        "ttft_ms": harness.spread(1e3 * s for s in samples.parts["first"]),
        "tpot_ms": harness.spread(1e3 * s for s in steps) if steps else None,
        "active_experts_a_layer": float(np.mean(active)) if active else None,
        "stats": result.stats.to_json(),
        "warm_ups": samples.warm_ups,
        "compiled_while_timed": samples.compiled,
    }


def rows_of(model: Model, profile: MachineProfile, budget: int, options: Options) -> Iterator[dict[str, Any]]:
    """All policies on one model, each with its works, one after the other."""
    for policy in options.policies:
        gc.collect()  # the last engine's experts leave the device
        config = OffloadConfig(
            device_budget=budget,
            policy=policy,
            profile=profile,
            predictor="gate" if policy in FORECASTING else None,
            max_num_seqs=max(options.batches),
        )
        try:
            engine = Engine(model, config)
        except ValueError as error:
            yield {"policy": policy, "refused": str(error)}
            continue
        with engine:
            for work in works(options):
                row = {"policy": policy, "work": work._asdict()}
                try:
                    row |= measured(engine, work, options)
                except (TransferError, jax.errors.JaxRuntimeError) as error:  # no reason to lose the others
                    row["failed"] = str(error)
                yield row
        del engine


def model_rows(name: str, options: Options, memory: int, models: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Makes a model, calibrates and measures all policies; what the model is goes into `models`."""
    try:
        config, slots = sized(name, options, memory)
    except ValueError as error:
        yield {"refused": str(error)}
        return
    gc.collect()  # the last model's experts leave the memory
    began = time.perf_counter()
    model = random_model(config)
    made_s = time.perf_counter() - began
    budget = slots * model.bank.expert_bytes
    models[name] = {"layers": config.num_layers, "slots": slots, "made_s": made_s, "formats": {}}
    points = Points(
        tokens=(1, 16) if options.quick else (1, 4, 16, 64, 256),
        decode=options.batches,
        prefill=(max(*options.prefill_tokens, options.batches[-1] * options.prompt_tokens),),
        context=options.prompt_tokens + options.new_tokens,
    )
    for form in options.formats:
        made = model.with_format(form)
        profile = calibrate(made, device_budget=budget, points=points, contexts=())
        models[name]["formats"][form] = {
            "expert_bytes": made.bank.expert_bytes,
            "profile": profile.to_json(),
        }
        for row in rows_of(made, profile, budget, options):
            yield {"layers": config.num_layers, "format": form} | row
        del made


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Enters each row's time by the shortest of its work and format: of a decode step, or of the prefill."""
    times: dict[tuple, list[float]] = {}
    timed = [row for row in rows if "ttft_ms" in row]
    for row in timed:
        times.setdefault((row["format"], *row["work"].values()), []).append(decisive_ms(row))
    for row in timed:
        row["time_to_best"] = decisive_ms(row) / min(times[row["format"], *row["work"].values()])


def decisive_ms(row: dict[str, Any]) -> float:
    return (row["tpot_ms"] or row["ttft_ms"])["median"]


def table(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in sorted(rows, key=lambda row: list(row.get("work", {}).values())):
        if "ttft_ms" not in row:
            work, why = row.get("work"), row.get("refused") or "failed: " + row["failed"]
            named = (Work(**work).name if work else "-", row.get("format", "-"), row.get("policy", "-"))
            lines.append((*named, *[""] * 7, why[:60]))
            continue
        stats, step = row["stats"], row["tpot_ms"]
        shares = (stats["device_share"], stats["host_share"], stats["link_share"])
        bound = stats["share_of_bound"]
        lines.append(
            (
                Work(**row["work"]).name,
                row["format"],
                row["policy"],
                f"{row['ttft_ms']['median']:.1f}",
                "-" if step is None else f"{step['median']:.2f} ({step['p90']:.2f})",
                "-" if row["active_experts_a_layer"] is None else f"{row['active_experts_a_layer']:.1f}",
                f"{stats['hit_rate']:.2f}",
                f"{stats['bytes_moved'] / 1e6:.1f}",
                " / ".join(f"{share:.2f}" for share in shares),
                "-" if bound is None else f"{bound:.0%}",
                f"{row['time_to_best']:.2f}",
            )
        )
    first = rows[0]
    title = f"{first['model']}: {first.get('layers', 0)} of {first['all_layers']} layers, medians"
    headings = ("work", "experts in", "policy", "TTFT ms", "TPOT ms (p90)", "active", "hits", "MB moved")
    more = ("busy: device / host / link", "of bound", "to best")
    harness.print_table(title, (*headings, *more), lines)


def main(options: Options) -> dict[str, Any]:
    unknown = set(options.models) - set(PUBLISHED)
    if unknown:
        raise SystemExit(f"error: models are {', '.join(PUBLISHED)}; got {', '.join(sorted(unknown))}")
    if options.quick:
        changes: Any = {"batches": options.batches[:1], "new_tokens": 4, "prefill_tokens": (32,)}
        options = replace(options, **changes)
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    record, progress = harness.machine(), Console(stderr=True)
    if options.memory is not None:
        memory = parse_bytes(options.memory, "memory")
    else:
        memory = machine.free_bytes() * 3 // 4
        if jax.devices()[0].platform != "cpu":
            memory = min(memory, pool_bytes() * 9 // 10)  # JAX copies NumPy's arrays through the same pool
    result: dict[str, Any] = {
        "benchmark": "real_sizes",
        "quick": options.quick,
        "machine": record,
        "memory_bytes": memory,
        "rounds": options.rounds,
        "models": {},
        "rows": [],
    }
    for name in options.models:
        rows: list[dict[str, Any]] = []
        for row in model_rows(name, options, memory, result["models"]):
            rows.append({"model": name, "all_layers": PUBLISHED[name].num_layers} | row)
            done = Work(**row["work"]).name if "work" in row else "refused"
            progress.print(
                f"measured {name}, {row.get('format')}, {row.get('policy')}: {done}", highlight=False
            )
            if options.json is not None:  # whoever is cut short keeps what there is
                harness.write_json(options.json, result | {"rows": result["rows"] + rows})
        add_ratios(rows)
        table(rows)
        result["rows"] += rows
    harness.finish(options, result)
    failed = sum("failed" in row for row in result["rows"])
    if failed:
        raise SystemExit(f"error: {failed} of {len(result['rows'])} measurements failed")
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
