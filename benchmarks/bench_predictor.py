"""What does the predictor cost in training and in every layer?

Training: 65,536 tokens of a model of 26 layers of 64 experts, 6 a token, as DeepSeek-V2-Lite routes. The rows
are random, since only the time is asked for; what is learned is the scorecard's affair. In the engine: one
decode step's attention, norm and router of each of the shipped model's layers, with the shipped predictor
inside and without.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import layerscope_jax
import predictor
from benchmarks import harness
from layerscope_jax import load
from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.decoder import Between
from layerscope_jax.prediction.traces import Passage, TraceHeader, TraceWriter
from layerscope_jax.runtime.programs import Layers, programs
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.train import TrainConfig, train

SHIPPED = Path(layerscope_jax.__file__).parent / "shipped"


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    tokens: int = 65_536
    layers: int = 26
    experts: int = 64
    choices: int = 6
    width: int = 128
    """Of the model; the PCA keeps all of it."""
    look_ahead: tuple[int, ...] = (2, 8)
    epochs: int = 1
    batches: tuple[int, ...] = (1, 8, 64)
    rounds: int = 100


def random_trace(folder: Path, options: Options) -> None:
    """Rows of no meaning, a fifth more than are trained on: those validate."""
    rng = np.random.default_rng(0)
    layers, experts, choices, width = options.layers, options.experts, options.choices, options.width
    model = ModelIdentity(
        family="random",
        num_layers=layers,
        hidden_size=width,
        num_experts=experts,
        experts_per_token=choices,
        routers="0" * 16,
    )
    writer = TraceWriter(folder, TraceHeader(model=model, hidden=width))
    length, rows = 256, 0
    while rows < options.tokens * 1.4:
        passages = [Passage("random", f"{rows}/{i}", "train", 0, 128, length) for i in range(32)]
        count = length * len(passages)
        writer.write(
            passages,
            {
                "tokens": np.zeros(count, np.int32),
                "experts": rng.random((count, layers, experts), np.float32).argpartition(choices)[
                    ..., :choices
                ],
                "weights": np.full((count, layers, choices), 1 / choices),
                "hidden": rng.standard_normal((count, layers, width), np.float32),
            },
        )
        rows += count
    writer.finish()
    eye = np.broadcast_to(np.eye(width, dtype=np.float32), (layers, width, width)).copy()
    ones = np.ones((layers, width), np.float32)
    Basis(np.zeros_like(ones), eye, ones).save(folder)
    weight = rng.standard_normal((layers, width, experts)).astype(np.float32)
    Routers(weight, ones).save(folder)


def training(options: Options) -> list[dict[str, Any]]:
    """Seconds from the trace on disk to the predictor on disk, compilation included."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_predictor_") as work:
        random_trace(Path(work) / "trace", options)
        for look_ahead in options.look_ahead:
            config = TrainConfig(
                traces=Path(work) / "trace",
                out=Path(work) / f"run-{look_ahead}",
                tokens=options.tokens,
                epochs=options.epochs,
                look_ahead=look_ahead,
            )
            began = time.perf_counter()
            trained = train(config)
            seconds = time.perf_counter() - began
            rows.append({"look_ahead": look_ahead, "seconds": seconds, "size_bytes": trained.size_bytes})
    return rows


def cost(options: Options) -> list[dict[str, Any]]:
    """Milliseconds of a layer's jitted part, with the predictor and without."""
    model, llapor = load(SHIPPED), predictor.shipped()
    bound = llapor.bind(model)
    spans = model.config.spans
    layers, held_layers = len(spans), [Layers.of(model, span) for span in spans]
    numbers = [jnp.int32(layer) for layer in range(layers)]
    rows = []
    for batch in options.batches:
        config, dtype = model.config, model.bank.dtype
        outputs = jnp.zeros((batch * config.experts_per_token + 1, config.hidden_size), dtype)
        weights = jnp.zeros((batch, config.experts_per_token), jnp.float32)
        state = Between(jnp.ones((batch, 1, config.hidden_size), dtype), outputs, weights)
        positions, counted = jnp.full((batch, 1), 100, jnp.int32), jnp.ones((2, batch), jnp.float32)
        caches: dict[str, Any] = {}

        def step(
            with_it: bool,
            batch=batch,
            state=state,
            positions=positions,
            counted=counted,
            caches=caches,
            config=config,
            dtype=dtype,
        ):
            name = "with" if with_it else "without"
            run = programs(config, dtype, llapor if with_it else None).attend_and_route
            held = caches.setdefault(name, new_caches(config, batch, 256, dtype, model.device))
            began = time.perf_counter()
            for layer, span in enumerate(spans):
                forecast = (bound[layer], numbers[layer], counted) if with_it else (None, None, None)
                out = run(held_layers[layer], state, positions, held[span.start : span.stop], *forecast)
                held[span.start : span.stop] = out[4]
                jax.device_get((out[2], out[5]))
            return {"layer": (time.perf_counter() - began) / layers}

        found = harness.measure(
            {"without": lambda step=step: step(False), "with": lambda step=step: step(True)}, options.rounds
        )
        without, beside = (found[name].parts["layer"] for name in ("without", "with"))
        rows.append(
            {
                "batch": batch,
                "without_ms": harness.spread(1e3 * s for s in without),
                "with_ms": harness.spread(1e3 * s for s in beside),
                "ratio": harness.ratio(beside, without),
            }
        )
    return rows


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        small: Any = {"tokens": 2048, "layers": 4, "look_ahead": (2,), "batches": (1,), "rounds": 2}
        options = Options(**(vars(options) | small))
    record = harness.machine()
    result = {
        "benchmark": "predictor",
        "quick": options.quick,
        "machine": record,
        "tokens": options.tokens,
        "layers": options.layers,
        "experts": options.experts,
        "epochs": options.epochs,
        "training": training(options),
        "in_the_engine": cost(options),
    }
    harness.print_table(
        f"Training on {options.tokens:,} tokens, {options.layers} layers, {options.epochs} epoch(s)",
        ("look-ahead", "seconds", "MB"),
        [
            (r["look_ahead"], f"{r['seconds']:.1f}", f"{r['size_bytes'] / 1e6:.1f}")
            for r in result["training"]
        ],
    )
    harness.print_table(
        "A layer's attention and router in a decode step: median ms (p90)",
        ("batch", "without", "with LLaPor", "with / without"),
        [
            (
                r["batch"],
                *(f"{r[name]['median']:.3f} ({r[name]['p90']:.3f})" for name in ("without_ms", "with_ms")),
                f"{r['ratio']['median']:.2f} ({r['ratio']['p90']:.2f})",
            )
            for r in result["in_the_engine"]
        ],
    )
    return harness.finish(options, result)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
