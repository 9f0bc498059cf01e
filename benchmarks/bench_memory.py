"""Does an engine keep within its budget, and hold the experts once?

An engine of each policy and budget answers more requests than there are slots, so that newcomers are
prefilled while others hold theirs. At every layer of every step the bytes of all live arrays are counted, on
the device and in RAM (`live_bytes`), and set beside what may be there: the budget, dense weights, the slots'
caches and the newcomers', rows of activations, what the predictor reads. By how much the process grew during
the same call of another engine stands beside what should explain it ("said"): these bytes, on a CPU, dense
weights left out, which were there before; Python's and NumPy's; what XLA takes inside the largest program.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.bench_prefill import growth
from benchmarks.live_bytes import SLACK, watch
from benchmarks.random_models import random_model
from layerscope_jax import POLICIES, Engine, HardwareProfile, Model, ModelConfig, OffloadConfig, Request
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.decoder import Between
from layerscope_jax.runtime.programs import Layers, programs
from layerscope_jax.scheduling.registry import FORECASTING

RESIDENT = "resident"


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    policies: tuple[str, ...] = ("host-only", "on-demand", "lru", "presched", "auto")
    """Each at each budget, "host-only" at none; after them comes everything resident."""
    budgets: tuple[int, ...] = (20, 50)
    """Percent of the bytes of all experts."""
    layers: int = 6
    experts: int = 32
    """Of a layer; 4 are chosen by a token."""
    requests: int = 16
    most_tokens: int = 256
    """Of a prompt; the shortest has an eighth of it."""
    slots: int = 8
    new_tokens: int = 12
    """Most of a request."""


def shape(options: Options) -> ModelConfig:
    tiny = options.quick
    return ModelConfig(
        family="mixtral",
        vocab_size=64 if tiny else 8192,
        hidden_size=128 if tiny else 512,
        num_layers=options.layers,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8 if tiny else 64,
        num_experts=options.experts,
        experts_per_token=4,
        moe_intermediate_size=2048 if tiny else 384,
        normalize_top_k=True,
    )


def requests_of(options: Options, vocabulary: int) -> list[Request]:
    """Short and long ones mixed."""
    random = np.random.default_rng(0)

    def between(least: int, most: int) -> list[int]:
        return random.permutation(np.linspace(least, most, options.requests).astype(int)).tolist()

    return [
        Request(prompt=random.integers(0, vocabulary, size).tolist(), max_new_tokens=count, stop_token_ids=())
        for size, count in zip(
            between(options.most_tokens // 8, options.most_tokens),
            between(2, options.new_tokens),
            strict=True,
        )
    ]


def costs(model: Model, policies: Sequence[str]) -> HardwareProfile | None:
    """This machine's, measured once; None if no policy goes by them."""
    if not any(POLICIES[policy].uses_costs for policy in policies):
        return None
    with Engine(model, OffloadConfig(device_budget=model.bank.total_bytes // 2, policy="presched")) as engine:
        return engine.runner.costs


def measure(
    model: Model, config: OffloadConfig, options: Options, inside: dict[tuple[int, int], int]
) -> dict[str, Any]:
    """One engine. `inside` keeps `temporary_bytes` by rows and width: they are no engine's own."""
    requests = requests_of(options, model.config.vocab_size)

    def call(engine: Engine) -> None:
        engine.generate(requests)

    def whole() -> None:
        with Engine(model, config) as engine:
            call(engine)

    whole()  # compiles
    grown = growth(whole)
    taken = watch(model, config, call)
    largest = max(taken.steps, key=math.prod)
    if largest not in inside:
        inside[largest] = temporary_bytes(model, *largest)
    said = taken.allocated + inside[largest]
    if model.device.platform == "cpu":  # then the device's memory is the process's
        said += max(taken.device.values()) - taken.named["dense"]
    return {
        "budget_bytes": taken.budget,
        "experts_bytes": taken.experts,
        "device_bytes": taken.device,
        "named_bytes": taken.named,
        "device_to_limit": taken.of_limit,
        "ram_bytes": {"arrays": taken.host, "python": taken.allocated},
        "ram_to_bank": taken.ram / taken.bank,
        "bytes_moved": taken.moved,
        "prefills_of_newcomers": taken.joined,
        "counted": taken.counted,
        "process_growth_bytes": grown,
        "temporary_bytes": inside[largest],
        "growth_said_bytes": said,
        "kept": taken.of_limit <= 1 and taken.ram <= taken.ram_limit and taken.experts <= taken.budget,
    }


def temporary_bytes(model: Model, rows: int, width: int) -> int:
    """What XLA takes inside one layer's program that prefills `rows` prompts of `width` tokens."""
    config, dtype = model.config, model.bank.dtype
    tokens, hidden = rows * width, config.hidden_size
    between = Between(
        jax.ShapeDtypeStruct((rows, width, hidden), dtype),
        jax.ShapeDtypeStruct((tokens * config.experts_per_token + 1, hidden), dtype),
        jax.ShapeDtypeStruct((tokens, config.experts_per_token), jnp.float32),
    )
    positions = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    span = config.spans[0]
    caches = new_caches(config, rows, width, dtype, model.device, span.stop)
    program = programs(config, dtype, None).attend_and_route
    lowered = program.lower(Layers.of(model, span), between, positions, caches, None, None, None)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def table(rows: Sequence[dict[str, Any]]) -> None:
    def mb(size: int | None) -> str:
        return "-" if size is None else f"{size / 1e6:.1f}"

    lines = []
    for row in rows:
        named, device = row["named_bytes"], row["device_bytes"]
        lines.append(
            (
                row["policy"],
                mb(row["budget_bytes"]),
                mb(row["experts_bytes"]),
                mb(named["dense"] + named["predictor"]),
                f"{mb(named['slots'])} + {mb(named['newcomers'])}",
                mb(named["rows"]),
                f"{mb(device['prefill'])} / {mb(device['decode'])}",
                f"{row['device_to_limit']:.3f}",
                f"{row['ram_to_bank']:.3f}",
                mb(row["bytes_moved"]),
                f"{mb(row['process_growth_bytes'])} ({mb(row['growth_said_bytes'])})",
                "yes" if row["kept"] else "NO",
            )
        )
    headings = ("policy", "budget", "experts", "dense", "caches: slots + new", "rows")
    more = ("device: prefill / decode", "to limit", "RAM / bank", "moved", "process grew (said)", "kept")
    harness.print_table("Most bytes at once, MB", (*headings, *more), lines)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {
            "policies": options.policies[:3],
            "budgets": options.budgets[-1:],
            "layers": 3,
            "experts": 8,
            "requests": 4,
            "slots": 2,
            "most_tokens": 32,
            "new_tokens": 3,
        }
        options = replace(options, **changes)
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    record, progress = harness.machine(), Console(stderr=True)
    model = random_model(shape(options))
    profile = costs(model, options.policies)
    rows: list[dict[str, Any]] = []
    inside: dict[tuple[int, int], int] = {}

    def add(policy: str, config: OffloadConfig) -> None:
        rows.append({"policy": policy} | measure(model, config, options, inside))
        progress.print(f"measured {policy}, {rows[-1]['budget_bytes'] / 1e6:.0f} MB")

    for policy in options.policies:
        for percent in (0,) if policy == "host-only" else options.budgets:
            add(
                policy,
                OffloadConfig(
                    device_budget=model.bank.total_bytes * percent // 100,
                    policy=policy,
                    profile=profile,
                    predictor="gate" if policy in FORECASTING else None,
                    max_num_seqs=options.slots,
                ),
            )
    add(RESIDENT, OffloadConfig(numerics="auto", max_num_seqs=options.slots))
    table(rows)
    return harness.finish(
        options,
        {
            "benchmark": "memory",
            "quick": options.quick,
            "machine": record,
            "all_experts_bytes": model.bank.total_bytes,
            "expert_bytes": model.bank.expert_bytes,
            "slack": SLACK,
            "requests": options.requests,
            "slots": options.slots,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
