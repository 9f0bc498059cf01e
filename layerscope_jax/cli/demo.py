"""The demo: one model, eight real prompts, every policy; what each costs, and that none changes a token."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.config import OffloadConfig
from layerscope_jax.engine import Engine, make_policy
from layerscope_jax.generation.requests import Completions, Request
from layerscope_jax.prediction.predictors import Predictor
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.scheduling.registry import FORECASTING
from layerscope_jax.support.compile_cache import counted

SHIPPED = Path(__file__).parents[1] / "shipped"
WARM_STEPS, MOST_RUNS = 4, 3


def versions() -> dict[str, str]:
    """Of this package, JAX and Python."""
    try:
        own = version("layerscope-jax")
    except PackageNotFoundError:
        own = "from source"
    return {"layerscope-jax": own, "jax": jax.__version__, "python": platform.python_version()}


def read_demo_prompts() -> list[dict[str, str]]:
    """The prompts that ship with the model: rows of id, domain and prompt."""
    lines = (SHIPPED / "prompts.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines]


def compare(
    model: Model,
    prompts: Sequence[dict[str, str]],
    *,
    policies: Sequence[str],
    max_new_tokens: int,
    budget_share: float,
    emulated_link_bandwidth: str | None,
    predictor: Predictor | str | None = None,
) -> dict[str, Any]:
    """Generates with everything resident, then within a budget under each policy; returns the report.

    Args:
        model: the model.
        prompts: rows of id, domain and prompt.
        policies: names of `layerscope_jax.POLICIES`.
        max_new_tokens: of every prompt.
        budget_share: of the experts' bytes, over 0 and below 1.
        emulated_link_bandwidth: what copies are paced to, "50MB" say; None for as fast as they go.
        predictor: of the policies that make use of one.

    Raises:
        ValueError: for an unknown policy, a share out of range or a budget too small.
    """
    configs = configurations(model, policies, budget_share, emulated_link_bandwidth, predictor)
    texts = [row["prompt"] for row in prompts]
    Request(prompt="", max_new_tokens=max_new_tokens)  # refuses what is out of range, before anything has run
    results, runs = [], []
    console = Console(stderr=True)
    # Refreshed rarely: the spinner shares this process with what is measured.
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=2,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("")
        for index, (name, config) in enumerate(configs, 1):
            show = functools.partial(progress.update, task)
            label = f"{index} of {len(configs)}, {name}: "
            show(description=label + "warming up")
            with Engine(model, config) as engine:
                warm_up(engine, texts, max_new_tokens)
                show(description=label + "measuring")
                result, programs = measured(engine, texts, max_new_tokens)
            results.append(result)
            runs.append(result.stats.to_json() | {"programs_compiled": programs})
    oracle = next(result for result in results if result.stats.mode != "whole")
    for run, result in zip(runs, results, strict=True):
        run["same_tokens"] = result.token_ids == oracle.token_ids
    return {
        # The one jit is fused differently: it agrees to rounding, and its own row says whether it parted.
        "exact": all(run["same_tokens"] for run in runs if run["mode"] != "whole"),
        "model": described(model),
        "versions": versions(),
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "budget_share": budget_share,
        "emulated_link_bandwidth": emulated_link_bandwidth,
        "runs": runs,
        "prompts": [
            row | {"text": text, "tokens": tokens}
            for row, text, tokens in zip(prompts, oracle.texts, oracle.token_ids, strict=True)
        ],
    }


def configurations(
    model: Model,
    policies: Sequence[str],
    budget_share: float,
    emulated_link_bandwidth: str | None,
    predictor: Predictor | str | None,
) -> list[tuple[str, OffloadConfig]]:
    """What is compared, by name: everything resident, in each way that there is here, then each policy.

    The first with exact numerics is the oracle.
    """
    if not 0 < budget_share < 1:
        raise ValueError(f"budget-share must lie between 0 and 1, got {budget_share}")
    limited = OffloadConfig(
        device_budget=int(model.bank.total_bytes * budget_share),
        emulated_link_bandwidth=emulated_link_bandwidth,
    )
    offloaded = [
        (policy, replace(limited, policy=policy, predictor=predictor if policy in FORECASTING else None))
        for policy in policies
    ]
    for policy, config in offloaded:
        if not make_policy(policy).uses_costs:  # measuring costs would take seconds
            Engine(model, config).close()  # refuses a budget too small before anything has run
    one_jit = [("everything resident, one jit", OffloadConfig(numerics="fast"))]
    return [
        *(one_jit if WholeModel.is_faster_on(model.device) else []),
        ("everything resident", OffloadConfig()),
        *offloaded,
    ]


def warm_up(engine: Engine, prompts: list[str], max_new_tokens: int) -> None:
    """Generates a few tokens in the shapes of a full run, which compiles nearly all that it needs."""
    for done, _ in enumerate(engine.stream(prompts, max_new_tokens=max_new_tokens), 1):
        if done >= WARM_STEPS * len(prompts):
            break


def measured(engine: Engine, prompts: list[str], max_new_tokens: int) -> tuple[Completions, int]:
    """Generates, and again if a program was compiled on the way, a few times at most.

    Returns:
        The last result, and how many programs were compiled in it: 0 unless each time brought new shapes.
    """
    for _ in range(MOST_RUNS):
        with counted() as found:
            result = engine.generate(prompts, max_new_tokens=max_new_tokens)
        if not found.programs:
            break
    return result, found.programs


def described(model: Model) -> dict[str, Any]:
    """The model's shape, in numbers that matter to offloading."""
    config, bank = model.config, model.bank
    return {
        "path": str(model.path),
        "family": config.family,
        "layers": config.num_layers,
        "experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "dtype": str(bank.dtype),
        "expert_bytes": bank.expert_bytes,
        "total_expert_bytes": bank.total_bytes,
    }
