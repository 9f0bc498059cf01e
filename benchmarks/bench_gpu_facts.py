"""What is true of this machine's accelerator, its link and its pinned memory?

The engine rests on each of these: that a copy from pinned host memory goes on while the device computes, and
how fast it is by size; that NumPy's view of a pinned array, and JAX's CPU arrays made of it, are the same
memory; how much pinned memory can be had; what dispatching a program and reading a few integers back costs;
that a donated buffer is written to again; that an expert's rows do not hang on what else is in its dispatch.
All of it is measured on JAX's first device. Where that is a CPU,
"device" and "host" are the same memory, and the answers are those of JAX's CPU backend.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import harness
from benchmarks.memory_facts import donation, on_device, ordinary, pinned, pinned_memory, views, waited
from layerscope_jax import parse_bytes
from layerscope_jax.kernels.grouping import TILES
from layerscope_jax.models.experts import ExpertWeights, ffn
from layerscope_jax.offload.bank import device_sharding
from layerscope_jax.offload.slotted import tiled_slots

IN_A_ROW = 4
"""Copies that are begun before the first is waited for, where several are."""

HIDDEN = 0.5
"""Part of the shorter of two times that must vanish behind the other for them to overlap."""

ARRAYS_IN, ARRAYS_OUT = 15, 6
"""Of a layer's program; see `bench_overhead`."""

