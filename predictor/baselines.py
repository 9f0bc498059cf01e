"""Predictors that LLaPor is compared with: those that need no training, a linear map, and the truth.

Each computes probabilities of the experts of later layers, for the rows of a trace and a layer. Those that an
engine takes by name are the same objects as in an engine (`layerscope_jax.prediction`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.prediction import history
from layerscope_jax.prediction.history import turn_ahead
from layerscope_jax.prediction.predictors import NextGate, router_shares
from layerscope_jax.scheduling.geometry import RoutedExperts
from predictor.dataset import Rows
from predictor.linear import LinearParams, linear_logits
from predictor.llapor import LLaPor
from predictor.pca import Basis
from predictor.routers import Prior, Routers

PIECE = 8192  # rows that are computed at once


class Forecast(NamedTuple):
    """Forecast for N rows and H horizons.

    Attributes:
        probabilities: [N, H, E] that a row's token chooses an expert.
        ranking: [N, H, E] scores, larger is likelier: the probabilities, or scores that break their ties.
    """

    probabilities: np.ndarray
    ranking: np.ndarray


class Candidate(Protocol):
    """A predictor on the scorecard."""

    @property
    def name(self) -> str: ...

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        """Returns the forecast at `layer`; the experts' popularity if nothing else is known."""
        ...


class Truth(NamedTuple):
    """Chosen experts in the target layers.

    Attributes:
        experts: [N, H, K] experts of each target layer.
        known: [N, H] whether the target exists: past the last layer, it is in the next token's step.
    """

    experts: np.ndarray
    known: np.ndarray


def truth(rows: Rows, layer: int, horizons: Sequence[int]) -> Truth:
    """Returns the experts chosen `horizons` layers after `layer`."""
    count, layers, _ = rows.experts.shape
    experts, known = [], []
    for horizon in horizons:
        later, target = turn_ahead(layer, horizon, layers)
        experts.append(rows.experts[rows.following if later else slice(None), target])
        known.append(rows.following >= 0 if later else np.ones(count, bool))
    return Truth(np.stack(experts, 1), np.stack(known, 1))


@dataclass(frozen=True)
class Popularity:
    """An engine's `popularity` predictor after all training rows, without forgetting.

    Attributes:
        share: [L, E] share of the training rows that choose each expert.
        horizons: layers ahead that are forecast.
    """

    share: np.ndarray
    horizons: tuple[int, ...]
    name: str = history.Popularity.name

    @staticmethod
    def count(experts: np.ndarray, num_experts: int) -> np.ndarray:
        """Returns the share [L, E] of the rows [N, L, K] that choose each expert.

        >>> Popularity.count(np.array([[[0, 1]], [[0, 2]]]), 4).tolist()
        [[1.0, 0.5, 0.5, 0.0]]
        """
        layers = range(experts.shape[1])
        counts = [np.bincount(experts[:, layer].ravel(), minlength=num_experts) for layer in layers]
        return (np.stack(counts) / len(experts)).astype(np.float32)

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        model = routed(rows, self.share.shape[1])
        state = history.Counts(model, dict(enumerate(self.share)))
        expected = history.Popularity().forecast(
            state, layer, model.experts_per_token, self.horizons
        )  # [H, E]
        every = np.broadcast_to(expected[None], (len(rows), *expected.shape))
        return Forecast(every, every)


@dataclass(frozen=True)
class PreviousToken:
    """An engine's `previous-token` predictor, with each passage as a separate request.

    It forecasts the experts that the newest token in the target layer has chosen there: the previous token's
    or, past the last layer, the row's own. The ranking has the router's best choice first.
    """

    popularity: Popularity
    name: str = history.PreviousToken.name

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        horizons, num_experts = self.popularity.horizons, self.popularity.share.shape[1]
        model = routed(rows, num_experts)
        probabilities, ranking = (np.array(part) for part in self.popularity.forecast(rows, layer))
        latest = {}  # target layer -> the last row that ran it, -1 for none
        for horizon in horizons:
            later, target = turn_ahead(layer, horizon, model.num_layers)
            latest[target] = np.arange(len(rows)) if later else rows.before()
        ones = np.ones(model.experts_per_token, np.float32)
        counts = {target: at_choices(rows, target, row, ones, num_experts) for target, row in latest.items()}
        state = history.Counts(model, counts)
        expected = history.PreviousToken().forecast(
            state, layer, model.experts_per_token, horizons
        )  # [H, N, E]
        best_first = np.arange(model.experts_per_token, 0, -1, dtype=np.float32)
        for place, (target, row) in enumerate(latest.items()):
            known = row >= 0
            probabilities[known, place] = expected[place, known]
            ranking[known, place] = at_choices(rows, target, row, best_first, num_experts)[known]
        return Forecast(probabilities, ranking)


def routed(rows: Rows, num_experts: int) -> RoutedExperts:
    """Returns the numbers of the model whose routing the rows are."""
    _, layers, choices = rows.experts.shape
    return RoutedExperts(num_layers=layers, num_experts=num_experts, experts_per_token=choices)


