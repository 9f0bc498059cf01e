"""Where does the time of a decode step go?

Everything resident on a CPU, so that a step is one program. Beside it run, in turns: the same program
without the experts, the experts of all layers alone with the step's own inputs and choices, and a program
that takes the same arguments and does nothing. For experts and for everything else it says what reading
their bytes takes at the bandwidth measured beside.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.random_models import random_decoder, shapes
from layerscope_jax import Engine, Model, OffloadConfig, load, save
from layerscope_jax.generation.scheduler import batch_rows
from layerscope_jax.kernels import inside
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.runtime.resident import ResidentOnCpu, decode_program
from layerscope_jax.support.machine import read_bytes_per_s

SHAPE = "mixtral-444m"
STEPS = 16
"""Steps of a timed call."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    formats: tuple[str, ...] = ("bfloat16", "int8", "int4")
    """Of experts. Beside packed ones the dense matrices are in int8."""
    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    rounds: int = 7


class Step:
    """A decode step of a batch, in parts that can be called again and again.

    Attributes:
        bytes: name of a part -> bytes that it reads.
    """

    def __init__(self, engine: Engine, batch: int, width: int):
        runner, model = engine.runner, engine.model
        assert isinstance(runner, ResidentOnCpu)
        config = model.config
        rows = batch_rows(batch)  # as an engine runs it: one request takes two rows
        prompts = np.random.default_rng(batch).integers(0, config.vocab_size, (rows, width)).astype(np.int32)
        caches = new_caches(config, rows, 2 * width, model.bank.dtype, model.device)
        positions = np.tile(np.arange(width, dtype=np.int32), (rows, 1))
        positions[batch:] = PAD_POSITION
        last = np.full(rows, width - 1, np.int32)
        found, _, caches = runner.step(prompts, positions, last, caches, None)
        places = np.where(positions[:, -1:] == PAD_POSITION, PAD_POSITION, width).astype(np.int32)
        self._next = (np.asarray(found)[:, None], places, np.zeros(rows, np.int32))
        self._active = jnp.asarray(np.arange(rows) < batch)
        self._caches, self._runner = caches, runner
        seen: list[tuple[jax.Array, np.ndarray]] = []
        runner.tap = lambda layer, inputs, chosen, weights: seen.append((jnp.copy(inputs), chosen.copy()))
        *_, self._caches = runner.step(*self._next, self._caches, None)
        runner.tap = None
        self._seen = [(inputs, jnp.asarray(chosen, jnp.int32)) for inputs, chosen in seen]
        experts = sum(len(np.unique(chosen[:batch])) for _, chosen in seen)
        self.bytes = {
            "experts": experts * model.bank.expert_bytes,
            "dense": dense_bytes(model, batch * width),
        }
        assert runner.inside.target is not None
        self._program = (config, model.bank.dtype, runner.inside.target)
        self._without, self._alone, self._nothing = self._parts()

    def _parts(self) -> tuple[Callable, Callable, Callable]:
        target = self._program[2]

        def zeros(name: str, inputs: jax.Array, experts: jax.Array, *others: jax.Array) -> jax.Array:
            return jnp.zeros((experts.size, inputs.shape[1]), inputs.dtype)

        def without(*arguments: Any) -> Any:
            with patch.object(inside, "rows", zeros):  # read while it is traced
                return program(*arguments)

        @jax.jit
        def alone(tables, seen, active):
            after: Any = jnp.zeros((), seen[0][0].dtype)
            for table, (inputs, chosen) in zip(tables, seen, strict=True):
                # Each layer waits for the one before, as in a step.
                rows = inside.rows(target, inputs + after, chosen, active, table)
                after = rows[0, 0] * jnp.asarray(1e-30, rows.dtype)
            return after

        def nothing(layers, ends, table, tables, tokens, positions, last, caches, sampling):
            return tokens[:, 0] + 1, caches

        program = decode_program.__wrapped__(*self._program)
        return without, alone, jax.jit(nothing, donate_argnums=7)

    def whole(self) -> None:
        *_, self._caches = self._runner.decode(*self._next, self._caches, None)
        jax.block_until_ready(self._caches)

    def dense(self) -> None:
        *_, self._caches = self._without(*self._arguments())
        jax.block_until_ready(self._caches)

    def experts(self) -> None:
        jax.block_until_ready(self._alone(self._runner._tables, self._seen, self._active))

    def call(self) -> None:
        *_, self._caches = self._nothing(*self._arguments())
        jax.block_until_ready(self._caches)

    def _arguments(self) -> tuple[Any, ...]:
        runner = self._runner
        weights = (runner._layers, runner.dense.ends, runner.dense.table, runner._tables)
        return *weights, *self._next, self._caches, None


