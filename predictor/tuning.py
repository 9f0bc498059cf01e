"""Tunes a trained predictor on recent tokens: tried when it errs too often, kept only if it is better."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from predictor.llapor import LLaPor
from predictor.routers import Routers
from predictor.step import Batch, input_scale, make_steps, priors

CHECK_EVERY = 64  # rows, as in the paper
HELD_BACK = 4  # the newest of so many parts of the window


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """When and how a predictor is tuned.

    Attributes:
        window: rows that are kept, the newest.
        threshold: the error (one minus the exact recall one layer ahead) above which a tuning is tried.
        steps, batch: of a tuning.
        learning_rate: of its AdamW.
        seed: of the rows that a step takes.
    """

    window: int = 2048
    threshold: float = 0.1
    steps: int = 16
    batch: int = 256
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"window": HELD_BACK * CHECK_EVERY, "steps": 1, "batch": 1}
        problems = [
            f"{name} must be {low} or more, got {getattr(self, name)}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if not 0 <= self.threshold <= 1:
            problems.append(f"threshold must lie in 0..1, got {self.threshold}")
        if not self.learning_rate > 0:
            problems.append(f"learning_rate must be more than 0, got {self.learning_rate}")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at the window came to.

    Attributes:
        rows: seen in all until then.
        error: of the newest rows, before any tuning of this look.
        tried: whether it was over the threshold, and the window full enough, so that a tuning was tried.
        before, after: recall on the held-back rows, over all horizons, without and with the tuning.
        accepted: whether that was better; else everything is as it was.
    """

    rows: int
    error: float
    tried: bool = False
    before: float = 0.0
    after: float = 0.0
    accepted: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Tuner:
    """A predictor, and a bounded window of the newest rows that it is tuned on.

    Every 64 rows it looks at its error over them. Above the threshold it takes a few steps on the older three
    quarters of the window, and keeps what came of them only if that recalls more on the newest quarter.

    Args:
        llapor: what is tuned; itself it stays as it is.
        routers: of its model.
        config: when and how.

    Attributes:
        llapor: the predictor as it is now; `llapor.save` keeps it.
        looks: every look, oldest first; the last thousand.
    """

    def __init__(self, llapor: LLaPor, routers: Routers, config: TuningConfig | None = None):
        self.llapor = llapor
        self.config = config = config or TuningConfig()
        self.looks: deque[Look] = deque(maxlen=1000)
        self._blocks: deque[Batch] = deque()
        self._seen = self._unchecked = self._kept = 0
        self._rng = np.random.default_rng(config.seed)
        # No decay: what the window does not speak of is to stay.
        self._update = optax.chain(
            optax.clip_by_global_norm(1.0 * llapor.model.num_layers**0.5),
            optax.adamw(config.learning_rate, weight_decay=0.0),
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
        """Takes new rows (NumPy arrays) into the window; returns whether the predictor has changed."""
        before = self.llapor
        for start in range(0, len(rows.has_next), CHECK_EVERY):
            block = part(rows, slice(start, start + CHECK_EVERY))
            self._blocks.append(block)
            size = len(block.has_next)
            self._seen, self._unchecked = self._seen + size, self._unchecked + size
            self._kept += size
            while self._kept - len(self._blocks[0].has_next) >= self.config.window:
                self._kept -= len(self._blocks.popleft().has_next)
            if self._unchecked >= CHECK_EVERY:
                self._unchecked -= CHECK_EVERY
                # Optax mixes dtypes and ranks, whatever strictness the program has asked of JAX.
                with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                    self._look()
        return self.llapor is not before

    def _look(self) -> None:
        config, window = self.config, joined(self._blocks)
        count = len(window.has_next)
        error = 1 - self._recall(
            self.llapor.network, part(window, slice(count - CHECK_EVERY, count)), horizon=0
        )
        look = Look(rows=self._seen, error=error)
        if error > config.threshold and count >= HELD_BACK * CHECK_EVERY:
            held = count // HELD_BACK // CHECK_EVERY * CHECK_EVERY
            older, newest = (part(window, s) for s in (slice(count - held), slice(count - held, count)))
            before = self._recall(self.llapor.network, newest)
            tuned = self._tuned(older)
            after = self._recall(tuned, newest)
            look = replace(look, tried=True, before=before, after=after, accepted=after > before)
            if look.accepted:
                self.llapor = replace(self.llapor, network=tuned)
        self.looks.append(look)

    def _tuned(self, rows: Batch) -> Any:
        params = jax.tree.map(jnp.copy, self.llapor.network)
        state = self._update.init(params)
        for _ in range(self.config.steps):
            picked = self._rng.integers(len(rows.has_next), size=self.config.batch)
            key = jax.random.key(int(self._rng.integers(2**31)))
            params, state, _ = self._train(params, state, part(rows, picked), key)
        return params

    def _recall(self, network: Any, rows: Batch, horizon: int | None = None) -> float:
        """Exact recall over layers, and all horizons or one; 64 rows at a time, for one compiled shape."""
        recalled = known = 0.0
        for start in range(0, len(rows.has_next) - CHECK_EVERY + 1, CHECK_EVERY):
            found, counted = self._evaluate(network, part(rows, slice(start, start + CHECK_EVERY)))
            which = slice(None) if horizon is None else slice(horizon, horizon + 1)
            recalled += float(np.asarray(found)[:, which].sum())
            known += float(np.asarray(counted)[:, which].sum())
        return recalled / known


def part(rows: Batch, which: slice | np.ndarray) -> Batch:
    """Some of the rows."""
    return Batch(**{field.name: getattr(rows, field.name)[which] for field in fields(Batch)})


def joined(blocks: Sequence[Batch] | deque[Batch]) -> Batch:
    """Blocks of rows as one."""
    return Batch(
        **{field.name: np.concatenate([getattr(b, field.name) for b in blocks]) for field in fields(Batch)}
    )