def at_choices(rows: Rows, layer: int, which: np.ndarray, values: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns values [N, E] at the experts that some rows chose in a layer, zeros elsewhere.

    Args:
        which: [N] index of each row; -1 for no row, which gives zeros.
        values: [K] for the best choice, the second and so on.
    """
    known = np.flatnonzero(which >= 0)
    chosen = rows.experts[which[known], layer].astype(np.int64)
    placed = np.zeros((len(which), num_experts), np.float32)
    placed[known[:, None], chosen] = values
    return placed


@dataclass(frozen=True)
class Gate:
    """An engine's `gate` predictor, on the reduced hidden states of a trace.

    Attributes:
        routers, basis: of the trace.
        popularity: forecast for targets past the last layer, for which there is no router.
        choices: K.
    """

    routers: Routers
    basis: Basis
    popularity: Popularity
    choices: int
    name: str = NextGate.name

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        horizons = self.popularity.horizons
        prior = self.routers.prior(self.basis, [layer], horizons, self.basis.width)
        run = partial(_gate, jax.tree.map(lambda part: jnp.asarray(part[0]), prior), choices=self.choices)
        parts = in_pieces(run, rows.hidden[:, layer])
        layers = len(self.basis.mean)
        beyond = [place for place, horizon in enumerate(horizons) if turn_ahead(layer, horizon, layers)[0]]
        for part, popular in zip(parts, self.popularity.forecast(rows, layer), strict=True):
            part[:, beyond] = popular[:, beyond]
        return Forecast(*parts)


@partial(jax.jit, static_argnames="choices")
def _gate(prior: Prior, hidden: jax.Array, *, choices: int) -> tuple[jax.Array, ...]:
    logits = prior.logits(hidden.astype(jnp.float32))
    return router_shares(logits, choices), logits


@dataclass(frozen=True)
class Linear:
    """A linear map of LLaPor's inputs, the routers' own forecast among them; see `predictor.linear`."""

    params: LinearParams
    name: str = "linear"

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf[layer]), self.params)
        run = partial(_linear, params)
        (probabilities,) = in_pieces(
            run, rows.hidden[:, layer], rows.experts[:, layer], rows.weights[:, layer]
        )
        return Forecast(probabilities, probabilities)


@jax.jit
def _linear(params: LinearParams, hidden: jax.Array, experts: jax.Array, weights: jax.Array):
    return (jax.nn.sigmoid(linear_logits(params, hidden, experts, weights)),)


@dataclass(frozen=True, eq=False)
class Learned:
    """LLaPor, on the reduced hidden states of a trace.

    Attributes:
        llapor: a trained predictor.
        routers, basis: of the trace.
        horizons: layers ahead that are forecast.

    Raises:
        ValueError: if the trace's PCA lacks components that the predictor reads.
    """

    llapor: LLaPor
    routers: Routers
    basis: Basis
    horizons: tuple[int, ...]
    name: str = "llapor"

    def __post_init__(self) -> None:
        kept = np.linalg.norm(self._turned[0], axis=1)  # of each component that the predictor reads
        if kept.min() < 0.99:
            raise ValueError(
                f"the predictor's PCA differs from the trace's, whose {self.basis.width} components "
                f"hold only {kept.min():.0%} of one of the predictor's; record with all of them (--hidden)"
            )

    @cached_property
    def _turned(self) -> tuple[np.ndarray, np.ndarray]:
        """Map [L, P, P'] and offset [L, P'] from the trace's reduced hidden states to the predictor's."""
        ours, theirs = self.basis, self.llapor.basis
        turn = np.einsum("ldp,ldq->lpq", ours.components, theirs.components)
        return turn, np.einsum("ld,ldq->lq", ours.mean - theirs.mean, theirs.components)

    @cached_property
    def _params(self) -> list:
        return self.llapor.params(self.routers)

    @cached_property
    def _run(self) -> Callable:
        picked = np.array(self.horizons) - 1

        @jax.jit
        def run(turn, offset, params, hidden, experts, weights):
            turned = hidden.astype(jnp.float32) @ turn + offset[None]
            probabilities = self.llapor.predict_reduced(params, turned, experts, weights)
            return (probabilities[picked].swapaxes(0, 1),)

        return run

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        turn, offset = (jnp.asarray(part[layer]) for part in self._turned)
        run = partial(self._run, turn, offset, self._params[layer])
        (probabilities,) = in_pieces(
            run, rows.hidden[:, layer], rows.experts[:, layer], rows.weights[:, layer]
        )
        return Forecast(probabilities, probabilities)


@dataclass(frozen=True)
class Oracle:
    """The true experts: checks the measures, which must score it as perfect."""

    popularity: Popularity
    name: str = "oracle"

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        true = truth(rows, layer, self.popularity.horizons)
        probabilities = np.zeros((*true.known.shape, self.popularity.share.shape[1]), np.float32)
        np.put_along_axis(probabilities, true.experts.astype(np.int64), 1.0, 2)
        return Forecast(probabilities, probabilities)


def in_pieces(run: Callable[..., tuple[jax.Array, ...]], *arrays: np.ndarray) -> list[np.ndarray]:
    """Returns the outputs of `run` over rows [N, ...], computed in pieces of one shape to compile once."""
    rows = len(arrays[0])
    size = -(-rows // -(-rows // PIECE))
    outputs: list[np.ndarray] = []
    for start in range(0, rows, size):
        start = min(start, rows - size)  # the last piece begins within the one before
        piece = slice(start, start + size)
        parts = run(*(jnp.asarray(np.ascontiguousarray(array[piece])) for array in arrays))
        if not outputs:
            outputs = [np.empty((rows, *part.shape[1:]), part.dtype) for part in parts]
        for whole, part in zip(outputs, parts, strict=True):
            whole[piece] = part
    return outputs
