"""What do fewer bits cost in quality, and what do they save?

Quality: a model, the shipped one unless told otherwise, scores held-out passages with its experts in each
format, beside bfloat16, and in some with its dense layers in int8 too: loss, divergence of the distributions
of the next token, how often the likeliest token is the same, and how many of the chosen experts are. Bytes
and time: of experts in DeepSeek-V2-Lite's size, computed by the kernel that the engine takes, and of decode
steps of the model over a paced link with a quarter of the experts resident.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tokenizers import Tokenizer

import layerscope_jax
from benchmarks import harness
from layerscope_jax import Engine, Model, OffloadConfig, load
from layerscope_jax.formats import ExpertFormat, format_named
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.host_kernels import kernel_of
from layerscope_jax.models import Decoder
from layerscope_jax.support.machine import cores
from predictor import SHIPPED
from predictor.documents import read_documents

SHIPPED_MODEL = Path(layerscope_jax.__file__).parent / "shipped"
PLAIN, DENSE = "bfloat16", " + dense int8"

SCORED = 1024
"""Tokens that are scored at once: each has a number for every token of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to compare."""

    model: Path = SHIPPED_MODEL
    text: tuple[Path, ...] = ()
    """Files of held-out documents, lines of {"id": ..., "text": ...}: passages of each in turns. Without any,
    those shipped with the shipped model's predictor; other models have other tokens, and need text."""
    passages: int = 96
    length: int = 128
    """Tokens of a passage of `text`."""
    formats: tuple[str, ...] = ("int8", "fp8", "int4", "mxfp4", "nvfp4")
    """Beside bfloat16."""
    dense: tuple[str, ...] = ("int8", "int4")
    """Formats of experts that are tried with dense layers in int8 too."""
    width: int = 2048
    hidden: int = 1408
    experts: int = 32
    tokens: tuple[int, ...] = (1, 8, 64)
    link: str = "200MB"
    """Bytes a second of the paced link."""
    batch: int = 8
    new_tokens: int = 8
    rounds: int = 5


def shipped_passages() -> np.ndarray:
    """[N, 32] tokens of passages that neither the shipped model nor its predictor was trained on."""
    length = json.loads((SHIPPED / "heldout/trace.json").read_text())["settings"]["excerpt"]
    return np.load(SHIPPED / "heldout/00000.tokens.npy").reshape(-1, length)


scores = nnx.jit(Decoder.__call__)  # compiled once for all formats


def passages_of(options: Options, tokenizer: Tokenizer | None) -> np.ndarray:
    """[N, S] tokens of passages that the model was not trained on: the first of each document.

    Raises:
        ValueError: if there are too few documents of that length, or the model has no tokenizer.
    """
    if not options.text:
        return shipped_passages()[: options.passages]
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, which text is read by")
    files = []
    for file in options.text:
        tokens = (tokenizer.encode(document.text).ids for document in read_documents(file))
        files.append(row[: options.length] for row in tokens if len(row) >= options.length)
    turns = itertools.chain.from_iterable(zip(*files, strict=False))
    rows = list(itertools.islice(turns, options.passages))
    if len(rows) < options.passages:
        raise ValueError(
            f"expected {options.passages} documents of {options.length} tokens, got {len(rows)}: "
            "name more text, or ask for fewer passages"
        )
    return np.array(rows, np.int32)


