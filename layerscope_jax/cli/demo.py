"""The demo: runs eight real prompts under several policies and checks that all give the same tokens."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from layerscope_jax.checkpoints.model import Model, load
from layerscope_jax.config import OffloadConfig
from layerscope_jax.engine import Engine, make_policy
from layerscope_jax.generation.completions import Completions
from layerscope_jax.generation.requests import Request
from layerscope_jax.prediction.predictors import Predictor
from layerscope_jax.runtime.timeline_files import join_timelines
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.scheduling.registry import FORECASTING
from layerscope_jax.support.compile_cache import counted

SHIPPED = Path(__file__).parents[1] / "shipped"
WARM_STEPS, MOST_RUNS = 4, 3


def versions() -> dict[str, str]:
    """Returns the versions of this package, JAX and Python."""
    try:
        own = version("layerscope-jax")
    except PackageNotFoundError:
        own = "from source"
    return {"layerscope-jax": own, "jax": jax.__version__, "python": platform.python_version()}


def read_demo_prompts() -> list[dict[str, str]]:
    """Returns the prompts that ship with the model: rows of id, domain and prompt."""
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
    host_budget: str | None = None,
    timeline: Path | None = None,
) -> dict[str, Any]:
    """Generates with everything resident, then within a budget under each policy; returns the report.

    Args:
        model: the model.
        prompts: rows of id, domain and prompt.
        policies: names of `layerscope_jax.POLICIES`.
        max_new_tokens: tokens to generate for every prompt.
        budget_share: share of the experts' bytes that the device may hold, between 0 and 1.
        emulated_link_bandwidth: bytes a second that copies are limited to, such as "50MB"; None for no limit.
        predictor: for the policies that use one.
        host_budget: host memory for experts under each policy, such as "3MB"; the others are read from the
            model's folder. None for all.
        timeline: file for a timeline of the runs, one process each; None for none.

    Raises:
        ValueError: for an unknown policy, a share out of range or a budget too small.
    """
    stored = model
    if host_budget is not None and model.path is not None:
        stored = load(model.path, experts="disk")
    configs = configurations(stored, policies, budget_share, emulated_link_bandwidth, predictor, host_budget)
    texts = [row["prompt"] for row in prompts]
    Request(prompt="", max_new_tokens=max_new_tokens)  # refuses a number out of range before anything runs
    results, runs = [], []
    console = Console(stderr=True)
    drawn: list[Path] = []
    # Refreshed rarely: the spinner takes time of the process that is measured.
    with (
        Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=2,
            disable=not console.is_terminal,
        ) as progress,
        TemporaryDirectory() as folder,
    ):
        task = progress.add_task("")
        for index, (name, config) in enumerate(configs, 1):
            show = functools.partial(progress.update, task)
            label = f"{index} of {len(configs)}, {name}: "
            show(description=label + "warming up")
            with Engine(stored if config.host_budget else model, config) as engine:
                warm_up(engine, texts, max_new_tokens)
                show(description=label + "measuring")
                if timeline is not None:
                    drawn.append(Path(folder) / f"{index}.json")
                result, programs = measured(engine, texts, max_new_tokens, drawn[-1] if drawn else None)
            results.append(result)
            runs.append(result.stats.to_json() | {"programs_compiled": programs})
        if timeline is not None:
            join_timelines(timeline, drawn)
    oracle = next(result for result in results if result.stats.mode != "whole")
    for run, result in zip(runs, results, strict=True):
        run["same_tokens"] = result.token_ids == oracle.token_ids
    return {
        # One jitted step rounds differently; its own row says whether its tokens differ.
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
    host_budget: str | None = None,
) -> list[tuple[str, OffloadConfig]]:
    """Returns the runs to compare: everything resident, in each way this device has, then each policy.

    The first whose numerics are not "fast" is the oracle.
    """
    if not 0 < budget_share < 1:
        raise ValueError(f"--budget-share must lie between 0 and 1, got {budget_share}")
    limited = OffloadConfig(
        device_budget=int(model.bank.total_bytes * budget_share),
        host_budget=host_budget,
        emulated_link_bandwidth=emulated_link_bandwidth,
    )
    offloaded = [
        (policy, replace(limited, policy=policy, predictor=predictor if policy in FORECASTING else None))
        for policy in policies
    ]
    for policy, config in offloaded:
        if not make_policy(policy).uses_costs:  # those measure costs first, which takes seconds
            Engine(model, config).close()  # refuses a budget that is too small before anything runs
    one_jit = [("everything resident, one jit", OffloadConfig(numerics="fast"))]
    return [
        *(one_jit if WholeModel.is_faster_on(model.device) else []),
        ("everything resident", OffloadConfig()),
        *offloaded,
    ]


def warm_up(engine: Engine, prompts: list[str], max_new_tokens: int) -> None:
    """Generates a few tokens in the shapes of a full run, to compile nearly all programs that it needs."""
    for done, _ in enumerate(engine.stream(prompts, max_new_tokens=max_new_tokens), 1):
        if done >= WARM_STEPS * len(prompts):
            break


def measured(
    engine: Engine, prompts: list[str], max_new_tokens: int, timeline: Path | None = None
) -> tuple[Completions, int]:
    """Generates, and repeats a few times as long as a program was compiled during the run.

    Returns:
        The last result, and how many programs were compiled during it: 0 unless every run had new shapes.
    """
    for _ in range(MOST_RUNS):
        with counted() as compilations:
            result = engine.generate(prompts, max_new_tokens=max_new_tokens, timeline=timeline)
        if not compilations.programs:
            break
    return result, compilations.programs


def described(model: Model) -> dict[str, Any]:
    """Returns the numbers of a model that matter to offloading."""
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
