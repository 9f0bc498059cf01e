"""Turns a training run into a model folder with its card (`python -m tools.shipped_model.release`)."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("tools.shipped_model.release")

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from flax import nnx
from orbax.checkpoint import v1 as ocp

from layerscope_jax.checkpoints.model import load
from layerscope_jax.checkpoints.saving import save
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.support import exits
from layerscope_jax.support.files import read_json, replace_files
from tools.shipped_model.baselines import Bigram
from tools.shipped_model.data import PackedTokens
from tools.shipped_model.geometries import GEOMETRIES
from tools.shipped_model.train import TrainConfig, held_out, make_steps, optimizer

WINDOWS = 128  # held-out windows a domain that the card's losses are measured on


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is released.

    Attributes:
        run: folder of a training run.
        tokens: the tokens it was trained on.
        corpus: the text they were made from, for its licences.
        out: folder to write: config.json, model.safetensors in bfloat16, tokenizer files, README.md.
        step: of a checkpoint that the run kept; None for the latest.
    """

    run: Path
    tokens: Path
    corpus: Path
    out: Path
    step: int | None = None


def run_config(run: Path, tokens: Path) -> TrainConfig:
    """The settings of a training run, as its folder keeps them.

    Raises:
        ValueError: if it keeps none.
    """
    settings = read_json(run / "run.json")
    known = {field.name for field in fields(TrainConfig)}
    return TrainConfig(tokens=tokens, out=run, **{key: settings[key] for key in settings if key in known})


