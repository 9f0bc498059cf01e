"""How close do experts on the CPU come to its memory bandwidth and arithmetic?

Experts of one shape, so many that no cache holds them, are computed once each: by loops of our own, bfloat16
by AMX or products of pairs where the CPU has them, and by XLA's products, which the engine does not take.
Beside them, in the same rounds: how fast the same threads read memory, how fast a plain float32 product of
that size is, and how fast the engine computes the same experts in bfloat16.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from numba import njit

from benchmarks import harness
from layerscope_jax.formats import QuantisedFormat, format_named
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.host_kernels import ENCODED, LOOPS, AddressKernel, RowsKernel, kernel_of
from layerscope_jax.models.experts import matmul
from layerscope_jax.support.machine import cores

PLAIN = "bfloat16"
"""The dtype of activations, unless weights are float32."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to compute."""

    formats: tuple[str, ...] = ("bfloat16", "float32")
    """Of the experts; fewer bits too."""
    width: int = 2048
    hidden: int = 1408
    """Of DeepSeek-V2-Lite's experts."""
    experts: int = 48
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    threads: int = cores()
    rounds: int = 7
    xla: bool = True
    """Also by XLA's products: for packed experts their reference, which takes long."""


@njit(nogil=True, fastmath=True)
def total(numbers: np.ndarray) -> float:
    found = np.float32(0)
    for index in range(numbers.size):  # as a loop over the array itself it is not made of vectors
        found += numbers[index]
    return found


class Reading:
    """Threads that add up an array that no cache holds."""

    def __init__(self, threads: int, megabytes: int):
        self._parts = np.array_split(np.ones(megabytes * 250_000, np.float32), threads)
        self._pool = ThreadPoolExecutor(threads)
        self.bytes = sum(part.nbytes for part in self._parts)

    def __call__(self) -> None:
        list(self._pool.map(total, self._parts))

    def rates(self, rounds: int) -> list[float]:
        """GB/s of each round."""
        self()
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            self()
            found.append(self.bytes / (time.perf_counter() - began) / 1e9)
        return found


def random_experts(options: Options, name: str) -> list[InMemory]:
    """Experts in a format, each in memory of its own."""
    rng = np.random.default_rng(0)
    scale, format = options.width**-0.5, format_named(name)
    into, out = (options.hidden, options.width), (options.width, options.hidden)
    matrices = [(rng.standard_normal(shape, np.float32) * scale).astype(PLAIN) for shape in (into, into, out)]
    packed = format.pack(*(matrix.astype(name if name == "float32" else PLAIN) for matrix in matrices))
    return [
        InMemory.of(type(packed)(*(jnp.asarray(np.array(array)) for array in packed)), format)
        for _ in range(options.experts)
    ]


