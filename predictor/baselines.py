"""What LLaPor is compared with: forecasts that need no training, a linear map, and the truth itself.

All have the same face: for the rows of a trace and a layer, probabilities of the experts of later layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from predictor.dataset import Rows
from predictor.linear import LinearParams, linear_logits
from predictor.llapor import LLaPor
from predictor.pca import Basis
from predictor.routers import Routers

PIECE = 8192  # rows that are computed at once


class Forecast(NamedTuple):
    """Of N rows, for H horizons.

    Attributes:
        probabilities: [N, H, E] that an expert is taken.
        ranking: [N, H, E] larger is likelier: the probabilities again, or what tells equal ones apart.
    """

    probabilities: np.ndarray
    ranking: np.ndarray


class Candidate(Protocol):
    """A predictor on the scorecard."""

    @property
    def name(self) -> str: ...

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        """What it says at `layer`; where it has nothing to go by, how popular the experts are."""
        ...


class Truth(NamedTuple):
    """What came of it.

    Attributes:
        experts: [N, H, K] of the target layers.
        known: [N, H] whether there is a target: past the last layer, it is in the next token's step.
    """

    experts: np.ndarray
    known: np.ndarray


def truth(rows: Rows, layer: int, horizons: Sequence[int]) -> Truth:
    """The experts that `horizons` layers after `layer` took."""
    count, layers, _ = rows.experts.shape
    experts, known = [], []
    for horizon in horizons:
        wraps, target = divmod(layer + horizon, layers)
        experts.append(rows.experts[rows.following if wraps else slice(None), target])
        known.append(rows.following >= 0 if wraps else np.ones(count, bool))
    return Truth(np.stack(experts, 1), np.stack(known, 1))


@dataclass(frozen=True)
class Popularity:
    """How often the target layer's experts are taken in the training rows.

    Attributes:
        share: [L, E] of the training rows.
        horizons: what is forecast.
    """

    share: np.ndarray
    horizons: tuple[int, ...]
    name: str = "popularity"

    @staticmethod
    def count(experts: np.ndarray, num_experts: int) -> np.ndarray:
        """[L, E] shares of the rows [N, L, K] that take each expert.

        >>> Popularity.count(np.array([[[0, 1]], [[0, 2]]]), 4).tolist()
        [[1.0, 0.5, 0.5, 0.0]]
        """
        layers = range(experts.shape[1])
        counts = [np.bincount(experts[:, layer].ravel(), minlength=num_experts) for layer in layers]
        return (np.stack(counts) / len(experts)).astype(np.float32)

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        targets = (layer + np.array(self.horizons)) % len(self.share)
        shape = (len(rows), len(self.horizons), self.share.shape[1])
        found = np.broadcast_to(self.share[targets][None], shape)
        return Forecast(found, found)


@dataclass(frozen=True)
class PreviousToken:
    """The experts that the latest token known to have passed the target layer took there, best first.

    That is the token before; past the last layer, the token itself.
    """

    popularity: Popularity
    name: str = "previous-token"

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        layers, experts = self.popularity.share.shape
        probabilities, ranking = (np.array(part) for part in self.popularity.forecast(rows, layer))
        previous = np.full(len(rows), -1)
        has_next = np.flatnonzero(rows.following >= 0)
        previous[rows.following[has_next]] = has_next
        for place, horizon in enumerate(self.popularity.horizons):
            wraps, target = divmod(layer + horizon, layers)
            from_row = np.arange(len(rows)) if wraps else previous
            known = from_row >= 0
            taken = rows.experts[from_row[known], target].astype(np.int64)
            hot, ordered = (np.zeros((len(taken), experts), np.float32) for _ in range(2))
            np.put_along_axis(hot, taken, 1.0, 1)
            np.put_along_axis(ordered, taken, np.arange(taken.shape[1], 0, -1)[None], 1)
            probabilities[known, place], ranking[known, place] = hot, ordered
        return Forecast(probabilities, ranking)


@dataclass(frozen=True)
class Gate:
    """The routers of the next layers on the hidden state as it is; past the last layer there is none.

    Attributes:
        routers, basis: of the trace.
        popularity: for targets past the last layer.
    """

    routers: Routers
    basis: Basis
    popularity: Popularity
    choices: int
    name: str = "gate"

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        horizons = self.popularity.horizons
        matrix, offset = self.routers.reduced(self.basis, layer, max(horizons), self.basis.width)
        experts = self.routers.weight.shape[2]

        def picked(array: np.ndarray) -> jax.Array:
            ahead = array.reshape(*array.shape[:-1], max(horizons), experts)
            return jnp.asarray(ahead[..., np.array(horizons) - 1, :])

        run = partial(_gate, picked(matrix), picked(offset), choices=self.choices)
        found = in_pieces(run, rows.hidden[:, layer])
        beyond = [place for place, horizon in enumerate(horizons) if layer + horizon >= len(self.basis.mean)]
        for part, popular in zip(found, self.popularity.forecast(rows, layer), strict=True):
            part[:, beyond] = popular[:, beyond]
        return Forecast(*found)


@partial(jax.jit, static_argnames="choices")
def _gate(matrix: jax.Array, offset: jax.Array, hidden: jax.Array, *, choices: int) -> tuple[jax.Array, ...]:
    logits = jnp.einsum("np,phe->nhe", hidden.astype(jnp.float32), matrix) + offset[None]
    # A softmax adds up to one, the experts taken to K.
    return jnp.minimum(1.0, choices * jax.nn.softmax(logits)), logits


@dataclass(frozen=True)
class Linear:
    """A linear map on what LLaPor reads, the routers' own forecast among it; see `predictor.linear`."""

    params: LinearParams
    name: str = "linear"

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        here = jax.tree.map(lambda leaf: jnp.asarray(leaf[layer]), self.params)
        run = partial(_linear, here)
        (found,) = in_pieces(run, rows.hidden[:, layer], rows.experts[:, layer], rows.weights[:, layer])
        return Forecast(found, found)


