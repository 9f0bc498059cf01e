"""Tunes a trained predictor on recent tokens when its error is high, and keeps only improvements."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layerscope_jax.support.checks import Problems
from layerscope_jax.support.jax_settings import random_key, with_promotion
from predictor.llapor import LLaPor
from predictor.routers import Routers
from predictor.step import Batch, input_scale, make_steps, priors

CHECK_EVERY = 64  # rows between checks, as in the paper; a block
HELD_BACK = 4  # the newest of this many parts of the window is held back
PAUSE = 4  # blocks between two attempts
LATEST = 2  # newest blocks, on each of which the other predictor must be ahead to take over at once
AHEAD = 0.01  # by how much of the recall over all horizons
MOST_HALVINGS = 3  # halvings of the learning rate, and doublings of the pause


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """When and how a predictor is tuned.

    Attributes:
        window: number of newest rows that are kept.
        threshold: error (one minus the exact recall one layer ahead) over the newest quarter of the window
            above which tuning is tried. Best a little above the error on familiar traffic.
        margin: standard errors by which the recall must rise for a change to be kept.
        steps, batch: optimizer steps of one tuning, and rows of each.
        learning_rate: learning rate of Adam; halved after each failed attempt.
        seed: seed of the choice of rows.
    """

    window: int = 2048
    threshold: float = 0.11
    margin: float = 2.0
    steps: int = 16
    batch: int = 256
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least(self, window=HELD_BACK * 4 * CHECK_EVERY, steps=1, batch=1, margin=0)
        problems.expect(0 <= self.threshold <= 1, "threshold", "in 0..1", self.threshold)
        problems.expect(self.learning_rate > 0, "learning_rate", "more than 0", self.learning_rate)
        problems.raise_any()


@dataclass(frozen=True, kw_only=True)
class Look:
    """Result of one look at the window.

    Attributes:
        rows: total number of rows until then.
        error: error on the newest 64 rows one layer ahead, before anything was learned from them.
        error_ahead: the same over all horizons.
        recent_error: error one layer ahead over the newest quarter of the window, which the threshold is for.
        tried: whether tuning was tried.
        gain: rise of the recall on the held-back rows by tuning, over all horizons.
        noise: standard error of `gain`.
        accepted: whether the tuned parameters were kept.
        returned: whether the predictor went back to its first parameters.
        resumed: whether it went back to the tuned ones.
    """

    rows: int
    error: float
    error_ahead: float
    recent_error: float
    tried: bool = False
    gain: float = 0.0
    noise: float = 0.0
    accepted: bool = False
    returned: bool = False
    resumed: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Tuner:
    """Tunes a predictor on a bounded window of the newest rows.

    Every 64 rows it computes the error over the newest quarter of the window. Above the threshold it takes a
    few optimizer steps on the older three quarters, and keeps the result only if its recall on the newest
    quarter is higher by more than noise. After a failed attempt the pause is doubled and the learning rate
    halved, because only small steps improve a predictor that is nearly right.

    The first predictor and the last one that was kept are compared at every look. The one that is not in use
    takes over once it is ahead by a point on both of the two newest blocks, or by more than noise over the
    newest quarter: so traffic that changes back costs little, and what was learned is there when it changes
    again.

    Args:
        llapor: the predictor that is tuned; it is not changed itself.
        routers: routers of its model.
        config: when and how it is tuned.

    Attributes:
        llapor: the current predictor; save it with `llapor.save`.
        looks: the last thousand looks, oldest first.
    """

    def __init__(self, llapor: LLaPor, routers: Routers, config: TuningConfig | None = None):
        # Moves the parameters, which are NumPy arrays if loaded, to the device that computes.
        network = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), llapor.network)
        self.llapor = self._first = llapor = replace(llapor, network=network)
        self.config = config = config or TuningConfig()
        self.looks: deque[Look] = deque(maxlen=1000)
        self._blocks: deque[Batch] = deque(maxlen=config.window // CHECK_EVERY)
        self._held = config.window // CHECK_EVERY // HELD_BACK
        # For each held-back block, [2, W]: sums of exact recall over rows and layers, and their numbers; of
        # the predictor in use, and of the other one, if any was kept.
        self._scores: deque[np.ndarray] = deque(maxlen=self._held)
        self._other: LLaPor | None = None
        self._other_scores: deque[np.ndarray] = deque(maxlen=self._held)
        self._waiting: Batch | None = None  # rows, fewer than a block
        self._seen = 0
        self._halvings, self._next_try = 0, 0
        self._rng = np.random.default_rng(config.seed)
        self._update = optax.chain(
            optax.clip_by_global_norm(1.0 * llapor.model.num_layers**0.5),
            optax.scale_by_adam(),
            optax.inject_hyperparams(optax.scale_by_learning_rate)(config.learning_rate),
        )
        prior = priors(routers, llapor.basis, llapor.stacks, llapor.look_ahead)
        ones = jnp.ones((llapor.model.num_layers, llapor.model.num_experts), jnp.float32)
        self._train, self._evaluate = make_steps(
            llapor.stacks,
            jax.tree.map(jnp.asarray, prior),
            jnp.asarray(input_scale(llapor.basis)),
            ones,
            llapor.look_ahead,
            0.0,
            self._update,
        )

    def feed(self, rows: Batch) -> bool:
        """Adds new rows (NumPy arrays) to the window; returns whether the predictor has changed."""
        before = self.llapor
        rows = rows if self._waiting is None else joined([self._waiting, rows])
        whole = len(rows.has_next) // CHECK_EVERY * CHECK_EVERY
        self._waiting = part(rows, slice(whole, None))
        for start in range(0, whole, CHECK_EVERY):
            self._blocks.append(part(rows, slice(start, start + CHECK_EVERY)))
            self._seen += CHECK_EVERY
            with with_promotion():
                self._look()
        return self.llapor is not before

    def _look(self) -> None:
        config, newest = self.config, self._blocks[-1]
        self._scores.append(self._score(self.llapor.network, newest))
        if self._other is not None:
            self._other_scores.append(self._score(self._other.network, newest))
        look = Look(
            rows=self._seen,
            error=1 - recall(self._scores[-1][None, :, :1]),
            error_ahead=1 - recall(self._scores[-1][None]),
            recent_error=1 - recall(np.stack(self._scores)[..., :1]),
        )
        if self._other is not None and self._is_behind():
            self.llapor, self._other = self._other, self.llapor
            self._scores, self._other_scores = self._other_scores, self._scores
            returned = self.llapor is self._first
            look = replace(look, returned=returned, resumed=not returned)
        elif look.recent_error <= config.threshold:
            self._halvings, self._next_try = 0, 0
        elif len(self._blocks) >= 2 * self._held and self._seen >= self._next_try:
            look = self._try(look)
        self.looks.append(look)

    def _try(self, look: Look) -> Look:
        blocks = list(self._blocks)
        network = self._tuned(joined(blocks[: -self._held]))
        scores = deque((self._score(network, block) for block in blocks[-self._held :]), self._held)
        gain, noise = compared(self._scores, scores)
        accepted = self._is_better(gain, noise)
        if accepted:
            if self.llapor is self._first:
                self._other, self._other_scores = self._first, self._scores
            self.llapor, self._scores = replace(self.llapor, network=network), scores
        self._halvings = min(max(self._halvings + (-1 if accepted else 1), 0), MOST_HALVINGS)
        self._next_try = self._seen + 2**self._halvings * PAUSE * CHECK_EVERY
        return replace(look, tried=True, gain=gain, noise=noise, accepted=accepted)

    @property
    def _rate(self) -> float:
        return self.config.learning_rate / 2**self._halvings

    def _is_behind(self) -> bool:
        """Whether the other predictor is to take over, by its recall over all horizons."""
        pairs = list(zip(self._scores, self._other_scores, strict=True))
        leads = [recall(other[None]) - recall(current[None]) for current, other in pairs[-LATEST:]]
        if len(leads) == LATEST and min(leads) > AHEAD:
            return True
        return len(pairs) == self._held and self._is_better(*compared(self._scores, self._other_scores))

    def _is_better(self, gain: float, noise: float) -> bool:
        return gain > self.config.margin * noise

    def _tuned(self, rows: Batch) -> Any:
        params = jax.tree.map(jnp.copy, self.llapor.network)
        state = self._update.init(params)
        state[-1].hyperparams["learning_rate"] = jnp.float32(self._rate)
        for _ in range(self.config.steps):
            picked = self._rng.integers(len(rows.has_next), size=self.config.batch)
            key = random_key(int(self._rng.integers(2**31)))
            params, state, _ = self._train(params, state, part(rows, picked), key)
        return params

    def _score(self, network: Any, block: Batch) -> np.ndarray:
        return np.stack([np.asarray(part).sum(0) for part in self._evaluate(network, block)])


def recall(scores: np.ndarray) -> float:
    """Returns the mean recall of blocks [B, 2, W], each with sums of recall and their numbers."""
    return float(scores[:, 0].sum() / scores[:, 1].sum())


def compared(before: Iterable[np.ndarray], after: Iterable[np.ndarray]) -> tuple[float, float]:
    """Returns the rise of recall of blocks, each [2, W] as in `recall`, and its standard error.

    The difference is computed for each block, so that blocks that are hard for both do not add noise.

    >>> block = np.array([[5.0], [10.0]])
    >>> compared([block, block], [block + [[0.0], [0.0]], block + [[5.0], [0.0]]])
    (0.25, 0.25)
    """
    old, new = (np.stack(list(scores)).sum(-1) for scores in (before, after))
    rises = new[:, 0] / new[:, 1] - old[:, 0] / old[:, 1]
    return float(rises.mean()), float(rises.std(ddof=1) / len(rises) ** 0.5)


def part(rows: Batch, which: slice | np.ndarray) -> Batch:
    """Returns some of the rows."""
    return Batch(**{field.name: getattr(rows, field.name)[which] for field in fields(Batch)})


def joined(blocks: Iterable[Batch]) -> Batch:
    """Returns blocks of rows joined into one."""
    blocks = list(blocks)
    return Batch(
        **{field.name: np.concatenate([getattr(b, field.name) for b in blocks]) for field in fields(Batch)}
    )
