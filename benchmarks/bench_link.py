"""How busy is the link, and what does a layer wait for?

1. While engines are bound by their transfers: the part of the time in which the link is busy, and its bytes a
   second beside those of a plain loop over the same arrays in the same order: `jax.device_put` and
   `block_until_ready`, or, where copies are paced, the same paced `Transfers` with its queue never empty.
2. A load that is asked for while prefetches are queued overtakes them: how long until its first chunk begins,
   and until it is there, in times of one chunk.
3. How much of copying, the device's and the host's computing happens at the same time.

An engine is bound by transfers while a layer waits for its loads: from asking for them until the last is
there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.link_probes import loads_of, never_empty, overtaking, plain_loop
from benchmarks.random_models import random_model
from layerscope_jax import (
    Engine,
    ExpertBank,
    ExpertId,
    MachineProfile,
    Model,
    ModelConfig,
    OffloadConfig,
    parse_bytes,
)
from layerscope_jax.formats import format_named
from layerscope_jax.offload.link import Transfers
from layerscope_jax.scheduling.registry import FORECASTING

UNPACED = "unpaced"

BANK_BYTES = 2 << 30
"""Of the experts that loads and prefetches are of."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    policies: tuple[str, ...] = ("on-demand", "lru")
    """Bound by their transfers: those that copy whatever is missing."""
    links: tuple[str, ...] = ("500MB", "2GB", UNPACED)
    """Bytes a second."""
    overlapping: tuple[str, ...] = ("on-demand", "fate", "presched")
    """Policies whose parts' busy times are added up."""
    profiles: tuple[str, ...] = ("qwen3-30b-a3b", "deepseek-v2-lite", "mixtral-8x7b")
    """Profiles that ship with the package, for sizes of real experts."""
    budget: int = 30
    """Percent of the bytes of all experts."""
    batch: int = 4
    prompt_tokens: int = 16
    new_tokens: int = 6
    rounds: int = 3
    trials: int = 60
    """Loads that overtake."""


def shape(quick: bool) -> ModelConfig:
    return ModelConfig(
        family="mixtral",
        vocab_size=256 if quick else 4096,
        hidden_size=64 if quick else 512,
        num_layers=2 if quick else 4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8 if quick else 64,
        num_experts=8 if quick else 32,
        experts_per_token=4,
        moe_intermediate_size=64 if quick else 1024,
        normalize_top_k=True,
    )


def bound_by_transfers(model: Model, policy: str, link: str, options: Options) -> dict[str, Any]:
    """An engine and a loop in turns."""
    prompts = prompts_of(model, options)
    layers: list[list[ExpertId]] = []
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine(model, config_of(model, policy, link, options)))
        bare = Transfers(model.bank, model.device, bandwidth(link))
        stack.callback(bare.close)

        def run() -> harness.Parts:
            with loads_of(engine.runner.transfers) as loads:
                stats = engine.generate(prompts, max_new_tokens=options.new_tokens, stop_token_ids=()).stats
            layers[:] = loads.layers
            return {
                "total": stats.total_s,
                "busy": stats.link_share * stats.total_s,
                "loading": loads.seconds,
                "bytes": stats.bytes_moved,
            }

        def loop() -> harness.Parts:
            if link == UNPACED:
                seconds = plain_loop(model.bank, model.device, layers)
            else:
                seconds = never_empty(bare, layers)
            return {"total": seconds, "bytes": model.bank.expert_bytes * sum(map(len, layers))}

        samples = harness.measure({"engine": run, "loop": loop}, options.rounds)
    found, beside = samples["engine"].parts, samples["loop"].parts

    def rates(part: str, of: dict[str, list[float]] = found) -> list[float]:
        return [size / seconds for size, seconds in zip(of["bytes"], of[part], strict=True)]

    looped = rates("total", beside)
    return {
        "policy": policy,
        "link": link,
        "bytes_moved": harness.spread(found["bytes"]),
        "seconds": harness.spread(found["total"]),
        "loading_share": harness.ratio(found["loading"], found["total"]),
        "busy_share": harness.ratio(found["busy"], found["total"]),
        "bytes_per_s": {
            "whole": harness.spread(rates("total")),
            "loading": harness.spread(rates("loading")),
            "loop": harness.spread(looped),
        },
        "loading_to_loop": harness.ratio(rates("loading"), looped),
        "whole_to_loop": harness.ratio(rates("total"), looped),
        "compiled_while_timed": samples["engine"].compiled,
    }


