"""What do logits cost that depend on nothing else in the batch?

The same random models, prompts and steps with `numerics="auto"` and with `numerics="exact"`, in turns, all
experts resident on a CPU: a model of each kind of attention (`shapes_of_attention`), prefill and decode timed
apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.random_models import random_decoder, shapes_of_attention
from layerscope_jax import Engine, Model, OffloadConfig

WAYS = ("auto", "exact")
PARTS = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    shapes: tuple[str, ...] = ("grouped", "sinks", "latent", "delta")
    """Of grouped, sinks, latent, delta."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 7


def race(model: Model, batch: int, options: Options) -> dict[str, Any]:
    """Times of both ways for one model and batch; ratios round by round."""
    width, new_tokens = options.prompt_tokens, options.new_tokens
    prompts = np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, width)).tolist()
    tokens: dict[str, Any] = {}

    def timed(engine: Engine, way: str) -> Callable[[], harness.Parts]:
        def call() -> harness.Parts:
            parts, tokens[way] = harness.run_engine(engine, prompts, new_tokens)
            steps = parts["step"]
            assert isinstance(steps, list)
            return {"prefill": parts["first"], "decode": sum(steps) / len(steps)}

        return call

    with contextlib.ExitStack() as stack:
        engines = {
            way: stack.enter_context(Engine(model, OffloadConfig(numerics=way, max_num_seqs=batch)))
            for way in WAYS
        }
        samples = harness.measure(
            {way: timed(engine, way) for way, engine in engines.items()}, options.rounds
        )
    work = {"prefill": batch * width, "decode": batch}
    return {
        "tokens_per_s": {
            way: {part: work[part] / min(found.parts[part]) for part in PARTS}
            for way, found in samples.items()
        },
        "exact/auto": {
            part: harness.ratio(samples["exact"].parts[part], samples["auto"].parts[part]) for part in PARTS
        },
        "same_tokens": float(np.mean(np.asarray(tokens["auto"]) == np.asarray(tokens["exact"]))),
        "compiled_while_timed": sum(found.compiled for found in samples.values()),
    }


def main(options: Options) -> dict[str, Any]:
    configs, rows = shapes_of_attention(options.quick), []
    if options.quick:
        changes = {"batches": options.batches[:1], "prompt_tokens": 16, "new_tokens": 5, "rounds": 2}
        options = Options(**(vars(options) | changes))
    for shape in options.shapes:
        for dtype in options.dtypes:
            model = Model.from_decoder(random_decoder(configs[shape], dtype=jnp.dtype(dtype)))
            for batch in options.batches:
                rows.append({"shape": shape, "dtype": dtype, "batch": batch} | race(model, batch, options))
                Console(stderr=True).print(f"measured {shape} {dtype}, batch {batch}")
    lines = [
        (
            f"{row['shape']} {row['dtype']}",
            row["batch"],
            *(f"{row['tokens_per_s'][way][part]:,.0f}" for part in PARTS for way in WAYS),
            *(
                f"{row['exact/auto'][part]['median']:.2f} ({row['exact/auto'][part]['p90']:.2f})"
                for part in PARTS
            ),
        )
        for row in rows
    ]
    headings = ("model", "batch", *(f"{part}, {way}" for part in PARTS for way in WAYS))
    times = tuple(f"time of {part}, exact/auto" for part in PARTS)
    title = "Tokens per second in the fastest round; ratios of times, round by round, as median (p90)"
    harness.print_table(title, (*headings, *times), lines)
    result = {
        "benchmark": "exact",
        "quick": options.quick,
        "machine": harness.machine(),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "rows": rows,
    }
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