def cell(
    options: Options,
    name: str,
    held: Sequence[InMemory],
    plain: Sequence[InMemory],
    tokens: int,
    read: Reading,
) -> dict[str, Any]:
    """All ways, reading, the plain product and the same in bfloat16, at one number of tokens an expert."""
    count, format = len(held), format_named(name)
    dtype = np.dtype(jnp.dtype("float32" if name == "float32" else PLAIN))
    rows = Assignments(np.tile(np.arange(count, dtype=np.int32), (tokens, 1)))
    x = jnp.ones((tokens, options.width), jnp.float32)
    matrices = [expert.arrays.gate.astype(jnp.float32) for expert in plain[: max(1, count // 4)]]
    product = jax.jit(matmul)

    def multiply() -> None:
        jax.block_until_ready([product(x, matrix) for matrix in matrices])

    def computed(computer: CpuExperts, some: Sequence[InMemory], dtype: np.dtype) -> Callable[[], None]:
        inputs = np.ones((tokens, options.width), dtype)
        outputs = np.zeros((rows.total + 1, options.width), dtype)

        def chosen(numbers: Sequence[int]) -> list[InMemory]:
            return [some[number] for number in numbers]

        return functools.partial(computer.compute, outputs, inputs, rows, range(count), chosen, WorkStats())

    kernel, sizes = kernel_of(format, dtype, options.width, options.hidden), (options.width, options.hidden)
    assert kernel is not None
    loops = ENCODED[0] if isinstance(format, QuantisedFormat) else LOOPS
    ways: dict[str, AddressKernel | RowsKernel | None] = {"loops": loops, kernel.name: kernel}
    if options.xla:
        ways["xla"] = None
    computers = {way: CpuExperts(options.threads, using, format) for way, using in ways.items()}
    plainly = CpuExperts(options.threads, kernel_of(format_named(PLAIN), np.dtype(jnp.dtype(PLAIN)), *sizes))
    calls = {way: computed(computer, held, dtype) for way, computer in computers.items()}
    calls[PLAIN] = computed(plainly, plain, np.dtype(jnp.dtype(PLAIN)))
    samples = harness.measure(calls | {"product": multiply, "read": read}, options.rounds)
    for computer in (*computers.values(), plainly):
        computer.close()
    seconds = {way: found.parts["seconds"] for way, found in samples.items()}
    size = held[0].layout.nbytes
    flops = 6 * tokens * options.width * options.hidden
    taken = kernel.name
    reading = [read.bytes / s / 1e9 for s in seconds["read"]]
    return {
        "format": name,
        "tokens": tokens,
        "taken": taken,
        "ms": {way: harness.spread(1e3 * s / count for s in seconds[way]) for way in ways},
        "gb_per_s": {way: harness.spread(size * count / s / 1e9 for s in seconds[way]) for way in ways},
        "gflops": {way: harness.spread(flops * count / s / 1e9 for s in seconds[way]) for way in ways},
        "read_gb_per_s": harness.spread(reading),
        "taken_to_reading": harness.ratio([size * count / s / 1e9 for s in seconds[taken]], reading),
        "taken_to_bfloat16": harness.ratio(seconds[taken], seconds[PLAIN]),
        "xla_to_taken": harness.ratio(seconds["xla"], seconds[taken]) if options.xla else None,
        "product_gflops": harness.spread(flops / 3 * len(matrices) / s / 1e9 for s in seconds["product"]),
    }


def table(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        taken = row["taken"]
        ms = [
            f"{row['ms'][way]['median']:.2f} ({row['ms'][way]['p90']:.2f})" if way in row["ms"] else "-"
            for way in ("loops", "-" if taken == "loops" else taken, "xla")
        ]
        lines.append(
            (
                f"{row['format']}, {row['tokens']}",
                taken,
                *ms,
                f"{row['xla_to_taken']['median']:.2f}" if row["xla_to_taken"] else "-",
                f"{row['taken_to_bfloat16']['median']:.2f}",
                f"{row['gb_per_s'][taken]['median']:.1f}",
                f"{row['read_gb_per_s']['median']:.1f}",
                f"{row['taken_to_reading']['median']:.0%}",
                f"{row['gflops'][taken]['median'] / row['product_gflops']['median']:.0%}",
            )
        )
    headings = (
        "experts in, tokens",
        "the engine takes",
        "loops, ms an expert (p90)",
        "the taken",
        "XLA",
        "XLA / taken",
        "to bfloat16",
        "taken, GB/s",
        "reading alone",
        "of it",
        "of a plain product",
    )
    harness.print_table("Experts on the CPU, medians", headings, lines)


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        options = replace(options, width=64, hidden=96, experts=4, tokens=(1, 4), rounds=1)
    record = harness.machine()
    read = Reading(options.threads, 4 if options.quick else 800)
    rows = []
    with jax.default_device(jax.devices("cpu")[0]):  # also where there is an accelerator
        plain = random_experts(options, PLAIN)
        for name in options.formats:
            held = plain if name == PLAIN else random_experts(options, name)
            rows += [cell(options, name, held, plain, tokens, read) for tokens in options.tokens]
    result = {
        "benchmark": "host_experts",
        "quick": options.quick,
        "machine": record,
        "width": options.width,
        "hidden": options.hidden,
        "experts": options.experts,
        "threads": options.threads,
        "rows": rows,
    }
    table(rows)
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