def bank_of(profile: str, quick: bool) -> ExpertBank:
    """Some experts of a published model in one layer, of no values: not more than memory has room for."""
    size = MachineProfile.load(profile).model
    hidden, inner = size.hidden_size // 16 if quick else size.hidden_size, size.moe_intermediate_size
    count = int(np.clip(BANK_BYTES // format_named("bfloat16").expert_bytes(hidden, inner), 4, 16))
    config = replace(
        shape(quick), hidden_size=hidden, moe_intermediate_size=inner, num_layers=1, num_experts=count
    )
    return ExpertBank.build(config, lambda expert, name, shape: np.full(shape, expert.expert, jnp.bfloat16))


def overlap(model: Model, policy: str, options: Options) -> dict[str, Any]:
    """How busy each part is while one engine generates."""
    prompts = prompts_of(model, options)
    link = min((link for link in options.links if link != UNPACED), key=parse_bytes)
    with Engine(model, config_of(model, policy, link, options)) as engine:

        def run() -> harness.Parts:
            stats = engine.generate(prompts, max_new_tokens=options.new_tokens, stop_token_ids=()).stats
            shares = {"device": stats.device_share, "host": stats.host_share, "link": stats.link_share}
            return shares | {"seconds": stats.total_s, "bytes": stats.bytes_moved}

        samples = harness.measure({policy: run}, options.rounds)[policy]
    found = samples.parts
    together = [sum(shares) for shares in zip(found["device"], found["host"], found["link"], strict=True)]
    return {
        "policy": policy,
        "link": link,
        "seconds": harness.spread(found["seconds"]),
        "bytes_moved": harness.spread(found["bytes"]),
        "shares": {part: harness.spread(found[part]) for part in ("device", "host", "link")},
        "together": harness.spread(together),
        "compiled_while_timed": samples.compiled,
    }


def prompts_of(model: Model, options: Options) -> list[list[int]]:
    size = (options.batch, options.prompt_tokens)
    return np.random.default_rng(0).integers(3, model.config.vocab_size, size).tolist()


def config_of(model: Model, policy: str, link: str, options: Options) -> OffloadConfig:
    return OffloadConfig(
        device_budget=model.bank.total_bytes * options.budget // 100,
        policy=policy,
        emulated_link_bandwidth=bandwidth(link),
        predictor="gate" if policy in FORECASTING else None,
    )


def bandwidth(link: str) -> int | None:
    return None if link == UNPACED else parse_bytes(link, "link")


def tables(result: dict[str, Any]) -> None:
    def percent(value: dict[str, float]) -> str:
        return f"{100 * value['median']:.1f}%"

    def mb(value: dict[str, float]) -> str:
        return f"{value['median'] / 1e6:.0f}"

    def both(value: dict[str, float]) -> str:
        return f"{value['median']:.2f} ({value['p90']:.2f})"

    lines: list[tuple[object, ...]] = []
    for row in result["bound"]:
        rates = [mb(row["bytes_per_s"][part]) for part in ("whole", "loading", "loop")]
        shares = percent(row["busy_share"]), percent(row["loading_share"])
        ratios = both(row["loading_to_loop"]), both(row["whole_to_loop"])
        lines.append((row["policy"], row["link"], mb(row["bytes_moved"]), *shares, *rates, *ratios))
    headings = ("policy", "link", "MB moved", "link busy", "time loading", "MB/s: whole", "loading", "loop")
    more = ("loading / loop (p90)", "whole / loop (p90)")
    harness.print_table("Bound by transfers, medians", (*headings, *more), lines)

    lines = []
    for row in result["overtaking"]:
        begins, there = row["chunks_until_it_begins"], row["chunks_until_it_is_there"]
        size = f"{row['chunk_bytes'] / 1e6:.1f}", f"{row['chunk_ms']:.2f}", row["prefetches"]
        begun = both(begins["alone"]), both(begins["overtaking"]), f"{begins['overtaking']['most']:.2f}"
        lines.append(
            (row["profile"], row["link"], *size, *begun, both(there["alone"]), both(there["overtaking"]))
        )
    headings = (
        "experts of",
        "link",
        "chunk MB",
        "ms",
        "prefetches",
        "begins: alone",
        "overtaking",
        "at most",
    )
    more = ("there: alone", "overtaking")
    harness.print_table("A load, in times of one chunk: median (p90)", (*headings, *more), lines)

    lines = []
    for row in result["overlap"]:
        shares = [percent(row["shares"][part]) for part in ("device", "host", "link")]
        seconds = f"{row['seconds']['median']:.2f}"
        lines.append(
            (row["policy"], row["link"], seconds, mb(row["bytes_moved"]), *shares, percent(row["together"]))
        )
    headings = ("policy", "link", "s", "MB moved", "device busy", "host busy", "link busy", "together")
    harness.print_table("Busy at the same time, by the wall time, medians", headings, lines)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {
            "links": ("20MB", UNPACED),
            "policies": options.policies[:1],
            "overlapping": options.overlapping[1:2],
            "profiles": options.profiles[:1],
            "budget": 60,
            "new_tokens": 3,
            "rounds": 1,
            "trials": 2,
        }
        options = replace(options, **changes)
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    result: dict[str, Any] = {"benchmark": "link", "quick": options.quick, "machine": harness.machine()}
    progress = Console(stderr=True)
    model = random_model(shape(options.quick))
    result["model"] = {
        "layers": model.config.num_layers,
        "experts": model.config.num_experts,
        "expert_bytes": model.bank.expert_bytes,
        "budget_percent": options.budget,
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
    }
    result |= {
        "rounds": options.rounds,
        "trials": options.trials,
        "bound": [],
        "overtaking": [],
        "overlap": [],
    }

    def measured(kind: str, row: dict[str, Any]) -> None:
        result[kind].append(row)
        named = ", ".join(str(row[key]) for key in ("profile", "policy", "link") if key in row)
        progress.print(f"measured {kind}: {named}", highlight=False)
        if options.json is not None:  # whoever is cut short keeps what there is
            harness.write_json(options.json, result)

    for policy in options.policies:
        for link in options.links:
            measured("bound", bound_by_transfers(model, policy, link, options))
    for policy in options.overlapping:
        measured("overlap", overlap(model, policy, options))
    for profile in options.profiles:
        for link in options.links[-2:]:
            row = overtaking(bank_of(profile, options.quick), bandwidth(link), options.trials)
            measured("overtaking", {"profile": profile, "link": link} | row)
    tables(result)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
