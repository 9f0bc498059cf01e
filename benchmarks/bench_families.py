"""Does a family cost more than its arithmetic?

A random model of each kind of attention (`shapes_of_attention`) is written to disk. The engine reads it, with
all experts resident, and so does Hugging Face transformers, with each of its implementations of the experts.
Both get the same prompt ids and take the same number of greedy steps; prefill and decode are timed apart, in
turns. It is `bench_resident.py` with other models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from benchmarks import bench_resident
from benchmarks.random_models import shapes_of_attention


@dataclass(frozen=True, kw_only=True)
class Options(bench_resident.Options):
    """What to measure."""

    shapes: tuple[str, ...] = ("grouped", "sinks", "latent", "delta", "gemma")
    """Of grouped, sinks, latent, delta, gemma."""
    batches: tuple[int, ...] = (1, 8)


def main(options: Options) -> dict[str, Any]:
    return bench_resident.run(options, shapes_of_attention(options.quick), "families")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