def scored(model: Model, passages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [B, S, V] of each next token, and chosen experts [L, B * S, K]."""
    logits, routings = scores(model.whole(), jnp.asarray(passages))
    experts = np.stack([np.sort(routing.experts, -1) for routing in routings])
    return np.asarray(jax.nn.log_softmax(logits), np.float64), experts


def qualities(passages: np.ndarray, models: dict[str, Model]) -> dict[str, dict[str, float]]:
    """What the scores of each model are, beside those of the plain one."""
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for some in np.array_split(passages, max(1, passages.size // SCORED)):  # alike but for one passage
        before = scored(models[PLAIN], some)
        for name, model in models.items():
            parts[name].append(quality(some, before, before if name == PLAIN else scored(model, some)))
    sizes = [part["tokens"] for part in parts[PLAIN]]
    found = {}
    for name, rows in parts.items():
        means = {key: float(np.average([row[key] for row in rows], weights=sizes)) for key in rows[0]}
        del means["tokens"]
        found[name] = means | {"loss_to_plain": means["loss"] / means.pop("plain_loss")}
    return found


def quality(
    passages: np.ndarray, plain: tuple[np.ndarray, np.ndarray], scores: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """Means of what scores are beside the plain ones, and of how many tokens."""
    (before, chosen_before), (after, chosen) = plain, scores
    following = passages[:, 1:, None]
    losses = [-np.take_along_axis(found[:, :-1], following, -1).mean() for found in (before, after)]
    same = [np.isin(a, b).mean() for a, b in zip(rows(chosen_before), rows(chosen), strict=True)]
    return {
        "tokens": passages.size,
        "plain_loss": losses[0],
        "loss": losses[1],
        "kl": float((np.exp(before) * (before - after)).sum(-1).mean()),
        "top1_agreement": float((before.argmax(-1) == after.argmax(-1)).mean()),
        "routing_agreement": float(np.mean(same)),
    }


def rows(chosen: np.ndarray) -> np.ndarray:
    return chosen.reshape(-1, chosen.shape[-1])


def host_times(options: Options) -> tuple[dict[str, Any], dict[str, int]]:
    """Milliseconds an expert by tokens and format, all formats in turns; and bytes of an expert."""
    rng = np.random.default_rng(0)
    shapes = [(options.hidden, options.width)] * 2 + [(options.width, options.hidden)]
    matrices = [(rng.standard_normal(shape) / 40).astype(jnp.bfloat16) for shape in shapes]
    dtype, held, computers = matrices[0].dtype, {}, {}
    for name in (PLAIN, *options.formats):
        form = format_named(name)
        packed = form.pack(*matrices)
        held[name] = [
            InMemory.of(type(packed)(*(jnp.asarray(np.array(array)) for array in packed)), form)
            for _ in range(options.experts)
        ]
        computers[name] = CpuExperts(cores(), kernel_of(form, dtype, options.width, options.hidden), form)
    result = {}
    for tokens in options.tokens:
        inputs = rng.standard_normal((tokens, options.width)).astype(dtype)
        all_experts = Assignments(np.tile(np.arange(options.experts, dtype=np.int32), (tokens, 1)))
        outputs = np.zeros((all_experts.total + 1, options.width), dtype)

        def call(name: str, x: np.ndarray, to: np.ndarray, assignments: Assignments) -> None:
            experts = held[name]
            computers[name].compute(
                to,
                x,
                assignments,
                range(options.experts),
                lambda some: [experts[expert] for expert in some],
                WorkStats(),
            )

        calls: dict[str, Callable[[], None]] = {
            name: functools.partial(call, name, inputs, outputs, all_experts) for name in held
        }
        samples = harness.measure(calls, options.rounds)
        seconds = {name: found.parts["seconds"] for name, found in samples.items()}
        result[str(tokens)] = {
            name: {
                "ms": harness.spread(1e3 * s / options.experts for s in seconds[name]),
                "to_plain": harness.ratio(seconds[name], seconds[PLAIN]),
            }
            for name in held
        }
    for computer in computers.values():
        computer.close()
    return result, {name: experts[0].layout.nbytes for name, experts in held.items()}


def step_times(options: Options, models: dict[str, Model], passages: np.ndarray) -> dict[str, Any]:
    """Decode steps over the paced link, all formats in turns."""
    prompts = passages[: options.batch, :16].tolist()
    quarter = models[PLAIN].bank.total_bytes // 4  # the same bytes for each format
    config = OffloadConfig(
        policy="lru",
        device_budget=quarter,
        emulated_link_bandwidth=options.link,
        max_num_seqs=options.batch,
    )
    engines = {name: Engine(model, config) for name, model in models.items()}
    calls = {
        name: lambda engine=engine: harness.run_engine(engine, prompts, options.new_tokens)[0]
        for name, engine in engines.items()
    }
    samples = harness.measure(calls, options.rounds)
    for engine in engines.values():
        engine.close()
    median = {name: harness.spread(found.parts["step"])["median"] for name, found in samples.items()}
    return {
        name: {
            "ms": harness.spread(1e3 * s for s in found.parts["step"]),
            "to_plain": median[name] / median[PLAIN],
        }
        for name, found in samples.items()
    }


def main(options: Options) -> dict[str, Any]:
    if options.model != SHIPPED_MODEL and not options.text:
        raise SystemExit("error: --model needs --text: the passages without are tokens of the shipped model")
    if options.quick:
        options = replace(
            options, width=64, hidden=96, experts=2, tokens=(1,), batch=1, new_tokens=2, rounds=1
        )
        options = replace(options, formats=options.formats[:1], passages=4)
    record = harness.machine()
    plain = load(options.model, dtype=PLAIN)
    forms: dict[str, ExpertFormat] = {name: format_named(name) for name in options.formats}
    models = {PLAIN: plain} | {name: plain.with_format(form) for name, form in forms.items()}
    models |= {
        name + DENSE: models[name].with_dense_format("int8") for name in options.dense if name in forms
    }
    passages = passages_of(options, plain.tokenizer)
    found = qualities(passages, models)
    times, sizes = host_times(options)
    steps = step_times(options, models, passages)
    result = {
        "benchmark": "quantised",
        "quick": options.quick,
        "machine": record,
        "model": options.model.name,
        "text": [file.stem for file in options.text],
        "passages": list(passages.shape),
        "quality": found,
        "expert_bytes": sizes,
        "dense_bytes": {name: model.dense_bytes for name, model in models.items()},
        "host": times,
        "link": options.link,
        "step": steps,
    }
    table(options, result)
    return harness.finish(options, result)


def table(options: Options, result: dict[str, Any]) -> None:
    lines = []
    for name, found in result["quality"].items():
        size, dense = result["expert_bytes"], result["dense_bytes"]
        experts = name.removesuffix(DENSE)
        lines.append(
            (
                name,
                f"{size[experts] / size[PLAIN]:.2f}",
                f"{dense[name] / dense[PLAIN]:.2f}",
                f"{found['loss']:.4f}",
                f"{found['loss_to_plain'] - 1:+.2%}",
                f"{found['kl']:.5f}",
                f"{found['top1_agreement']:.1%}",
                f"{found['routing_agreement']:.1%}",
                *(
                    f"{result['host'][str(tokens)][experts]['ms']['median']:.2f} "
                    f"({result['host'][str(tokens)][experts]['to_plain']['median']:.2f})"
                    if name == experts
                    else ""
                    for tokens in options.tokens
                ),
                f"{result['step'][name]['ms']['median']:.1f} ({result['step'][name]['to_plain']:.2f})",
            )
        )
    headings = (
        "experts in",
        "bytes",
        "dense bytes",
        "held-out loss",
        "to bfloat16",
        "KL, nats",
        "same likeliest token",
        "same experts",
        *(f"{tokens} tokens, ms an expert (to bfloat16)" for tokens in options.tokens),
        f"a step over {options.link}/s, ms",
    )
    harness.print_table("Experts in fewer bits", headings, lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
