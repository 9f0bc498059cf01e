"""Trains LLaPor on a recorded trace: `python -m predictor.train --traces DIR --out DIR`.

A killed run goes on from its last Orbax checkpoint when started again. `--out` then holds the predictor as
`predictor.load` reads it, beside the checkpoints and a log.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("predictor.train")

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layerscope_jax.prediction.traces import Passage, Trace
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.files import read_json, write_file
from layerscope_jax.support.jax_settings import random_key, with_promotion
from layerscope_jax.support.locks import locked_folder
from predictor.calibration import ROWS, calibrated
from predictor.carry import carried
from predictor.dataset import Rows, expert_weights, for_training, for_validation, load_rows
from predictor.llapor import LLaPor
from predictor.network import GroupConfig
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.settings import FORMAT
from predictor.step import Batch, first_params, input_scale, make_steps, optimizer, priors, stacks

VALIDATION_ROWS, VALIDATION_SHARE, VALIDATION_LEAST = 8192, 16, 512
"""Maximum number of validation rows, and their maximum share of the training rows (one in 16), so that short
runs do not spend their time on validation; but no fewer than this, so that a passage fits."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. `predictor/README.md` says where the defaults differ from the paper.

    Attributes:
        traces: folder made by `layerscope trace`.
        out: folder for the predictor, its checkpoints and `log.jsonl`.
        look_ahead: W, how many layers ahead are predicted.
        start_from: folder of another predictor, of this or another model, to begin with (`predictor.carry`).
        leave_out: domains of the trace that are not trained on, so that they are new to the predictor.
        tokens: maximum number of training rows.
        epochs: passes over the rows.
        batch: rows of a step.
        input, middle, output: networks of the layers near the input, in the middle and near the output.
        balanced: whether classes are weighted inversely to how often an expert is chosen.
        focal: weight of the loss's focal term.
        clip: maximum norm of a layer's gradient.
        patience: epochs without a better validation recall before training stops.
        save_every: steps between checkpoints.
        seed: seed of weights, order and noise.
    """

    traces: Path
    out: Path
    look_ahead: int = 8
    start_from: Path | None = None
    leave_out: tuple[str, ...] = ()
    tokens: int = 65_536
    epochs: int = 2
    batch: int = 512
    input: GroupConfig = field(default_factory=GroupConfig)
    middle: GroupConfig = field(default_factory=lambda: GroupConfig(gated=True, noise=0.03))
    output: GroupConfig = field(default_factory=GroupConfig)
    balanced: bool = False
    focal: float = 0.0
    clip: float = 1.0
    patience: int = 5
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least(self, look_ahead=1, tokens=1, epochs=1, batch=1, patience=1, save_every=1)
        problems.raise_any()

    @property
    def groups(self) -> dict[str, GroupConfig]:
        return {"input": self.input, "middle": self.middle, "output": self.output}


@dataclass
class Progressed:
    """Progress of a run, stored in its checkpoints beside the arrays."""

    step: int = 0
    epoch: int = 0
    best: float = -1.0
    stale: int = 0
    done: bool = False


def train(config: TrainConfig, *, progress: bool = True) -> LLaPor:
    """Trains a predictor, resuming from a checkpoint in `config.out`; writes it there and returns it.

    Raises:
        ValueError: if the traces are not suitable, or `config.out` holds another run or is in use by one.
    """
    trace = Trace.open(config.traces)
    model = trace.header.model
    if config.look_ahead > model.num_layers:
        raise ValueError(
            f"look-ahead must be at most the model's {model.num_layers} layers, got {config.look_ahead}"
        )
    known = {passage.domain for chunk in trace.chunks for passage in chunk.passages}
    if not known.issuperset(config.leave_out):
        unknown = ", ".join(sorted({*config.leave_out} - known))
        raise ValueError(
            f"leave_out must name domains of {config.traces} ({', '.join(sorted(known))}), got {unknown}"
        )
    with locked_folder(config.out), with_promotion():
        check_same_run(config, trace)
        return _train(config, trace, progress)


def _orbax() -> Any:
    """Imports Orbax's checkpoints, which only training needs.

    Raises:
        ValueError: if Orbax is not installed.
    """
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        raise ValueError(
            "training keeps checkpoints by Orbax, which is not installed: pip install 'layerscope-jax[train]'"
        ) from error
    return v1


def _train(config: TrainConfig, trace: Trace, progress: bool) -> LLaPor:
    ocp = _orbax()
    model = trace.header.model
    basis, routers = Basis.load(trace.folder), Routers.load(trace.folder)

    def rows_of(split: Callable[[Passage], bool], most: int, what: str) -> Rows:
        keep = lambda passage: split(passage) and passage.domain not in config.leave_out  # noqa: E731
        return load_rows(trace, keep, most=most, what=what)

    rows = rows_of(for_training, config.tokens, "passages to train on")
    most = max(config.batch, VALIDATION_LEAST, min(VALIDATION_ROWS, config.tokens // VALIDATION_SHARE))
    validation = rows_of(for_validation, most, "passages to validate with")
    if len(rows) < config.batch:
        raise ValueError(f"expected {config.batch} training rows or more (one batch), got {len(rows)}")

    stacked = stacks(model, trace.header.hidden, config.look_ahead, config.groups)
    weights = expert_weights(rows.experts, model.num_experts)
    weights = weights if config.balanced else np.ones_like(weights)
    prior = jax.tree.map(jnp.asarray, priors(routers, basis, stacked, config.look_ahead))
    steps_an_epoch = len(rows) // config.batch
    update = optimizer(stacked, config.epochs * steps_an_epoch, config.clip)
    train_step, evaluate = make_steps(
        stacked,
        prior,
        jnp.asarray(input_scale(basis)),
        jnp.asarray(weights),
        config.look_ahead,
        config.focal,
        update,
    )
    params = first_params(model, stacked, config.look_ahead, config.seed)
    params = calibrated(params, stacked, prior, batch_of(rows, np.arange(min(ROWS, len(rows)))))
    if config.start_from is not None:
        params = carried(params, stacked, basis, config.look_ahead, LLaPor.load(config.start_from))
    state = update.init(params)
    best = jax.tree.map(jnp.copy, params)
    at = Progressed()

    with (
        ocp.training.Checkpointer(
            config.out.absolute() / "checkpoints",
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
        ) as checkpointer,
        bar(config.epochs * steps_an_epoch, progress) as advance,
        (config.out / "log.jsonl").open("a") as log,
    ):
        if checkpointer.latest is not None:
            kept = {"params": params, "state": state, "best": best, "at": asdict(at)}
            restored = checkpointer.load(checkpointer.latest, kept)
            params, state, best = restored["params"], restored["state"], restored["best"]
            at = Progressed(**{name: np.asarray(value).item() for name, value in restored["at"].items()})
        # Committed to the device, as what was restored is: the steps are compiled once for both.
        params, state = jax.device_put((params, state), jax.devices()[0])
        advance(at.step, "resumed" if at.step else "compiling")

        def save() -> None:
            kept = {"params": params, "state": state, "best": best, "at": asdict(at)}
            checkpointer.save(at.step * 2 + at.done, kept, force=True, overwrite=True)

        began, resumed_at = time.perf_counter(), at.step
        while not at.done:
            order = np.random.default_rng((config.seed, at.epoch)).permutation(len(rows))
            for index in range(at.step - at.epoch * steps_an_epoch, steps_an_epoch):
                interrupts.check()
                picked = np.sort(order[index * config.batch : (index + 1) * config.batch])
                key = jax.random.fold_in(random_key(config.seed), at.step)
                params, state, value = train_step(params, state, batch_of(rows, picked), key)
                at.step += 1
                if at.step % 10 == 0:
                    rate = (at.step - resumed_at) * config.batch / (time.perf_counter() - began)
                    row = {"step": at.step, "loss": float(value), "rows_per_s": rate}
                    print(json.dumps(row), file=log, flush=True)
                    recall = f", recall {at.best:.3f}" if at.best >= 0 else ""
                    advance(at.step, f"loss {row['loss']:.3f}{recall}")
                if at.step % config.save_every == 0:
                    save()
            at.epoch += 1
            recalled = validate(evaluate, params, validation)
            mean = float(np.nanmean(recalled))
            print(
                json.dumps({"epoch": at.epoch, "recall": mean} | by_horizon(recalled)), file=log, flush=True
            )
            if mean > at.best:
                at.best, at.stale, best = mean, 0, jax.tree.map(jnp.copy, params)
            else:
                at.stale += 1
            at.done = at.epoch == config.epochs or at.stale >= config.patience
            advance(at.step, f"recall {at.best:.3f}")
            save()
    trained = LLaPor(model, config.look_ahead, basis, stacked, best)
    trained.save(config.out)
    return trained


def batch_of(rows: Rows, picked: np.ndarray) -> Batch:
    """Returns a batch of the picked rows, on the device."""
    following = rows.following[picked]
    batch: Any = Batch(
        hidden=rows.hidden[picked],
        experts=rows.experts[picked].astype(np.int32),
        weights=rows.weights[picked],
        following=rows.experts[following].astype(np.int32),
        has_next=following >= 0,
    )
    return jax.device_put(batch)  # which compiles nothing


def validate(evaluate: Any, params: Any, rows: Rows, size: int = 1024) -> np.ndarray:
    """Returns exact top-k recall [L, W] over `rows`; NaN without known targets."""
    recalled, counted = np.zeros(()), np.zeros(())
    for start in range(0, len(rows), size):
        recall, known = evaluate(params, batch_of(rows, np.arange(start, min(start + size, len(rows)))))
        recalled, counted = recalled + np.asarray(recall), counted + np.asarray(known)
    with np.errstate(invalid="ignore"):
        return recalled / counted


def by_horizon(recall: np.ndarray) -> dict[str, list[float]]:
    """Returns recall [L, W] as means over layers: for targets within a step, and for those in the next.

    >>> by_horizon(np.array([[0.9, 0.5], [0.3, 0.2]]))
    {'this_step': [0.9], 'next_step': [0.3, 0.35]}
    """
    layers, look_ahead = recall.shape
    within = np.arange(layers)[:, None] + 1 + np.arange(look_ahead)[None] < layers

    def means(which: np.ndarray) -> list[float]:
        columns = (recall[which[:, step], step] for step in range(look_ahead))
        return [round(float(np.nanmean(column)), 4) for column in columns if column.size]

    return {"this_step": means(within), "next_step": means(~within)}


def check_same_run(config: TrainConfig, trace: Trace) -> None:
    """Refuses to continue in a folder of a run with other settings.

    Raises:
        ValueError: naming every setting that differs.
    """
    settings = asdict(config) | {
        "model": trace.header.model.to_json(),
        "trace": trace.header.settings,
        "rows": trace.rows,
        "format": FORMAT,  # checkpoints of other networks do not fit
    }
    for name in ("traces", "out", "save_every"):
        del settings[name]
    for name in ("leave_out", "start_from"):  # earlier runs lack these settings
        if not settings[name]:
            del settings[name]
    settings = json.loads(json.dumps(settings, default=str))
    file = config.out / "run.json"
    if not file.exists():
        write_file(file, json.dumps(settings, indent=1))
        return
    earlier = read_json(file)
    differing = [
        f"{key}: {earlier.get(key)} then, {settings.get(key)} now"
        for key in {**earlier, **settings}
        if earlier.get(key) != settings.get(key)
    ]
    if differing:
        raise ValueError(
            f"{config.out} holds another run ({'; '.join(differing)}); use its settings or another --out"
        )


@contextmanager
def bar(steps: int, shown: bool) -> Iterator[Callable[[int, str], None]]:
    """Shows a progress bar on stderr; yields a function that sets its position and its text."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("", total=steps)
        yield lambda done, text: progress.update(task, completed=done, description=text)


def main() -> None:
    """Runs the command line; see `layerscope_jax.support.exits`."""

    def run(args: list[str]) -> None:
        config = tyro.cli(TrainConfig, description=__doc__, args=args)
        interrupts.promise(f"interrupted; the same command goes on with {config.out}")
        train(config)

    exits.end(run)