def trained(config: TrainConfig, step: int | None = None) -> tuple[Decoder, int]:
    """The decoder of a checkpoint of a run, by default of the last one, and its step.

    Raises:
        ValueError: if there is none.
    """
    vocab_size = len(read_json(config.tokens / "tokenizer.json")["model"]["vocab"])
    graphdef, variables = nnx.split(Decoder(config.model_config(vocab_size), rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(variables)
    with ocp.training.Checkpointer(config.out.absolute() / "checkpoints") as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" of step {step}"
            there = ", ".join(map(str, steps)) or "none"
            raise ValueError(
                f"expected Orbax checkpoints{wanted} in {config.out / 'checkpoints'}, found {there}"
            )
        step = max(steps) if step is None else step
        state = optimizer(config).init(params)
        params = checkpointer.load(step, {"params": params, "state": state})["params"]
    return nnx.merge(graphdef, params), step


def measure(config: TrainConfig, folder: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Held-out losses of the released weights, of a unigram and of a bigram model, and the experts' loads.

    Returns:
        One row a domain, and token counts [domains, L, E].
    """
    train = PackedTokens.open(config.tokens / "train", without=config.without)
    heldout = PackedTokens.open(config.tokens / "heldout")
    model = load(folder, dtype="float32")
    graphdef, variables = nnx.split(model.whole())
    _, evaluate = make_steps(config, graphdef, optimizer(config))
    losses, loads = held_out(
        evaluate, nnx.to_pure_dict(variables), heldout, config.rows, config.length, WINDOWS
    )
    bigram = Bigram(train.domains.values(), model.config.vocab_size)
    rows = []
    for domain, loss in losses.items():
        windows = list(heldout.windows(domain, config.length + 1, WINDOWS))
        baseline = np.mean([bigram.loss(window) for window in windows], axis=0)
        rows.append(
            {
                "domain": domain,
                "trained": domain in train.domains,
                "tokens": len(windows) * config.length,
                "unigram": float(baseline[0]),
                "bigram": float(baseline[1]),
                "model": loss,
            }
        )
    return rows, np.stack(list(loads.values()))


def card(
    config: TrainConfig, steps: int, rows: list[dict[str, Any]], loads: np.ndarray, sources: dict[str, Any]
) -> str:
    """The model card."""
    shape = config.model_config(vocab_size=1)
    names = [row["domain"] for row in rows]
    trained = [row["trained"] for row in rows]
    shares = (
        loads[trained].sum(0) / loads[trained].sum((0, 2))[:, None] * shape.num_experts
    )  # [L, E], 1 is even
    by_domain = loads / loads.sum(2, keepdims=True)  # [domains, L, E]
    options = ""
    if config.geometry is not None:
        without = " ".join(config.without)
        options = f" --geometry {config.geometry} --rows {config.rows} --length {config.length}"
        options += f" --learning-rate {config.learning_rate}" + (f" --without {without}" if without else "")
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: layerscope-jax",
        "pipeline_tag: text-generation",
        "---",
        "# A small mixture-of-experts language model",
        "",
        f"{shape.num_moe_layers} layers, {shape.num_experts} experts a layer, {shape.experts_per_token} a "
        f"token, as {GEOMETRIES[config.geometry].name if config.geometry else 'OLMoE'} routes; "
        f"hidden size {shape.hidden_size}, expert size {shape.moe_intermediate_size}. It is small enough "
        "to ship and to run anywhere, and real: its routing was learned from real text, which is what it is "
        "for. Do not expect sense from it.",
        "",
        f"Trained for {steps:,} steps of {config.rows} x {config.length} tokens "
        f"({steps * config.rows * config.length / 1e6:.1f} million) with AdamW, seed {config.seed}:",
        "",
        "```",
        "pip install '.[train]'",
        "python -m tools.shipped_model.corpus --out build/corpus",
        "python -m tools.shipped_model.tokenizer --corpus build/corpus --out build/tokens",
        "python -m tools.shipped_model.train --tokens build/tokens --out build/model"
        f"{options} --steps {steps}",
        "python -m tools.shipped_model.release --run build/model --tokens build/tokens "
        "--corpus build/corpus --out layerscope_jax/shipped",
        "```",
        "",
        "## Held-out loss",
        "",
        "Nats per token on documents kept out of training, of these bfloat16 weights computed in float32; "
        "beside it a unigram and a Kneser-Ney bigram model of the same training tokens. Printed by the last "
        "command.",
        "",
        "| domain | in training | tokens | unigram | bigram | model |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['domain']} | {'yes' if row['trained'] else 'no'} | {row['tokens']:,} | {row['unigram']:.2f} "
        f"| {row['bigram']:.2f} | {row['model']:.2f} |"
        for row in rows
    ]
    lines += [
        "",
        "## Expert load",
        "",
        "Share of a layer's tokens that an expert gets, 1 being an even share, on the held-out documents of "
        "the training domains together; and how far the domain that differs most from the others' mean lies "
        "from it (total variation, 0 to 1).",
        "",
        "| layer | least | median | most | under 0.05 | most particular domain |",
        "|---|---|---|---|---|---|",
    ]
    for layer, share in enumerate(shares):
        apart = []
        for index in range(len(names)):
            others = [other for other in range(len(names)) if other != index and trained[other]]
            apart.append(0.5 * np.abs(by_domain[index, layer] - by_domain[others, layer].mean(0)).sum())
        apart = [distance if seen else 0.0 for distance, seen in zip(apart, trained, strict=True)]
        lines.append(
            f"| {layer} | {share.min():.2f} | {np.median(share):.2f} | {share.max():.2f} "
            f"| {(share < 0.05).sum()} | {names[int(np.argmax(apart))]} {max(apart):.2f} |"
        )
    lines += [
        "",
        "## Text and licences",
        "",
        "| domain | package | licence | MB | documents |",
        "|---|---|---|---|---|",
    ]
    for domain in names:
        if domain not in sources or not trained[names.index(domain)]:
            continue
        lines += [
            f"| {domain} | {source['name']} {source['version']} | {source['licence']} "
            f"| {source['bytes'] / 1e6:.1f} | {source['documents']} |"
            for source in sources[domain]
        ]
    lines += ["", "`prompts.jsonl` holds a few short passages from held-out documents of these packages."]
    unseen = ", ".join(name for name, seen in zip(names, trained, strict=True) if not seen)
    lines += ["", f"Measured on, but neither trained on nor shipped: {unseen}." if unseen else ""]
    return "\n".join(lines).rstrip() + "\n"


def release(options: Release) -> str:
    """Writes the folder; returns the card."""
    config = run_config(options.run, options.tokens)
    decoder, steps = trained(config, options.step)
    save(decoder, options.out, dtype="bfloat16")
    copied = ("tokenizer.json", "tokenizer_config.json")
    rows, loads = measure(config, options.out)
    text = card(config, steps, rows, loads, read_json(options.corpus / "sources.json"))
    contents = {"README.md": text.encode()}
    contents |= {name: (options.tokens / name).read_bytes() for name in copied}
    replace_files(options.out, contents)
    return text


def main() -> None:
    """Runs the command line; see `layerscope_jax.support.exits`."""
    exits.end(lambda args: print(release(tyro.cli(Release, description=__doc__, args=args))))
