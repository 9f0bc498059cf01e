"""What do experts on the disk cost, and what does reading them ahead gain?

A random model whose experts lie in a safetensors file generates with a part of them in host memory, under the
policy `host-only`. Candidates, in turns:

- memory: every expert in memory, layer by layer; what the others could reach at best.
- on demand: experts are read when a layer needs them.
- popularity: read ahead too, those that a layer chose most often so far.
- gate: read ahead too, those that the next layers' routers choose from this layer's hidden state.
- int4: as popularity, with experts that `layerscope convert` packed in int4; other weights, so other tokens.
- mmap: the file is mapped, and the kernel reads pages as they are touched. As much of it stays in memory as
  the others hold: what was used longest ago is dropped from the page cache, expert by expert.

Reads go past the page cache, and what the file's pages take there is dropped before each run.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import harness
from benchmarks.random_models import random_model
from layerscope_jax import Engine, ExpertId, Model, ModelConfig, OffloadConfig, load, save
from layerscope_jax.checkpoints.convert import convert
from layerscope_jax.kernels.cpu import InMemory, default_threads, layout_of
from layerscope_jax.kernels.loops import ARRAYS
from layerscope_jax.offload.disk import BLOCK, DiskBank, File
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.residency import Residency
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.profiling.disk_costs import read_times
from layerscope_jax.runtime.decisions import Reads
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.scheduling.baselines import HostOnly
from layerscope_jax.support.machine import cpu_device

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure.

    Attributes:
        batches: numbers of requests that decode at once.
        budgets: shares of the experts' bytes that host memory holds, in percent.
        new_tokens: tokens of each request.
        rounds: runs of each candidate.
        folder: where the checkpoint is written, on the disk to be measured; a temporary folder by default.
    """

    batches: tuple[int, ...] = (1, 4)
    budgets: tuple[int, ...] = (25, 50)
    new_tokens: int = 24
    rounds: int = 3
    folder: Path | None = None


def shape(quick: bool) -> ModelConfig:
    """Qwen3-MoE's proportions, smaller: 1.6 GB of experts of 3.1 MB each."""
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 128,
        "num_experts": 64,
        "moe_intermediate_size": 512,
        "vocab_size": 8192,
    }
    if quick:
        sizes |= {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "head_dim": 32, "num_experts": 8}
        sizes |= {"moe_intermediate_size": 32, "vocab_size": 256}
    return ModelConfig(
        **sizes,
        family="qwen3_moe",
        experts_per_token=4,
        normalize_top_k=True,
        qk_norm="head",
        max_position_embeddings=1024,
    )


class Mapped(HostExperts):
    """Experts of the host in a mapped file, whose pages are dropped so that only so many experts stay.

    Args:
        bank: the experts on the disk, all in one file.
        slots: number of experts that stay.
    """

    def __init__(self, bank: DiskBank, slots: int):
        super().__init__(bank, cpu_device(), default_threads(cpu_device()), shares_inputs=True)
        path = bank.pieces(ExpertId(0, 0))[0].file
        self._file = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(self._file, 0, prot=mmap.PROT_READ)
        self._begin = np.frombuffer(self._map, np.uint8).ctypes.data
        self._slots, self._used = slots, dict[ExpertId, None]()
        self._disk, self._layout = bank, layout_of(bank.format, *bank.sizes)
        self.forget()

    def several(self, layer: int, experts: Sequence[int]) -> list[InMemory]:
        return [self._mapped(ExpertId(layer, expert)) for expert in experts]

    def _mapped(self, expert: ExpertId) -> InMemory:
        self._used.pop(expert, None)
        self._used[expert] = None
        addresses = [self._begin + piece.start for piece in self._disk.pieces(expert)]
        padded = np.array([*addresses, 0][:ARRAYS], np.int64)
        return InMemory(None, padded.tobytes(), self._layout)

    def compute(self, *arguments: Any) -> None:
        super().compute(*arguments)
        while len(self._used) > self._slots:
            oldest = next(iter(self._used))
            del self._used[oldest]
            for piece in self._disk.pieces(oldest):
                self._drop(piece.start, piece.size)

    def forget(self) -> None:
        """Drops all pages of the file."""
        self._used.clear()
        self._drop(0, len(self._map))

    def _drop(self, start: int, size: int) -> None:
        first = -(-start // BLOCK) * BLOCK
        length = (start + size) // BLOCK * BLOCK - first
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)
            os.posix_fadvise(self._file, first, length, os.POSIX_FADV_DONTNEED)


