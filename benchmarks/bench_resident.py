"""What does the engine cost when everything is resident?

Random models of about 100 million expert parameters, in the shapes of Mixtral and OLMoE, are written to disk
once and read by everybody: the engine, the same decoder as one jitted loop over all decode steps, and Hugging
Face transformers with each of its implementations of the experts. All get the same prompt ids and take the
same number of greedy steps; transformers is fed the tokens that the engine picked, and picks its own all the
same. Prefill and decode are timed apart, the candidates in turns.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.hf_peer import EXPERTS, HFPeer, find_python
from benchmarks.jitted_loop import JittedLoop
from benchmarks.random_models import random_decoder, shapes
from layerscope_jax import Engine, ModelConfig, OffloadConfig, load, save
from layerscope_jax.generation.scheduler import batch_rows

PARTS = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    shapes: tuple[str, ...] = ("mixtral", "olmoe")
    """Of mixtral, olmoe, mixtral-444m (the model other runtimes are compared on)."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    new_tokens: int = 17
    """The first comes from the prefill, each other from a decode step."""
    rounds: int = 5
    hf_python: Path | None = None
    """Interpreter with torch and transformers; this one if it has both. Without, they are left out."""


def race(
    prompts: np.ndarray,
    new_tokens: int,
    rounds: int,
    engine: Engine,
    loop: JittedLoop,
    peer: HFPeer | None,
) -> dict[str, Any]:
    """One point: a model, a dtype and a batch."""
    batch = len(prompts)
    tokens: dict[str, list[list[int]]] = {}

    def of_engine() -> harness.Parts:
        parts, tokens["engine"] = harness.run_engine(engine, prompts.tolist(), new_tokens)
        steps = parts["step"]
        assert isinstance(steps, list)
        return {"prefill": parts["first"], "decode": sum(steps) / len(steps)}

    def of_loop(name: str, rows: int) -> Callable[[], harness.Parts]:
        def call() -> harness.Parts:
            parts, found = loop.run(prompts, new_tokens, rows)
            tokens[name] = found.tolist()
            return parts

        return call

    def of_peer(peer: HFPeer, experts: str) -> Callable[[], harness.Parts]:
        def call() -> harness.Parts:
            found = peer.run(prompts.tolist(), tokens["engine"], experts)
            tokens["hf-" + experts] = found["tokens"]
            return {"decode": found["decode"]} | (
                {} if experts == "batched_mm" else {"prefill": found["prefill"]}
            )

        return call

    candidates: dict[str, Callable[[], harness.Parts]] = {"engine": of_engine}
    # The engine pads one row to two; a loop need not, and the better of the two is the one to compare with.
    candidates |= {
        f"loop-{rows}-rows": of_loop(f"loop-{rows}-rows", rows) for rows in {batch, batch_rows(batch)}
    }
    if peer is not None:
        raced = [experts for experts in EXPERTS if batch == 1 or experts != "batched_mm"]
        candidates |= {"hf-" + experts: of_peer(peer, experts) for experts in peer.usable(raced)}
    samples = harness.measure(candidates, rounds)
    return {
        "ms": {
            name: {part: harness.spread(1e3 * s for s in seconds) for part, seconds in found.parts.items()}
            for name, found in samples.items()
        },
        "ratios": {
            part: ratios({n: s.parts[part] for n, s in samples.items() if part in s.parts}) for part in PARTS
        },
        "same_tokens_as_engine": {
            name: float(np.mean(np.asarray(found) == np.asarray(tokens["engine"])))
            for name, found in tokens.items()
            if name != "engine"
        },
        "compiled_while_timed": sum(found.compiled for found in samples.values()),
    }


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The quotients that are asked for, each to the best of its kind by median."""
    best = {}
    for kind in ("loop", "hf"):
        names = [name for name in seconds if name.startswith(kind + "-")]
        if names:
            best[kind] = min(names, key=lambda name: float(np.median(seconds[name])))
    found: dict[str, Any] = {
        "best": best,
        "engine/loop": harness.ratio(seconds["engine"], seconds[best["loop"]]),
    }
    if "hf" in best:
        found["hf/engine"] = harness.ratio(seconds[best["hf"]], seconds["engine"])
    return found


def tables(rows: Sequence[dict[str, Any]]) -> None:
    for part in PARTS:
        lines = []
        for row in rows:
            ms, found = row["ms"], row["ratios"][part]
            best = found["best"]

            def time_of(name: str | None, ms: dict = ms, part: str = part) -> str:
                return "-" if name is None else f"{ms[name][part]['median']:.2f} ms"

            def times(key: str, found: dict = found) -> str:
                return f"{found[key]['median']:.2f} ({found[key]['p90']:.2f})" if key in found else "-"

            lines.append(
                (
                    f"{row['shape']} {row['dtype']}",
                    row["batch"],
                    time_of(best["loop"]),
                    time_of("engine"),
                    time_of(best.get("hf")),
                    times("engine/loop"),
                    times("hf/engine"),
                    best.get("hf", "-").removeprefix("hf-"),
                )
            )
        headings = ("model", "batch", "loop", "engine", "HF", "engine/loop", "HF/engine")
        title = "Prefill of every prompt" if part == "prefill" else "A decode step"
        harness.print_table(f"{title}: median ms, ratios as median (p90)", (*headings, "HF experts"), lines)


def main(options: Options) -> dict[str, Any]:
    return run(options, shapes(options.quick), "resident")


def run(options: Options, configs: dict[str, ModelConfig], name: str) -> dict[str, Any]:
    """Measures some models; `name` is that of the benchmark."""
    unknown = set(options.shapes) - set(configs)
    if unknown:
        raise SystemExit(f"error: shapes are {', '.join(configs)}; got {', '.join(sorted(unknown))}")
    dtypes, batches, rounds = options.dtypes, options.batches, options.rounds
    width, new_tokens = options.prompt_tokens, options.new_tokens
    if options.quick:
        dtypes, batches, rounds, width, new_tokens = dtypes[:1], batches[:1], 2, 16, 5
    python = find_python(options.hf_python)
    record = harness.machine()
    threads = record["cores"]
    progress = Console(stderr=True)
    rows = []
    for shape in options.shapes:
        for dtype in dtypes:
            with contextlib.ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_resident_")))
                save(random_decoder(configs[shape]), folder, dtype=dtype)
                model = load(folder)
                peer = None
                if python is not None:
                    peer = stack.enter_context(HFPeer(python, folder, threads))
                    record["versions"] |= peer.versions
                engine = stack.enter_context(
                    Engine(model, OffloadConfig(numerics="fast", max_num_seqs=max(options.batches)))
                )
                loop = JittedLoop(model)
                for batch in batches:
                    ids = np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, width))
                    point = race(ids, new_tokens, rounds, engine, loop, peer)
                    rows.append({"shape": shape, "dtype": dtype, "batch": batch} | point)
                    progress.print(f"measured {shape} {dtype}, batch {batch}")
    result = {
        "benchmark": name,
        "quick": options.quick,
        "machine": record,
        "prompt_tokens": width,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "rows": rows,
    }
    tables(rows)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
