"""A predictor that learns on while an engine uses it, off the critical path."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints import Model
from layerscope_jax.identity import ModelIdentity
from layerscope_jax.scheduling.plan import Phase
from predictor.llapor import LayerParams, LLaPor
from predictor.pca import reduce
from predictor.routers import Routers
from predictor.step import Batch
from predictor.tuning import Tuner, TuningConfig

MOST_ROWS = 256  # of a step: what a long prefill has more is left out
BACKLOG = 4  # steps that may wait for the thread; while it is busy longer, steps are left out


class Online:
    """A `layerscope_jax.prediction.Predictor`: LLaPor, tuned on what the engine sees.

    The engine hands over what each layer saw, which costs it nothing; a thread of its own reads it back, and
    tunes when it is needed. What it learns replaces the engine's parameters layer by layer. Since forecasts
    decide when things move and never what is computed, no token can change by it.

    Args:
        llapor: what is tuned; itself it stays as it is.
        config: when and how.

    Attributes:
        tuner: the window, the looks at it, and the predictor as it is now.

    Example::

        online = predictor.Online(predictor.load("build/predictor"))
        engine = layerscope_jax.Engine(model, layerscope_jax.OffloadConfig(predictor=online))
        engine.generate(prompts)
        online.finish().save("build/tuned")
    """

    name = "llapor-online"

    def __init__(self, llapor: LLaPor, config: TuningConfig | None = None):
        self.look_ahead = llapor.look_ahead
        self.tuner: Tuner | None = None
        self._first, self._config = llapor, config
        self._bound: list[LayerParams] = []
        self._seen: list[tuple[jax.Array, np.ndarray, jax.Array]] = []
        self._last: Batch | None = None  # the last step, whose next tokens are not known yet
        self._decoded = np.zeros(0, bool)  # what was active in the step before, if that was a decode step
        self._work: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layerscope-tuning")

    def bind(self, model: Model) -> list[LayerParams]:
        """As `LLaPor.bind`; entries of the list are replaced when a tuning is accepted."""
        ModelIdentity.of(model).check(self._first.model, "this predictor")
        self._routers, self._device = Routers.of(model), model.device
        if self.tuner is None:
            self.tuner = Tuner(self._first, self._routers, self._config)
        self._bound = self.tuner.llapor.params(self._routers, self._device)
        return self._bound

    def predict(
        self, params: LayerParams, inputs: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        return self._first.predict(params, inputs, experts, weights)

    def observe(
        self,
        layer: int,
        inputs: jax.Array,
        experts: np.ndarray,
        weights: jax.Array,
        active: np.ndarray,
        phase: Phase,
    ) -> None:
        """Notes one layer of a step; with the last one, the step's rows go to the thread.

        Args:
            layer: its number; layers come in order.
            inputs, weights: [T, D] and [T, K], on the device.
            experts: [T, K].
            active: [T] bool, which rows are tokens.
            phase: of the step.
        """
        if layer == 0:
            self._seen.clear()
        self._seen.append((inputs, experts, weights))
        if len(self._seen) < self._first.model.num_layers:
            return
        seen, self._seen = self._seen, []
        # Between two decode steps of the same rows nobody joined: that would have taken a prefill.
        follows = phase == "decode" and np.array_equal(active, self._decoded)
        self._work = [work for work in self._work if not work.done()]
        taken = len(self._work) < BACKLOG
        self._decoded = active if phase == "decode" and taken else np.zeros(0, bool)
        if taken:
            rows = np.flatnonzero(active)[:MOST_ROWS]
            self._work.append(self._thread.submit(self._learn, seen, rows, follows))

    def finish(self) -> LLaPor:
        """Waits until what was seen is learned; returns the predictor as it is then.

        Raises:
            ValueError: if no engine has used it.
        """
        for work in self._work:
            work.result()
        self._work.clear()
        if self.tuner is None:
            raise ValueError(
                "no engine has used this predictor yet: give it to one as OffloadConfig(predictor=)"
            )
        return self.tuner.llapor

    def _learn(
        self, seen: list[tuple[jax.Array, np.ndarray, jax.Array]], rows: np.ndarray, follows: bool
    ) -> None:
        """Learns from `rows` of a step; whether it has the next tokens of the step before, row by row."""
        assert self.tuner is not None
        basis = self.tuner.llapor.basis
        hidden = jnp.stack([inputs[rows] for inputs, _, _ in seen], 1)
        experts = np.stack([experts[rows] for _, experts, _ in seen], 1)
        reduced = reduce(hidden, jnp.asarray(basis.mean), jnp.asarray(basis.components))
        here = Batch(
            hidden=np.asarray(reduced, np.float16),
            experts=experts,
            weights=np.stack([np.asarray(weights)[rows] for _, _, weights in seen], 1).astype(np.float16),
            following=experts,
            has_next=np.zeros(len(rows), bool),
        )
        last, self._last = self._last, here
        if last is not None:
            if follows:
                last = replace(last, following=here.experts, has_next=np.ones(len(rows), bool))
            if self.tuner.feed(last):
                for layer, params in enumerate(self.tuner.llapor.params(self._routers, self._device)):
                    self._bound[layer] = params
