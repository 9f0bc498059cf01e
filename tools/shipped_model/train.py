"""Trains a small mixture-of-experts model: `python -m tools.shipped_model.train --tokens DIR --out DIR`.

The defaults made the shipped model; `--geometry` makes one of a published model's family, layers and experts.
A killed run goes on from its last Orbax checkpoint when started again.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("tools.shipped_model.train")

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from orbax.checkpoint import v1 as ocp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.models.router import Routing
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.files import read_json, write_file
from layerscope_jax.support.jax_settings import random_key
from layerscope_jax.support.locks import locked_folder
from tools.shipped_model.all_experts import run_whole
from tools.shipped_model.data import PackedTokens
from tools.shipped_model.geometries import GEOMETRIES, GeometryName
from tools.shipped_model.starts import started

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        tokens: folder made by `tools.shipped_model.tokenizer`.
        out: folder for checkpoints and `log.jsonl`.
        geometry: a name of `tools.shipped_model.geometries`; None for a model of the OLMoE family.
        layers, experts, top_k, hidden, moe_intermediate_size, heads: shape of that model of the OLMoE family.
        without: domains that are not trained on.
        steps: optimizer steps; the learning rate falls linearly to a tenth over the last `decay` of them.
        rows, length: sequences in a batch and tokens in each.
        learning_rate: peak of AdamW's.
        decay: share of the steps with a falling learning rate.
        balance: weight of the load-balancing loss, for routers without a bias for choosing.
        bias_rate: what that bias changes by in a step, where there is one (arXiv 2408.15664).
        save_every, evaluate_every: in steps.
        keep: steps whose checkpoints are kept, beside the latest two.
        seed: of weights and batches.
    """

    tokens: Path
    out: Path
    geometry: GeometryName | None = None
    without: tuple[str, ...] = ()
    layers: int = 16
    experts: int = 64
    top_k: int = 8
    hidden: int = 96
    moe_intermediate_size: int = 32
    heads: int = 2
    steps: int = 1200
    rows: int = 16
    length: int = 256
    learning_rate: float = 3e-3
    decay: float = 0.25
    balance: float = 0.01
    bias_rate: float = 1e-3
    save_every: int = 100
    evaluate_every: int = 200
    keep: tuple[int, ...] = ()
    seed: int = 0

    def model_config(self, vocab_size: int) -> ModelConfig:
        if self.geometry is not None:
            return GEOMETRIES[self.geometry].model_config(vocab_size, self.length)
        return ModelConfig(
            family="olmoe",
            vocab_size=vocab_size,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            num_experts=self.experts,
            experts_per_token=self.top_k,
            moe_intermediate_size=self.moe_intermediate_size,
            normalize_top_k=True,
            qk_norm="all",
            max_position_embeddings=self.length,
            stop_token_ids=(0,),
        )