CALLS = 50
"""Small calls a round."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    sizes: tuple[str, ...] = ("64KiB", "1MiB", "3MiB", "6MiB", "32MiB", "112MiB")
    """Of copies. A matrix of an expert: 3 MiB in Qwen3-30B-A3B, 5.5 in DeepSeek-V2-Lite, 112 in Mixtral."""
    copy: str = "6MiB"
    copies: int = 32
    """Of that size, beside a kernel."""
    side: int = 4096
    """Of the square matrices that the kernel multiplies."""
    pinned_limit: str = "8GiB"
    """As much pinned memory is asked for at most, and less where the host has not twice as much."""
    pinned_step: str = "1GiB"
    rounds: int = 7


@partial(jax.jit, static_argnames="times")
def products(x: jax.Array, y: jax.Array, times: int) -> jax.Array:
    return jax.lax.fori_loop(0, times, lambda _, x: x @ y, x)


def overlap(options: Options) -> dict[str, Any]:
    """Milliseconds of copies alone, of a kernel that takes about as long, and of both at once."""
    sources = [pinned(parse_bytes(options.copy)) for _ in range(options.copies)]
    square = jnp.full((options.side, options.side), 1 / options.side, jnp.bfloat16)

    def copies() -> list[jax.Array]:
        return [on_device(source) for source in sources]

    def one_by_one() -> None:
        for source in sources:
            jax.block_until_ready(on_device(source))

    once = harness.measure({"copy": waited(copies), "kernel": waited(products, square, square, 1)}, 3)
    copy_s, kernel_s = (min(once[name].parts["seconds"]) for name in ("copy", "kernel"))
    times = max(1, round(copy_s / kernel_s))
    kernel = partial(products, square, square, times)

    with ThreadPoolExecutor(1) as pool:

        def beside() -> jax.Array:
            computed = kernel()
            pool.submit(one_by_one).result()
            return computed

        calls: dict[str, Callable[[], None]] = {
            "copies": waited(copies),
            "copies, one by one": one_by_one,
            "kernel": waited(kernel),
            "kernel, then copies": waited(lambda: (kernel(), copies())),
            "copies, then kernel": waited(lambda: (copies(), kernel())),
            "copies by another thread": waited(beside),
        }
        samples = harness.measure(calls, options.rounds)
    seconds = {name: found.parts["seconds"] for name, found in samples.items()}
    hidden = {}
    for name, alone in {
        "kernel, then copies": "copies",
        "copies, then kernel": "copies",
        "copies by another thread": "copies, one by one",
    }.items():
        rounds = zip(seconds[alone], seconds["kernel"], seconds[name], strict=True)
        hidden[name] = harness.spread((a + b - both) / min(a, b) for a, b, both in rounds)
    return {
        "bytes": sum(source.nbytes for source in sources),
        "products": times,
        "ms": {name: harness.spread(1e3 * s for s in found) for name, found in seconds.items()},
        "hidden": hidden,
        "overlaps": all(found["median"] >= HIDDEN for found in hidden.values()),
    }


def bandwidth(options: Options) -> list[dict[str, Any]]:
    """GB/s by size: to the device from pinned memory, one copy and several, and from NumPy's; and back.

    On a CPU nothing is copied to be read back.
    """
    rows = []
    for name in options.sizes:
        size = parse_bytes(name)
        sources = [pinned(size) for _ in range(IN_A_ROW)]
        array = ordinary(size)

        def read_back(array: np.ndarray = array) -> dict[str, float]:
            there = jax.block_until_ready(on_device(array))  # anew: JAX keeps with an array what was read
            began = time.perf_counter()
            np.asarray(there)
            return {"seconds": time.perf_counter() - began}

        calls: dict[str, Callable[[], harness.Parts | None]] = {
            "pinned": waited(on_device, sources[0]),
            f"pinned, {IN_A_ROW} in a row": waited(lambda some: [*map(on_device, some)], sources),
            "NumPy": waited(on_device, array),
            "read back": read_back,
        }
        samples = harness.measure(calls, options.rounds)
        each = {call: size * (IN_A_ROW if "row" in call else 1) for call in calls}
        rows.append(
            {
                "bytes": size,
                "gb_per_s": {
                    call: harness.spread(each[call] / s / 1e9 for s in found.parts["seconds"])
                    for call, found in samples.items()
                },
            }
        )
    return rows


def small_calls(options: Options) -> dict[str, dict[str, float]]:
    """Microseconds of what a layer does once or a few times."""
    few = jnp.asarray(np.arange(128, dtype=np.int32).reshape(16, 8))
    numbers = np.asarray(few).copy()
    others = [jnp.asarray(np.full(4, n, np.int32)) for n in range(ARRAYS_IN)]
    add = jax.jit(lambda x: x + 1)
    many = jax.jit(lambda *arrays: tuple(array + 1 for array in arrays[:ARRAYS_OUT]))

    def timed(call: Callable[[], Any]) -> Callable[[], harness.Parts]:
        def times() -> harness.Parts:
            us = []
            for _ in range(CALLS):
                began = time.perf_counter()
                found = call()
                us.append(1e6 * (time.perf_counter() - began))
                jax.block_until_ready(found)
            return {"us": us}

        return times

    samples = harness.measure(
        {
            "a program, until it returns": timed(lambda: add(few)),
            f"with {ARRAYS_IN} arrays in and {ARRAYS_OUT} out": timed(lambda: many(*others)),
            "a program, until it is done": timed(lambda: jax.block_until_ready(add(few))),
            "its 128 integers read back": timed(lambda: np.asarray(add(few))),
            "a program of a NumPy array, until it is done": timed(
                lambda: jax.block_until_ready(add(numbers))
            ),
            "128 integers put on the device": timed(lambda: jax.block_until_ready(on_device(numbers))),
        },
        options.rounds,
    )
    return {name: harness.spread(found.parts["us"]) for name, found in samples.items()}


def same_bits(width: int, hidden: int) -> dict[str, bool]:
    """Whether an expert's rows have the same bits wherever it is in a dispatch, and in the slots.

    Returns:
        Rows of a tile -> whether they have.
    """
    random, found = np.random.default_rng(0), {}
    numbers = [
        random.standard_normal(shape) * shape[1] ** -0.5 for shape in ((hidden, width), (width, hidden))
    ]
    into, out = (matrix.astype(jnp.bfloat16) for matrix in numbers)
    pool = ExpertWeights(*(on_device(np.stack([one] * TILES)) for one in (into, into, out)))
    for rows in (2, 32):
        inputs = random.standard_normal((TILES * rows, width)).astype(jnp.bfloat16)
        tiles = np.arange(TILES * rows, dtype=np.int32).reshape(TILES, rows)
        seen = set()
        for first in (0, 1, TILES // 2):  # the first tile's place in the dispatch, and its expert's slot
            places = np.concatenate([np.roll(tiles, first, 0), np.arange(TILES, dtype=np.int32)[:, None]], 1)
            outputs = jnp.zeros((len(inputs) + 1, width), jnp.bfloat16, device=device_sharding())
            outputs, _ = tiled_slots(outputs, on_device(inputs), places, pool, 1, ffn)
            seen.add(np.asarray(outputs)[:rows].tobytes())
        found[str(rows)] = len(seen) == 1
    return found


def tables(result: dict[str, Any]) -> None:
    both, view, kept, most = (result[name] for name in ("overlap", "view", "donation", "pinned_memory"))
    ms = {name: f"{found['median']:.2f}" for name, found in both["ms"].items()}
    reading = {name: f"{found['median']:.1f}" for name, found in view["read_gb_per_s"].items()}
    grown = "-" if view["grown_bytes"] is None else f"{view['grown_bytes'] / 1e6:.0f} MB"
    hidden = ", ".join(f"{found['median']:.0%} ({name})" for name, found in both["hidden"].items())
    answers: list[tuple[str, bool | str, str]] = [
        ("memories of the device", ", ".join(result["memories"]), f"by default {result['default_memory']}"),
        (
            "a copy from pinned memory overlaps a kernel",
            both["overlaps"],
            f"ms: copies {ms['copies']}, kernel {ms['kernel']}; hidden: {hidden}",
        ),
        (
            "NumPy's view of a pinned array is its buffer",
            view["view_is_the_buffer"],
            f"the process grew by {grown} of {view['bytes'] / 1e6:.0f}",
        ),
        (
            "a CPU array made of the view, too",
            view["cpu_array_is_the_buffer"],
            f"one thread reads {reading['pinned']} GB/s of it, {reading['ordinary']} of other memory",
        ),
        ("donated rows are written to in place", kept["rows"], ""),
        ("donated caches, too", kept["caches"], ""),
        (
            "an expert's rows have the same bits anywhere in a dispatch",
            all(result["same_bits"].values()),
            ", ".join(
                f"{rows} rows: {'yes' if same else 'no'}" for rows, same in result["same_bits"].items()
            ),
        ),
        (
            "pinned memory to be had",
            f"{most['bytes'] / 2**30:.2f} GiB",
            f"stopped by: {most['stopped_by']}",
        ),
    ]
    lines = [(q, {True: "yes", False: "no"}.get(a, a), why) for q, a, why in answers]  # type: ignore[call-overload]
    harness.print_table("Facts", ("question", "answer", "measured"), lines)
    ways = list(result["bandwidth"][0]["gb_per_s"])
    harness.print_table(
        "Copies, GB/s, median (p90)",
        ("KiB", *ways),
        [
            (f"{row['bytes'] / 1024:.0f}", *map(spread, row["gb_per_s"].values()))
            for row in result["bandwidth"]
        ],
    )
    harness.print_table(
        "Small calls",
        ("call", "us, median (p90)"),
        [(name, spread(found)) for name, found in result["small_calls_us"].items()],
    )


def spread(found: dict[str, float]) -> str:
    return f"{found['median']:.1f} ({found['p90']:.1f})"


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {"sizes": ("64KiB", "1MiB"), "copy": "64KiB", "copies": 4, "side": 128, "rounds": 2}
        options = replace(options, **changes, pinned_limit="64MiB", pinned_step="16MiB")
    device = jax.devices()[0]
    result = {
        "benchmark": "gpu_facts",
        "quick": options.quick,
        "machine": harness.machine(),
        "platform": device.platform,
        "memories": sorted(memory.kind for memory in device.addressable_memories()),
        "default_memory": device.default_memory().kind,
        "overlap": overlap(options),
        "bandwidth": bandwidth(options),
        "small_calls_us": small_calls(options),
        "view": views(parse_bytes(options.sizes[-1]) // 8 * 8, options.rounds),
        "donation": donation(),
        "same_bits": same_bits(64, 32) if options.quick else same_bits(2048, 768),
        "pinned_memory": pinned_memory(*map(parse_bytes, (options.pinned_step, options.pinned_limit))),
    }
    tables(result)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