@jax.jit
def _linear(params: LinearParams, hidden: jax.Array, experts: jax.Array, weights: jax.Array):
    return (jax.nn.sigmoid(linear_logits(params, hidden, experts, weights)),)


@dataclass(frozen=True, eq=False)
class Learned:
    """LLaPor, on hidden states that a trace holds reduced.

    Attributes:
        llapor: trained.
        routers, basis: of the trace.
        horizons: what is forecast.

    Raises:
        ValueError: if the trace's PCA left out what the predictor reads.
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
                f"the predictor's PCA is another one than the trace's, whose {self.basis.width} components "
                f"hold only {kept.min():.0%} of one of the predictor's; record with all of them (--hidden)"
            )

    @cached_property
    def _turned(self) -> tuple[np.ndarray, np.ndarray]:
        """[L, P, P'] and [L, P']: from the trace's reduced hidden states to the predictor's."""
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
            found = self.llapor.predict_reduced(params, turned, experts, weights)
            return (found[picked].swapaxes(0, 1),)

        return run

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        turn, offset = (jnp.asarray(part[layer]) for part in self._turned)
        run = partial(self._run, turn, offset, self._params[layer])
        (found,) = in_pieces(run, rows.hidden[:, layer], rows.experts[:, layer], rows.weights[:, layer])
        return Forecast(found, found)


@dataclass(frozen=True)
class Oracle:
    """The truth: whatever measure does not give it full marks is wrong."""

    popularity: Popularity
    name: str = "oracle"

    def forecast(self, rows: Rows, layer: int) -> Forecast:
        true = truth(rows, layer, self.popularity.horizons)
        found = np.zeros((*true.known.shape, self.popularity.share.shape[1]), np.float32)
        np.put_along_axis(found, true.experts.astype(np.int64), 1.0, 2)
        return Forecast(found, found)


def in_pieces(run: Callable[..., tuple[jax.Array, ...]], *arrays: np.ndarray) -> list[np.ndarray]:
    """`run` over rows [N, ...], a piece at a time; all pieces have one shape, so that it compiles once."""
    rows = len(arrays[0])
    size = -(-rows // -(-rows // PIECE))
    found: list[np.ndarray] = []
    for start in range(0, rows, size):
        start = min(start, rows - size)  # the last piece begins within the one before
        piece = slice(start, start + size)
        parts = run(*(jnp.asarray(np.ascontiguousarray(array[piece])) for array in arrays))
        if not found:
            found = [np.empty((rows, *part.shape[1:]), part.dtype) for part in parts]
        for whole, part in zip(found, parts, strict=True):
            whole[piece] = part
    return found