def balance_loss(routings: list[Routing], num_experts: int) -> jax.Array:
    """Mean over layers of `E * sum_e f_e p_e`: f the share of choices, p the mean probability.

    One when every expert gets the same share (Switch Transformer, arXiv 2101.03961, eq. 4).
    """
    losses = []
    for routing in routings:
        chosen = jnp.bincount(routing.experts.reshape(-1), length=num_experts) / routing.experts.size
        mean = jax.nn.softmax(routing.logits, axis=-1).mean(0)
        losses.append(num_experts * jnp.sum(jax.lax.stop_gradient(chosen) * mean))
    return jnp.stack(losses).mean()


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping; warm-up, plateau, then a linear fall (so that a run can be lengthened)."""
    falling = max(1, int(config.steps * config.decay))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, 100),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.1 * config.learning_rate, falling),
        ],
        [100, max(100, config.steps - falling)],
    )
    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def make_steps(
    config: TrainConfig, graphdef: nnx.GraphDef, update: optax.GradientTransformation
) -> tuple[Callable, Callable]:
    """The jitted `train(params, state, batch)` and `evaluate(params, batch)`; batches are [B, S + 1]."""
    run = Decoder.__call__ if config.geometry is None else run_whole

    def losses(params: Params, batch: jax.Array):
        logits, routings = run(nnx.merge(graphdef, params), batch[:, :-1])
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return cross_entropy, routings

    def objective(params: Params, batch: jax.Array):
        cross_entropy, routings = losses(params, batch)
        balance = balance_loss(routings, routings[0].logits.shape[-1])
        weight = 0.0 if has_selection_bias(params) else config.balance
        return cross_entropy.mean() + weight * balance, (cross_entropy.mean(), balance, loads(routings))

    def train(params: Params, state: optax.OptState, batch: jax.Array):
        (_, (loss, balance, load)), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
        updates, state = update.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return move_biases(params, load, config.bias_rate), state, (loss, balance)

    def evaluate(params: Params, batch: jax.Array):
        cross_entropy, routings = losses(params, batch)
        return cross_entropy.sum(), loads(routings)

    return jax.jit(train, donate_argnums=(0, 1)), jax.jit(evaluate)


def loads(routings: list[Routing]) -> jax.Array:
    """Choices of each expert, [L, E]."""
    return jnp.stack([jnp.bincount(r.experts.reshape(-1), length=r.logits.shape[-1]) for r in routings])


def has_selection_bias(params: Params) -> bool:
    return any("selection_bias" in layer.get("router", {}) for layer in params["layers"].values())


def move_biases(params: Params, load: jax.Array, rate: float) -> Params:
    """Parameters with the routers' biases for choosing moved towards an even load, where there are any.

    They have no gradient: a bias rises by `rate` where an expert got fewer tokens than the layer's mean, and
    falls where it got more (arXiv 2408.15664).

    Args:
        params: of a decoder, a pure dict.
        load: [L, E] choices of each expert, by MoE layer.
        rate: of a step.
    """
    layers, number = dict(params["layers"]), 0
    for index, layer in sorted(layers.items()):
        router = layer.get("router", {})
        if "selection_bias" in router:
            moved = router["selection_bias"] + rate * jnp.sign(load[number].mean() - load[number])
            layers[index] = {**layer, "router": {**router, "selection_bias": moved}}
        number += "router" in layer
    return {**params, "layers": layers}


def held_out(
    evaluate: Callable, params: Params, tokens: PackedTokens, rows: int, length: int, windows: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Loss per token (nats) and the experts' token counts [L, E], each by domain."""
    losses, loads = {}, {}
    for domain in tokens.domains:
        found = list(tokens.windows(domain, length + 1, windows))
        found = found[: len(found) // rows * rows] or found
        total, counts = 0.0, np.zeros(0)
        for start in range(0, len(found), rows):
            loss, count = evaluate(params, jnp.asarray(np.stack(found[start : start + rows])))
            total, counts = total + float(loss), np.asarray(count) + (counts if counts.size else 0)
        losses[domain] = total / (len(found) * length)
        loads[domain] = counts
    return losses, loads


def train(config: TrainConfig) -> Params:
    """Trains, resuming where `config.out` stands; returns the parameters as a pure dict.

    Raises:
        ValueError: if the tokens are missing, the checkpoints were made with another shape or seed, or
            another run is at them.
    """
    train_tokens = PackedTokens.open(config.tokens / "train", without=config.without)
    heldout_tokens = PackedTokens.open(config.tokens / "heldout")
    vocab_size = len(read_json(config.tokens / "tokenizer.json")["model"]["vocab"])
    with locked_folder(config.out):
        check_same_run(config)
        return _train(config, train_tokens, heldout_tokens, vocab_size)


def _train(
    config: TrainConfig, train_tokens: PackedTokens, heldout_tokens: PackedTokens, vocab_size: int
) -> Params:
    model = Decoder(config.model_config(vocab_size), rngs=nnx.Rngs(random_key(config.seed)))
    graphdef, variables = nnx.split(model)
    params = nnx.to_pure_dict(variables)
    update = optimizer(config)
    state = update.init(params)
    train_step, evaluate = make_steps(config, graphdef, update)

    log_file = config.out / "log.jsonl"
    policies = ocp.training.preservation_policies
    with ocp.training.Checkpointer(
        config.out.absolute() / "checkpoints",
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(config.save_every),
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(2), policies.CustomSteps(config.keep)]
        ),
    ) as checkpointer:
        start = 0
        if checkpointer.latest is not None:
            start = checkpointer.latest.step
            restored = checkpointer.load(checkpointer.latest, {"params": params, "state": state})
            params, state = restored["params"], restored["state"]
        elif config.geometry is not None:
            layers = model.config.num_layers
            params = started(params, train_tokens.domains.values(), layers, config.seed)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress, log_file.open("a") as log:
            bar = progress.add_task("training", total=config.steps, completed=start)
            began = time.perf_counter()
            for step in range(start, config.steps):
                interrupts.check()
                batch = train_tokens.batch(config.rows, config.length + 1, seed=config.seed, step=step)
                params, state, (loss, balance) = train_step(params, state, jnp.asarray(batch))
                progress.update(bar, advance=1)
                done = step + 1
                if done % 10 == 0:
                    rate = (done - start) * config.rows * config.length / (time.perf_counter() - began)
                    row = {"step": done, "loss": float(loss), "balance": float(balance), "tokens_per_s": rate}
                    progress.update(bar, description=f"loss {row['loss']:.3f}")
                    print(json.dumps(row), file=log, flush=True)
                if done % config.evaluate_every == 0 or done == config.steps:
                    measured, _ = held_out(evaluate, params, heldout_tokens, config.rows, config.length, 32)
                    print(json.dumps({"step": done, "heldout": measured}), file=log, flush=True)
                forced = done == config.steps or done in config.keep
                checkpointer.save(done, {"params": params, "state": state}, force=forced)
    return params


def check_same_run(config: TrainConfig) -> None:
    """Refuses to go on in a folder that another run began; its length, alone, may change.

    Raises:
        ValueError: with every setting that differs.
    """
    free = ("tokens", "out", "steps", "decay", "save_every", "evaluate_every", "keep")
    later = {"geometry": None, "without": (), "bias_rate": 1e-3}  # settings that earlier runs do not have
    settings = {
        key: value
        for key, value in asdict(config).items()
        if key not in free and not (key in later and value == later[key])
    }
    settings = json.loads(json.dumps(settings))
    file = config.out / "run.json"
    if file.exists():
        earlier = read_json(file, "remove it")
        differing = {key: (earlier.get(key), now) for key, now in settings.items() if earlier.get(key) != now}
        if differing:
            listed = ", ".join(f"{key}: {was} then, {now} now" for key, (was, now) in differing.items())
            raise ValueError(f"{config.out} holds another run ({listed}); use its settings or another --out")
        return
    write_file(file, json.dumps(settings, indent=1))


def main() -> None:
    """Runs the command line; see `layerscope_jax.support.exits`."""

    def run(args: list[str]) -> None:
        config = tyro.cli(TrainConfig, description=__doc__, args=args)
        interrupts.promise(f"interrupted; the same command goes on with {config.out}")
        train(config)

    exits.end(run)