def dense_bytes(model: Model, positions: int) -> int:
    """Bytes of all weights but experts that a step reads, and of keys and values at `positions` in all."""
    config = model.config
    read = {key: value for key, value in model.dense.items() if key != "embed" or config.tie_embeddings}
    sizes = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    one = jax.tree.leaves(new_caches(config, 1, 1, model.bank.dtype, model.device))
    return sizes + positions * sum(leaf.nbytes for leaf in one)


def race(engine: Engine, batch: int, options: Options) -> dict[str, Any]:
    """Times of a step and its parts."""
    step = Step(engine, batch, options.prompt_tokens)

    def timed(call: Callable[[], None]) -> Callable[[], harness.Parts]:
        def run() -> harness.Parts:
            began = time.perf_counter()
            for _ in range(STEPS):
                call()
            return {"ms": 1e3 * (time.perf_counter() - began) / STEPS}

        return run

    calls = {name: timed(getattr(step, name)) for name in ("whole", "experts", "dense", "call")}
    samples = harness.measure(calls, options.rounds)
    bandwidth = read_bytes_per_s()
    ms = {name: harness.spread(found.parts["ms"]) for name, found in samples.items()}
    middle = {name: found["median"] for name, found in ms.items()}
    return {
        "ms": ms,
        "bytes": step.bytes,
        "read_bytes_per_s": bandwidth,
        "reading_ms": {part: 1e3 * size / bandwidth for part, size in step.bytes.items()},
        # Each of the parts was called by itself; a step is called once.
        "left_ms": middle["whole"] - (middle["experts"] + middle["dense"] - middle["call"]),
        "compiled_while_timed": sum(found.compiled for found in samples.values()),
    }


@contextlib.contextmanager
def models(options: Options) -> Iterator[Iterator[tuple[str, Model]]]:
    """Yields the random model in each format."""
    config = shapes(options.quick)[SHAPE]
    if options.quick:
        config = replace(config, head_dim=32, moe_intermediate_size=32)  # int4 has no less
    with tempfile.TemporaryDirectory(prefix="bench_step_time_") as folder:
        save(random_decoder(config), folder, dtype="bfloat16")

        def each() -> Iterator[tuple[str, Model]]:
            for name in options.formats:
                plain = name in ("bfloat16", "float32")
                yield (
                    name,
                    (
                        load(folder, dtype=name)
                        if plain
                        else load(Path(folder), format=name, dense_format="int8")
                    ),
                )
                gc.collect()

        yield each()


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        options = replace(options, batches=options.batches[:1], prompt_tokens=8, rounds=2)
    rows = []
    with models(options) as loaded:
        for name, model in loaded:
            for batch in options.batches:
                with Engine(model, OffloadConfig(max_num_seqs=batch)) as engine:
                    rows.append({"format": name, "batch": batch} | race(engine, batch, options))
                Console(stderr=True).print(f"measured {name}, batch {batch}")
            del model
    lines = [
        (
            row["format"],
            row["batch"],
            *(f"{row['ms'][part]['median']:.2f} ({row['ms'][part]['p90']:.2f})" for part in row["ms"]),
            f"{row['left_ms']:.2f}",
            *(
                f"{row['bytes'][part] / 1e6:,.0f} MB, {row['reading_ms'][part]:.2f}"
                for part in ("experts", "dense")
            ),
            f"{row['read_bytes_per_s'] / 1e9:.1f}",
        )
        for row in rows
    ]
    headings = ("experts in", "batch", "step", "experts alone", "step without experts", "empty call", "left")
    reading = ("reading experts", "reading the rest", "GB/s read")
    harness.print_table("Median ms (p90) of a decode step and its parts", (*headings, *reading), lines)
    result = {
        "benchmark": "step_time",
        "quick": options.quick,
        "machine": harness.machine(),
        "shape": SHAPE,
        "prompt_tokens": options.prompt_tokens,
        "rounds": options.rounds,
        "rows": rows,
    }
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
