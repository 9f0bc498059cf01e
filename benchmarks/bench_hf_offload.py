"""How does the engine compare with transformers and accelerate where the experts do not fit?

A few layers of a published model's real size, with random weights in bfloat16, are written to disk and read
by both. Both may keep as many bytes of weights on the device: the dense ones, and a part of the experts. What
is left out there waits in main memory: accelerate keeps whole layers and copies the others in each step; the
engine goes by its policy. Both get the same prompts and take the same number of greedy steps; transformers is
fed the tokens that the engine picked. Prefill and decode are timed apart, the candidates in turns.

Without a GPU the device is main memory, and accelerate reads what is left out from disk: that only shows that
all of this runs.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.hf_peer import HFPeer, find_python
from benchmarks.random_models import PUBLISHED, published, random_model
from layerscope_jax import Engine, OffloadConfig, save
from layerscope_jax.scheduling.registry import FORECASTING

EXPERTS = ("eager", "grouped_mm")
PARTS = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    model: str = "qwen3-30b-a3b"
    layers: int = 6
    policies: tuple[str, ...] = ("auto", "on-demand")
    budget: int = 40
    """Percent of the bytes of all experts."""
    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 64
    new_tokens: int = 9
    """The first comes from the prefill, each other from a decode step."""
    rounds: int = 3
    hf_python: Path | None = None
    """Interpreter with torch, transformers and accelerate; this one if it has all of them."""


def race(
    engines: dict[str, Engine], peer: HFPeer, prompts: list[list[int]], options: Options
) -> dict[str, Any]:
    """One batch."""
    tokens: dict[str, list[list[int]]] = {}

    def of_engine(name: str) -> Callable[[], harness.Parts]:
        def call() -> harness.Parts:
            parts, tokens[name] = harness.run_engine(engines[name], prompts, options.new_tokens)
            assert isinstance(parts["step"], list)
            return {"prefill": parts["first"], "decode": float(np.mean(parts["step"]))}

        return call

    def of_peer(experts: str) -> Callable[[], harness.Parts]:
        def call() -> harness.Parts:
            found = peer.run(prompts, tokens[options.policies[0]], experts)
            tokens["hf-" + experts] = found["tokens"]
            return {part: found[part] for part in PARTS}

        return call

    peers = {"hf-" + experts: of_peer(experts) for experts in peer.usable(EXPERTS)}
    if not peers:
        raise SystemExit("error: transformers can compute this model in no way here")
    calls = {name: of_engine(name) for name in engines} | peers
    samples = harness.measure(calls, options.rounds)
    seconds = {part: {name: found.parts[part] for name, found in samples.items()} for part in PARTS}
    best = {
        part: min(peers, key=lambda name, part=part: float(np.median(seconds[part][name]))) for part in PARTS
    }
    first = np.asarray(tokens[options.policies[0]])
    return {
        "batch": len(prompts),
        "ms": {
            part: {name: harness.spread(1e3 * s for s in each) for name, each in found.items()}
            for part, found in seconds.items()
        },
        "best_hf": best,
        "hf_to_engine": {
            part: {name: harness.ratio(seconds[part][best[part]], seconds[part][name]) for name in engines}
            for part in PARTS
        },
        "same_tokens": {name: float(np.mean(np.asarray(found) == first)) for name, found in tokens.items()},
        "compiled_while_timed": sum(found.compiled for found in samples.values()),
    }


def tables(rows: Sequence[dict[str, Any]]) -> None:
    for part in PARTS:
        names = [name for name in rows[0]["ms"][part]]
        lines = [
            (
                row["batch"],
                *(f"{row['ms'][part][name]['median']:.2f}" for name in names),
                *(f"{r['median']:.2f} ({r['p90']:.2f})" for r in row["hf_to_engine"][part].values()),
            )
            for row in rows
        ]
        ratios = [f"HF / {name}" for name in rows[0]["hf_to_engine"][part]]
        title = "Prefill of every prompt" if part == "prefill" else "A decode step"
        harness.print_table(f"{title}: median ms, ratios as median (p90)", ("batch", *names, *ratios), lines)


def main(options: Options) -> dict[str, Any]:
    if options.model not in PUBLISHED:
        raise SystemExit(f"error: models are {', '.join(PUBLISHED)}; got {options.model}")
    python = find_python(options.hf_python, "accelerate")
    if python is None:
        raise SystemExit(
            "error: needs torch, transformers and accelerate; name an interpreter with --hf-python"
        )
    if options.quick:
        options = replace(options, layers=4, batches=(2,), prompt_tokens=8, new_tokens=4, rounds=1)
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    record = harness.machine()
    with contextlib.ExitStack() as stack:
        model = random_model(replace(published(options.model, options.quick), num_layers=options.layers))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_hf_offload_")))
        save(model, folder)
        budget = model.bank.total_bytes * options.budget // 100
        dense = sum(array.nbytes for array in jax.tree.leaves(model.dense))
        peer = stack.enter_context(HFPeer(python, folder, record["cores"], dense + budget))
        record["versions"] |= peer.versions
        engines = {
            policy: stack.enter_context(
                Engine(
                    model,
                    OffloadConfig(
                        max_num_seqs=max(options.batches),
                        device_budget=budget,
                        policy=policy,
                        predictor="gate" if policy in FORECASTING else None,
                    ),
                )
            )
            for policy in options.policies
        }
        rows = []
        for batch in options.batches:
            size = (batch, options.prompt_tokens)
            ids = np.random.default_rng(batch).integers(0, model.config.vocab_size, size)
            rows.append(race(engines, peer, ids.tolist(), options))
        result = {
            "benchmark": "hf_offload",
            "quick": options.quick,
            "machine": record,
            "model": options.model,
            "layers": options.layers,
            "all_experts_bytes": model.bank.total_bytes,
            "dense_bytes": dense,
            "budget_bytes": budget,
            "hf_places": peer.places,
            "rounds": options.rounds,
            "rows": rows,
        }
    tables(rows)
    print("\naccelerate placed " + ", ".join(f"{n} parts on {place}" for place, n in peer.places.items()))
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