def drop_pages(path: Path) -> None:
    """Drops a file's pages from the page cache."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(number)


def engines(
    memory: Model, disk: Model, packed: Model, batch: int, slots: int, stack: ExitStack
) -> dict[str, tuple[Engine, Callable[[], None]]]:
    """Returns an engine for each candidate, and what to call before a run."""
    bank = disk.bank
    assert isinstance(bank, DiskBank)
    path = bank.pieces(ExpertId(0, 0))[0].file
    config = OffloadConfig(device_budget=0, policy="host-only", max_num_seqs=batch)
    limited = replace(config, host_budget=slots * bank.expert_bytes)
    made = {
        "memory": Engine(memory, config),
        "on demand": Engine(disk, limited),
        "popularity": Engine(disk, limited),
        "gate": Engine(disk, replace(limited, predictor="gate")),
        "int4": Engine(packed, limited),
        "mmap": Engine(memory, config),
    }
    for engine in made.values():
        stack.callback(engine.close)
    on_demand: Any = made["on demand"].runner
    on_demand.decisions.reads = Reads(on_demand.pool, memory.geometry(0), None)
    host = Mapped(bank, slots)
    mapped: Any = made["mmap"]
    mapped._loop._runner = mapped._fitting.runner = stack.enter_context(closing(layerwise(memory, host)))
    forgets = dict.fromkeys(made, lambda: drop_pages(path))
    forgets |= {"mmap": host.forget, "int4": lambda: None}  # reads of converted experts are direct
    return {name: (engine, forgets[name]) for name, engine in made.items()}


def layerwise(model: Model, host: HostExperts) -> LayerByLayer:
    """Returns a runner that computes every expert by `host`."""
    geometry = model.geometry(0)
    books, link = Residency(0, model.bank.expert_bytes), Transfers(model.bank, model.device)
    return LayerByLayer(model, HostOnly(), None, books, link, host, Forecasts(None, model, geometry))


def run(options: Options) -> dict[str, Any]:
    config = shape(options.quick)
    new_tokens, rounds = (4, 1) if options.quick else (options.new_tokens, options.rounds)
    batches = (1,) if options.quick else options.batches
    with tempfile.TemporaryDirectory(prefix="bench_disk_", dir=options.folder) as temporary:
        folder = Path(temporary)
        memory = random_model(config, SEED)
        save(memory, folder)
        disk = load(folder, experts="disk")
        convert(folder, folder / "int4", experts="int4")
        packed = load(folder / "int4", experts="disk")
        bank = disk.bank
        assert isinstance(bank, DiskBank)
        read_ms, start_ms = read_times(bank)
        rows = [
            row
            for percent in options.budgets
            for batch in batches
            for row in cell(memory, disk, packed, percent, batch, new_tokens, rounds)
        ]
        direct = File(bank.pieces(ExpertId(0, 0))[0].file)
        result = {
            "quick": options.quick,
            "machine": harness.machine(),
            "expert_bytes": bank.expert_bytes,
            "all_experts_bytes": bank.total_bytes,
            "read_ms": read_ms,
            "read_start_ms": start_ms,
            "disk_bytes_per_s": bank.expert_bytes / read_ms * 1e3,
            "direct": direct.direct,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "rows": rows,
        }
        direct.close()
    return result


def cell(
    memory: Model, disk: Model, packed: Model, percent: int, batch: int, new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Returns a row for each candidate, within one budget and for one number of requests."""
    slots = max(1, len(list(disk.bank)) * percent // 100)
    random = np.random.default_rng(SEED)
    prompts = [random.integers(0, disk.config.vocab_size, 16).tolist() for _ in range(batch)]
    tokens: dict[str, list[list[int]]] = {}
    with ExitStack() as stack:
        candidates = engines(memory, disk, packed, batch, slots, stack)

        def call(name: str) -> Callable[[], harness.Parts]:
            engine, forget = candidates[name]

            def once() -> harness.Parts:
                forget()
                pool = getattr(engine.runner, "pool", None)
                parts, tokens[name] = harness.run_engine(engine, prompts, new_tokens)
                steps = parts["step"]
                if pool is None:
                    return {"step": steps}
                stats, steps_run = pool.stats, new_tokens
                needed = stats.hits + stats.misses
                return {
                    "step": steps,
                    "read": (stats.demand_bytes + stats.ahead_bytes) / steps_run,
                    "wasted": stats.wasted * engine.model.bank.expert_bytes / steps_run,
                    "hits": stats.hits / needed if needed else 1.0,
                    "waited": stats.wait_s / steps_run,
                }

            return once

        samples = harness.measure({name: call(name) for name in candidates}, rounds, warm=2, warm_ups=4)
    if any(found != tokens["memory"] for name, found in tokens.items() if name != "int4"):
        raise AssertionError("the candidates gave different tokens")
    base = samples["on demand"].parts["step"]
    return [
        {
            "candidate": name,
            "host_percent": percent,
            "batch": batch,
            "step_s": harness.spread(found.parts["step"]),
            "to_on_demand": harness.ratio(found.parts["step"], base),
            **{part: harness.spread(values) for part, values in found.parts.items() if part != "step"},
            "compiled": found.compiled,
        }
        for name, found in samples.items()
    ]


def show(result: dict[str, Any]) -> None:
    rows = []
    for row in result["rows"]:
        read = row.get("read")
        rows.append(
            (
                row["candidate"],
                f"{row['host_percent']}%",
                row["batch"],
                f"{1e3 * row['step_s']['median']:.1f} ({1e3 * row['step_s']['p90']:.1f})",
                f"{row['to_on_demand']['median']:.2f} ({row['to_on_demand']['p90']:.2f})",
                *(
                    ("-", "-", "-", "-")
                    if read is None
                    else (
                        f"{read['median'] / 1e6:.1f}",
                        f"{row['wasted']['median'] / 1e6:.1f}",
                        f"{row['hits']['median']:.0%}",
                        f"{1e3 * row['waited']['median']:.1f}",
                    )
                ),
            )
        )
    rate = result["disk_bytes_per_s"] / 1e9
    harness.print_table(
        f"Decode steps with experts on the disk ({rate:.2f} GB/s, direct reads: {result['direct']}); "
        f"experts of {result['expert_bytes'] / 1e6:.1f} MB, {result['all_experts_bytes'] / 1e9:.2f} GB",
        (
            "candidate",
            "in memory",
            "batch",
            "step ms",
            "to on demand",
            "read MB",
            "in vain MB",
            "hits",
            "waited ms",
        ),
        rows,
    )


def main(options: Options) -> dict[str, Any]:
    result = run(options)
    show(result)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
