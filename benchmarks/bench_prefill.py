"""How long until the first token, and how much memory does a prefill take?

One prompt of each length is prefilled: with every expert resident, and with a part of them on the device
under each policy, over a link paced to a rate; in one step, and in chunks. Chunks bound what the activations
of a step take. Each passes all layers, so what is not resident is needed once for each of them.

The prompts are the checkpoint's own, one after another until they are long enough. Longer ones than the model
was made for are allowed here: what it says after them is of no interest, what it computes is as much.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.bench_policies import SHIPPED, read_prompts
from layerscope_jax import Engine, Model, OffloadConfig, load
from layerscope_jax.runtime.layerwise import LayerByLayer

RESIDENT = "resident"


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    checkpoint: Path = SHIPPED
    prompts: Path | None = None
    """JSON lines with a "prompt" each; prompts.jsonl in the checkpoint's folder if left out."""
    policies: tuple[str, ...] = (RESIDENT, "auto", "presched", "on-demand")
    budget: int = 25
    """Percent of the bytes of all experts, for policies other than resident."""
    link: str = "100MB"
    """Bytes a second."""
    tokens: tuple[int, ...] = (128, 512, 2048)
    """Lengths of the prompt."""
    chunks: tuple[int, ...] = (4096, 512, 128)
    """Tokens of a step at most; what cuts no prompt of a length is left out there."""
    rounds: int = 3


def long_prompt(prompts: Sequence[Sequence[int]], tokens: int) -> list[int]:
    """So many tokens of the prompts, one after another, again and again."""
    return list(itertools.islice(itertools.cycle(itertools.chain.from_iterable(prompts)), tokens))


def status(name: str, process: int | str = "self") -> int:
    """A size in bytes of `/proc/self/status`, or of another process's."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grows, at most, during a call; None where Linux does not say.

    What the allocator keeps from before is given back first.
    """
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    return max(0, status("VmHWM") - before)


def peak_growth(engine: Engine, prompt: list[int]) -> int | None:
    """Bytes by which the process grows while it prefills `prompt`, with no rows kept from calls before."""
    if isinstance(engine.runner, LayerByLayer):
        engine.runner.device_experts.clear()
    return growth(lambda: engine.generate([prompt], max_new_tokens=1, stop_token_ids=()))


def cell(model: Model, prompt: list[int], options: Options) -> list[dict[str, Any]]:
    """Every policy and chunk with one prompt."""
    budget = model.bank.total_bytes * options.budget // 100
    chunks = [chunk for chunk in options.chunks if chunk == max(options.chunks) or chunk < len(prompt)]

    def run(engine: Engine) -> Callable[[], harness.Parts]:
        return lambda: {"first": harness.run_engine(engine, [prompt], 1)[0]["first"]}

    with contextlib.ExitStack() as stack:
        engines = {
            (policy, chunk): stack.enter_context(
                Engine(
                    model,
                    OffloadConfig(prefill_chunk_size=chunk)
                    if policy == RESIDENT
                    else OffloadConfig(
                        device_budget=budget,
                        policy=policy,
                        emulated_link_bandwidth=options.link,
                        prefill_chunk_size=chunk,
                    ),
                )
            )
            for policy in options.policies
            for chunk in chunks
        }
        names = {f"{policy} {chunk}": (policy, chunk) for policy, chunk in engines}
        samples = harness.measure({name: run(engines[key]) for name, key in names.items()}, options.rounds)
        first = {key: samples[name].parts["first"] for name, key in names.items()}
        rows = []
        for name, (policy, chunk) in names.items():
            engine, times = engines[policy, chunk], first[policy, chunk]
            result = engine.generate([prompt], max_new_tokens=1, stop_token_ids=())
            rows.append(
                {
                    "prompt_tokens": len(prompt),
                    "policy": policy,
                    "chunk": chunk,
                    "steps": -(-len(prompt) // chunk),
                    "ttft_ms": harness.spread(1e3 * s for s in times),
                    "time_to_one_step": harness.ratio(times, first[policy, chunks[0]]),
                    "time_to_resident": harness.ratio(times, first[options.policies[0], chunk]),
                    "bytes_moved": result.stats.bytes_moved,
                    "peak_growth_bytes": peak_growth(engine, prompt),
                    "compiled_while_timed": samples[name].compiled,
                }
            )
        return rows


def table(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        grown = row["peak_growth_bytes"]
        lines.append(
            (
                f"{row['prompt_tokens']:,}",
                row["policy"],
                row["chunk"] if row["steps"] > 1 else "-",
                row["steps"],
                f"{row['ttft_ms']['median']:.0f} ({row['ttft_ms']['p90']:.0f})",
                f"{row['time_to_one_step']['median']:.2f}",
                f"{row['time_to_resident']['median']:.2f}",
                f"{row['bytes_moved'] / 1e6:.1f}",
                "-" if grown is None else f"{grown / 1e6:.0f}",
            )
        )
    headings = ("prompt", "policy", "chunk", "steps", "TTFT ms (p90)", "to one step", "to resident")
    harness.print_table("Prefill of one prompt, medians", (*headings, "MB moved", "MB grown"), lines)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {"policies": options.policies[::3], "tokens": (40,), "chunks": (4096, 32), "rounds": 1}
        options = Options(**(vars(options) | changes))
    with contextlib.suppress(RuntimeError):  # JAX is in use already: with as many as it has
        jax.config.update("jax_num_cpu_devices", 2)  # without an accelerator, the second is its host
    try:
        model = load(options.checkpoint)
        prompts = read_prompts(options.prompts or options.checkpoint / "prompts.jsonl", model, 1)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    room = max(model.config.max_position_embeddings, *(tokens + 1 for tokens in options.tokens))
    model = replace(model, config=replace(model.config, max_position_embeddings=room))
    record, progress, rows = harness.machine(), Console(stderr=True), []
    for tokens in options.tokens:
        rows += cell(model, long_prompt(prompts, tokens), options)
        progress.print(f"measured {tokens} tokens")
    table(rows)
    return harness.finish(
        options,
        {
            "benchmark": "prefill",
            "quick": options.quick,
            "machine": record,
            "all_experts_bytes": model.bank.total_bytes,
            "budget_percent": options.budget,
            "link": options.link,
            "rounds": options.rounds,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
