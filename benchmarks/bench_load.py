"""How long does loading a checkpoint take, and how much memory?

Writes random bfloat16 checkpoints of about 1.6 GB in the shapes of OLMoE and Mixtral, and loads each in fresh
processes: the Hugging Face folder with experts read into memory and with experts mapped where they lie, and
what `layerscope convert` makes of it, with experts in each of several formats, read and mapped. Time and
processor time are set against plainly reading the same files (all find them in the page cache, so that the
disk is left out); the peak of resident memory, over that of a process that has only imported JAX, against the
bytes of the weights: 1.00 would be the weights and nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from benchmarks import harness

Shapes = dict[str, tuple[int, ...]]

SHARD_BYTES = 400_000_000
REACH = 1.15  # peak memory over weights


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    rounds: int = 3
    """Loads of each checkpoint; the median time and the highest peak are shown."""
    shapes: tuple[str, ...] = ("OLMoE", "Mixtral")
    formats: tuple[str, ...] = ("bfloat16", "int4")
    """Of experts in converted checkpoints."""


def hf_configs(quick: bool) -> dict[str, dict[str, Any]]:
    """The published configs with fewer layers and experts."""
    olmoe = {
        "architectures": ["OlmoeForCausalLM"],
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 48,
        "num_experts_per_tok": 8,
    }
    mixtral = {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }
    if quick:
        olmoe |= {"vocab_size": 4096, "num_hidden_layers": 1, "num_experts": 8}
        mixtral |= {
            "vocab_size": 4096,
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_local_experts": 4,
        }
    return {"OLMoE": olmoe, "Mixtral": mixtral}


def write_checkpoint(folder: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """Shards of random weights, made without JAX."""
    import ml_dtypes
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = (random.random(shape, np.float32) - np.float32(0.5)).astype(ml_dtypes.bfloat16)
        if sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def memory(key: str) -> int:
    """`VmRSS` or `VmHWM` (its highest so far) of this process, in bytes.

    Not `ru_maxrss`, which a new process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"expected {key} in /proc/self/status, found none; this benchmark needs Linux")


def measure_load(folder: Path, mmap: bool) -> dict[str, Any]:
    """Loads in this process, which must be fresh: seconds, and bytes of memory beyond JAX's own."""
    import jax

    from layerscope_jax.checkpoints.model import load

    # What JAX needs in any program, compiler included, is not the loader's.
    jax.jit(lambda x: x.T + 1)(jax.numpy.ones((256, 128))).block_until_ready()
    baseline = memory("VmRSS")
    before = memory("VmHWM")
    start, cpu_start = time.perf_counter(), time.process_time()
    model = load(folder, mmap=mmap)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    weights = model.bank.total_bytes + sum(leaf.nbytes for leaf in jax.tree.leaves(model.dense))
    peak = memory("VmHWM")
    if peak == before and not mmap:
        raise ValueError("memory peaked before loading began: the checkpoint is too small to measure")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "weight_bytes": weights,
        "peak_bytes": peak - baseline,
        "kept_bytes": memory("VmRSS") - baseline,
    }


def in_fresh_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plain_read(folder: Path) -> float:
    """Seconds to read every shard once into one small buffer."""
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    for file in folder.rglob("*"):
        if not file.is_file():
            continue
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start


def shapes_of(config: dict[str, Any]) -> Shapes:
    from layerscope_jax.checkpoints.weight_names import Naming
    from layerscope_jax.models import config_from_hf

    return Naming.of(config_from_hf(config)).shapes


def convert_to(folder: Path, out: Path, experts: str) -> None:
    from layerscope_jax.checkpoints.convert import convert

    convert(folder, out, experts=experts)


def measure(name: str, config: dict[str, Any], rounds: int, formats: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each layout and format of one checkpoint."""
    with tempfile.TemporaryDirectory(prefix="bench_load_") as temporary:
        published = Path(temporary, "published")
        published.mkdir()
        in_fresh_process(write_checkpoint, published, config, in_fresh_process(shapes_of, config))
        layouts = [("read", "bfloat16", published, False), ("in place", "bfloat16", published, True)]
        for experts in formats:
            out = Path(temporary, experts)
            in_fresh_process(convert_to, published, out, experts)
            layouts.append(("converted, read", experts, out, False))
            layouts.append(("converted, in place", experts, out, True))
        loads: list[list[dict[str, Any]]] = [[] for _ in layouts]
        reads: list[list[float]] = [[] for _ in layouts]
        for folder in {folder for *_, folder, _ in layouts}:
            plain_read(folder)  # brings the files into the page cache
        for _ in range(rounds):  # taken in turns, so that all see the same machine
            for number, (*_, folder, mmap) in enumerate(layouts):
                reads[number].append(plain_read(folder))
                loads[number].append(in_fresh_process(measure_load, folder, mmap))
    return [
        {"shape": name, "layout": layout, "format": experts} | summary(loads[number], reads[number])
        for number, (layout, experts, *_) in enumerate(layouts)
    ]


def summary(loads: list[dict[str, Any]], reads: list[float]) -> dict[str, Any]:
    """Returns what several loads of one checkpoint took."""
    weights = loads[0]["weight_bytes"]
    seconds, cpu_seconds = (median(load[key] for load in loads) for key in ("seconds", "cpu_seconds"))
    return {
        "weight_bytes": weights,
        "load_seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "load_gb_per_second": weights / seconds / 1e9,
        "load_gb_per_cpu_second": weights / cpu_seconds / 1e9,
        "read_gb_per_second": weights / median(reads) / 1e9,
        "peak_over_weights": max(load["peak_bytes"] for load in loads) / weights,
        "kept_over_weights": max(load["kept_bytes"] for load in loads) / weights,
        "all_load_seconds": [load["seconds"] for load in loads],
        "all_cpu_seconds": [load["cpu_seconds"] for load in loads],
        "all_read_seconds": reads,
    }


def main(options: Options) -> dict[str, Any]:
    machine = harness.machine()  # before all this has loaded it
    rounds = 1 if options.quick else options.rounds
    rows = [
        row
        for name, config in hf_configs(options.quick).items()
        if name in options.shapes
        for row in measure(name, config, rounds, options.formats)
    ]
    headings = (
        "shape",
        "layout",
        "experts",
        "weights",
        "load",
        "processor time",
        "load speed",
        "a core",
        "plain read",
        f"peak / weights (reach {REACH})",
        "kept",
    )
    lines = [
        (
            row["shape"],
            row["layout"],
            row["format"],
            f"{row['weight_bytes'] / 1e9:.2f} GB",
            f"{row['load_seconds']:.2f} s",
            f"{row['cpu_seconds']:.2f} s",
            f"{row['load_gb_per_second']:.2f} GB/s",
            f"{row['load_gb_per_cpu_second']:.2f} GB/s",
            f"{row['read_gb_per_second']:.2f} GB/s",
            f"{row['peak_over_weights']:.3f}",
            f"{row['kept_over_weights']:.3f}",
        )
        for row in rows
    ]
    harness.print_table("Loading checkpoints from the page cache", headings, lines)
    result = {
        "benchmark": "load",
        "quick": options.quick,
        "machine": machine,
        "rounds": rounds,
        "rows": rows,
    }
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
