"""Online tuning: a predictor that keeps learning while engines use it, off the critical path."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.checkpoints.model import Model
from layerscope_jax.prediction import bases
from layerscope_jax.scheduling.plan import Phase
from layerscope_jax.support.machine import cpu_device
from predictor.llapor import Architecture, LayerParams, LLaPor
from predictor.pca import reduce
from predictor.routers import Routers
from predictor.step import Batch
from predictor.tuning import Tuner, TuningConfig

MOST_ROWS = 256  # rows of a step; further rows of a long prefill are left out
BACKLOG = 4  # steps that may wait for the thread; further steps are left out

Seen = list[tuple[jax.Array, np.ndarray, jax.Array]]
"""For each layer of a step: the inputs [T, D], the chosen experts [T, K] and their weights [T, K]."""


class LearningError(RuntimeError):
    """Raised when the learning thread has failed; forecasts keep their parameters, and tokens are correct."""


class Online(bases.PredictorBase):
    """LLaPor tuned on the traffic of engines; a `layerscope_jax.prediction.predictors.Predictor`.

    An engine passes on the inputs and routing of each layer, which takes it no time; a thread reads them
    back, and tunes on this machine's CPU when needed. The result replaces the engine's parameters layer by
    layer. No token can change, because forecasts decide when experts are copied and never what is computed.
    Several engines of the model may share an `Online`. The thread ends with the last of them, after the steps
    that it was given are learned, and starts again with the next.

    If the thread fails, it stops learning and the engines continue. The next call of `generate` gives a
    warning; `finish` and `close` raise the error, and so does the engine's `close` if there was no warning.

    Args:
        llapor: the predictor to tune; the object itself is not changed.
        config: when and how it is tuned.

    Attributes:
        tuner: the window, the looks at it, and the current predictor; None before an engine has used it.

    Example::

        online = predictor.Online(predictor.load("build/predictor"))
        with layerscope_jax.Engine(model, layerscope_jax.OffloadConfig(predictor=online)) as engine:
            engine.generate(prompts)
        online.finish().save("build/tuned")
    """

    name = "llapor-online"

    def __init__(self, llapor: LLaPor, config: TuningConfig | None = None):
        self.look_ahead = llapor.look_ahead
        self.tuner: Tuner | None = None
        self._first, self._config = llapor, config
        self._routers: Routers | None = None
        self._learners: weakref.WeakSet[Learner] = weakref.WeakSet()
        self._work: list[Future[None]] = []
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()  # for all of these
        self._failure: BaseException | None = None
        self._told = False
        self._at_work = 0  # the thread's number

    @property
    def architecture(self) -> Architecture:
        return self._first.architecture

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Online) and self.architecture == other.architecture

    def __hash__(self) -> int:
        return hash((Online, self.architecture))

    def attach(self, model: Model) -> Learner:
        """Returns the learner of one engine, which ends with its `close`.

        Raises:
            ValueError: if the predictor was trained for another model; says what differs.
        """
        ModelIdentity.of(model).check(self._first.model, "this predictor")
        with self._lock:
            if self.tuner is None or self._routers is None:
                self._routers = Routers.of(model)
                with jax.default_device(cpu_device()):  # the device is for forecasts and experts
                    self.tuner = Tuner(self._first, self._routers, self._config)
            params = self.tuner.llapor.params(self._routers, model.device)
            learner = Learner(self, params, model.device)
            self._learners.add(learner)
            return learner

    def bind(self, model: Model) -> list[LayerParams]:
        """Returns the current parameters as `LLaPor.bind` does; engines call `attach` instead."""
        return self._llapor.bind(model)

    def predict(
        self, params: LayerParams, inputs: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        return self._first.predict(params, inputs, experts, weights)

    def finish(self) -> LLaPor:
        """Waits until all steps so far are learned, and returns the tuned predictor.

        Raises:
            ValueError: if no engine has used it.
            LearningError: if learning has failed; `tuner.llapor` is the predictor from before.
        """
        self._wait()
        self._raise()
        if self.tuner is None:
            raise ValueError(
                "no engine has used this predictor yet: give it to one as OffloadConfig(predictor=)"
            )
        return self.tuner.llapor

    def close(self) -> None:
        """Ends the thread after all steps so far are learned; engines keep the tuned parameters.

        Raises:
            LearningError: if learning has failed.
        """
        for learner in list(self._learners):
            learner.leave()
        self._end()
        self._raise()

    def __enter__(self) -> Online:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except LearningError:
            if kind is None:  # otherwise another exception is being raised
                raise

    @property
    def failure(self) -> str | None:
        """Message of the error that ended learning; None if there was none."""
        if self._failure is None:
            return None
        return (
            f"online tuning has stopped: {type(self._failure).__name__}: {self._failure}; "
            "forecasts keep their parameters, and tokens are correct; use a new Online to continue tuning"
        )

    def take_failure(self) -> str | None:
        """Returns `failure` if it was not reported yet."""
        with self._lock:
            told, self._told = self._told, self._told or self._failure is not None
        return None if told else self.failure

    @property
    def _llapor(self) -> LLaPor:
        return self._first if self.tuner is None else self.tuner.llapor

    def _raise(self) -> None:
        if self._failure is not None:
            self._told = True
            raise LearningError(self.failure) from self._failure

    def _wait(self) -> None:
        with self._lock:
            work = list(self._work)
        for each in work:
            each.result()  # raises nothing: `_guarded` stores errors

    def _submit(self, learner: Learner, seen: Seen, rows: np.ndarray, follows: bool) -> bool:
        """Passes a step to the thread; returns whether the thread has time for it."""
        with self._lock:
            self._work = [work for work in self._work if not work.done()]
            if self._failure is not None or len(self._work) >= BACKLOG or learner not in self._learners:
                return False
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="layerscope-tuning")
            self._work.append(self._thread.submit(self._guarded, learner, seen, rows, follows))
        return True

    def _leave(self, learner: Learner) -> None:
        """Removes an engine's learner; with the last one the thread ends."""
        with self._lock:
            self._learners.discard(learner)
            last = not self._learners
        if last:
            self._end()

    def _end(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
        if (
            thread is not None
        ):  # the learning thread may garbage-collect an engine, and cannot wait for itself
            thread.shutdown(wait=threading.get_ident() != self._at_work)

    def _guarded(self, learner: Learner, seen: Seen, rows: np.ndarray, follows: bool) -> None:
        self._at_work = threading.get_ident()
        if self._failure is not None:
            return
        try:
            with jax.default_device(cpu_device()):
                self._learn(learner, seen, rows, follows)
        except BaseException as error:  # its caller no longer waits
            self._failure = error

    def _learn(self, learner: Learner, seen: Seen, rows: np.ndarray, follows: bool) -> None:
        """Learns from `rows` of a step; `follows`: they are the next tokens of the previous step's rows."""
        assert self.tuner is not None
        assert self._routers is not None
        basis = self.tuner.llapor.basis
        hidden = np.stack([np.asarray(inputs[rows], np.float32) for inputs, _, _ in seen], 1)
        experts = np.stack([experts[rows] for _, experts, _ in seen], 1)
        reduced = reduce(jnp.asarray(hidden), jnp.asarray(basis.mean), jnp.asarray(basis.components))
        current = Batch(
            hidden=np.asarray(reduced, np.float16),
            experts=experts,
            weights=np.stack([np.asarray(weights)[rows] for _, _, weights in seen], 1).astype(np.float16),
            following=experts,
            has_next=np.zeros(len(rows), bool),
        )
        last, learner.last = learner.last, current
        if last is not None:
            if follows:
                last = replace(last, following=current.experts, has_next=np.ones(len(rows), bool))
            if self.tuner.feed(last):
                with self._lock:
                    learners = list(self._learners)
                    for each in learners:
                        layers = self.tuner.llapor.layers(self._routers, each.device)
                        for layer, params in enumerate(layers):  # one layer's are there twice for a moment
                            each.params[layer] = params


class Learner(bases.Learner):
    """Learner of one engine that uses an `Online`.

    Attributes:
        params: parameters of each layer; replaced in this list when a tuning is accepted.
        device: device of the parameters.
        last: the last step learned from, whose next tokens are not known yet.
    """

    learns = True
    params: list[LayerParams]

    def __init__(self, online: Online, params: list[LayerParams], device: jax.Device):
        super().__init__(params)
        self.device = device
        self.last: Batch | None = None
        self._online = online
        self._seen: Seen = []
        self._decoded = np.zeros(0, bool)  # active rows of the previous step, if that was a decode step

    def observe(
        self,
        layer: int,
        inputs: jax.Array,
        experts: np.ndarray,
        weights: jax.Array,
        active: np.ndarray,
        phase: Phase,
    ) -> None:
        """Receives one layer of a step; after the last layer, passes the step's rows to the thread.

        Args:
            layer: number of the layer; layers come in order.
            inputs, weights: [T, D] and [T, K], on the device.
            experts: [T, K].
            active: [T] bool, which rows are tokens and not padding.
            phase: phase of the step.
        """
        if layer == 0:
            self._seen.clear()
        self._seen.append((inputs, experts, weights))
        if len(self._seen) < len(self.params):
            return
        seen, self._seen = self._seen, []
        # Between two decode steps no request joined, because that takes a prefill.
        follows = phase == "decode" and np.array_equal(active, self._decoded)
        rows = np.flatnonzero(active)[:MOST_ROWS]
        taken = self._online._submit(self, seen, rows, follows)
        self._decoded = active if phase == "decode" and taken else np.zeros(0, bool)

    def check(self) -> str | None:
        """Returns the failure, once."""
        return self._online.take_failure()

    def leave(self) -> None:
        """Stops passing on steps; does not wait."""
        with self._online._lock:
            self._online._learners.discard(self)

    def close(self) -> None:
        """Ends the learner with its engine.

        Raises:
            LearningError: if learning has failed and that was not reported.
        """
        self._online._leave(self)
        failure = self._online.take_failure()
        if failure is not None:
            raise LearningError(failure) from self._online._failure
