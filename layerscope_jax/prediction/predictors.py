"""Predictors of the coming layers' experts: their protocol, and the predictor that uses the routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.models.experts import matmul
from layerscope_jax.prediction.bases import PredictorBase, completed
from layerscope_jax.prediction.history import LOOK_AHEAD, History, Popularity, PreviousToken

if TYPE_CHECKING:
    from layerscope_jax.checkpoints.model import Model


class Predictor(Protocol):
    """Forecasts, in the jitted part of a layer, which experts each token will choose in the next W layers.

    Past the last layer, the look-ahead continues with the first layers of the next step. Forecasts decide
    when experts are copied, never what is computed: a wrong forecast only costs time.

    A predictor is hashable: engines with equal predictors share compiled programs, which are cached together
    with the predictor. A predictor with weights must therefore define its own equality. A class derived from
    `PredictorBase` can do more: give compiled programs an object without the weights (`architecture`), and
    learn from the routing of each layer.

    Attributes:
        name: name in statistics and tables.
        look_ahead: W, the number of coming layers that are forecast.
    """

    @property
    def name(self) -> str: ...

    @property
    def look_ahead(self) -> int: ...

    def __hash__(self) -> int: ...

    def bind(self, model: Model) -> Sequence[Any]:
        """Returns the parameters of the forecast, one pytree of device arrays for each layer of `model`.

        Their device memory, not counting the model's own arrays, is taken off the device budget.

        Raises:
            ValueError: if the predictor was made for another model; says what differs.
        """

    def predict(self, params: Any, inputs: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns the probabilities [W, T, E] that each token chooses each expert; pure and jittable.

        Args:
            params: parameters of this layer, from `bind`.
            inputs: [T, D] inputs of this layer's router.
            experts: [T, K] experts that this layer's router chose for each token.
            weights: [T, K] router weights of those experts.
        """


@dataclass(frozen=True)
class NextGate(PredictorBase):
    """Applies the next layers' routers to this layer's hidden state (Fate, arXiv 2502.12224, and others).

    The hidden state is assumed to reach them unchanged: each of their norms scales `x / scale_l`. The next
    step is not forecast.
    """

    look_ahead: int = LOOK_AHEAD
    name = "gate"

    def bind(self, model: Model) -> list[RoutersAhead]:
        """Returns the model's own arrays, without copies; only one number for each layer is new."""
        routers, score = model.routers(), model.config.routing.score
        counts = [jax.device_put(np.int32(count), model.device) for count in range(self.look_ahead + 1)]
        params = []
        for number, router in enumerate(routers):
            ahead = routers[number + 1 : number + 1 + self.look_ahead]
            # All layers share a program, so all have W routers; `known` masks the substitutes.
            filled = [*ahead, *[router] * (self.look_ahead - len(ahead))]
            params.append(
                RoutersAhead(
                    own=router.scale,
                    scales=tuple(each.scale for each in filled),
                    weights=tuple(each.weight for each in filled),
                    known=counts[len(ahead)],
                    biases=None if router.bias is None else tuple(each.bias for each in filled),
                    selection=None
                    if router.selection_bias is None
                    else Selection(tuple(each.selection_bias for each in filled), score),
                )
            )
        return params

    def predict(
        self, params: RoutersAhead, inputs: jax.Array, experts: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """Returns `min(1, K softmax)`; zero past the last layer."""
        own = params.own.astype(jnp.float32)
        plain = inputs.astype(jnp.float32) / jnp.where(jnp.abs(own) > 1e-6, own, 1.0)[None]
        logits = [
            matmul(plain * scale.astype(jnp.float32)[None], weight.astype(jnp.float32))
            for scale, weight in zip(params.scales, params.weights, strict=True)
        ]
        stacked = jnp.stack(logits)  # [W, T, E]
        if params.biases is not None:
            stacked += jnp.stack(params.biases).astype(jnp.float32)[:, None]
        if params.selection is not None:
            stacked = choosing_logits(
                stacked, jnp.stack(params.selection.biases)[:, None], params.selection.score
            )
        shares = router_shares(stacked, experts.shape[1])
        known = jnp.arange(self.look_ahead, dtype=jnp.int32) < params.known
        return jnp.where(known[:, None, None], shares, 0.0)


def router_shares(logits: jax.Array, choices: int) -> jax.Array:
    """Returns probabilities [..., E] that a token chooses an expert, from router logits: `min(1, K softmax)`.

    A softmax adds up to one, but a token chooses K experts.

    >>> router_shares(jnp.log(jnp.array([6.0, 1.0, 1.0])), 2).tolist()
    [1.0, 0.25, 0.25]
    """
    return jnp.minimum(1.0, choices * jax.nn.softmax(logits, -1))


def choosing_logits(logits: jax.Array, bias: jax.Array, score: str) -> jax.Array:
    """Returns logits in the order in which a router with a bias for choosing chooses.

    Scores with biases are mapped to between 0 and 1, whatever the biases, and their logits scaled so that a
    difference of scores counts as without biases. Equal biases change nothing: sigmoid scores then have their
    own logits.

    Args:
        logits: [..., E] of the router.
        bias: broadcast to them, what is added to the scores for choosing alone.
        score: as in `RoutingRule.score`.

    >>> found = choosing_logits(jnp.array([0.0, 1.0]), jnp.array([7.25, 7.0]), "sigmoid")
    >>> [round(float(logit), 2) for logit in found]
    [0.51, 0.43]
    """
    scores = jax.nn.sigmoid(logits) if score == "sigmoid" else jax.nn.softmax(logits, -1)
    bias = bias.astype(scores.dtype)
    least = bias.min(-1, keepdims=True)
    span = 1 + bias.max(-1, keepdims=True) - least
    ranked = jnp.clip((scores + (bias - least)) / span, 1e-6, 1 - 1e-6)
    return span * (jnp.log(ranked) - jnp.log1p(-ranked))


@dataclass(frozen=True)
class Selection:
    """Biases for choosing, of W routers; a pytree.

    Attributes:
        biases: W arrays [E].
        score: as in `RoutingRule.score`; not an array.
    """

    biases: tuple[jax.Array, ...]
    score: str


jax.tree_util.register_dataclass(Selection, ["biases"], ["score"])


class RoutersAhead(NamedTuple):
    """Parameters of `NextGate` in one layer.

    Attributes:
        own: [D] scale of the norm before the layer's own router.
        scales, weights: W arrays [D] and [E, D] of the next layers.
        known: [] number of next layers that exist; the rest of the W are substitutes.
        biases: W arrays [E] that are added to the logits; None where routers have none.
        selection: what is added to scores for choosing; None where routers have none.
    """

    own: jax.Array
    scales: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...]
    known: jax.Array
    biases: tuple[jax.Array, ...] | None = None
    selection: Selection | None = None


def routers_ahead(weight: np.ndarray, scale: np.ndarray, layer: int, look_ahead: int) -> np.ndarray:
    """Returns routers [W, E, D] of the next W layers, to be applied to one layer's normed hidden state.

    Zeros past the last layer.

    Args:
        weight: [L, E, D] weights of all routers.
        scale: [L, D] scales of the norms before them.
        layer: number of the layer whose hidden state is read.
        look_ahead: W.
    """
    routers = np.zeros((look_ahead, *weight.shape[1:]), np.float32)
    own = np.where(np.abs(scale[layer]) > 1e-6, scale[layer], 1.0)
    for step, target in enumerate(range(layer + 1, min(layer + 1 + look_ahead, len(weight)))):
        routers[step] = (scale[target] / own) * weight[target]
    return routers


PREDICTORS: dict[str, Any] = {kind.name: kind for kind in (NextGate, PreviousToken, Popularity)}
"""Predictors that need no training, by name, as `OffloadConfig.predictor` takes them."""


def make_predictor(predictor: str | Predictor | History) -> Predictor | History:
    """Makes the predictor of a name; returns an object as it is.

    Raises:
        ValueError: if there is no predictor of that name, or the object lacks a method of predictors.
    """
    if isinstance(predictor, str):
        if predictor not in PREDICTORS:
            raise ValueError(
                f"predictor must be one of {', '.join(sorted(PREDICTORS))}, or a loaded predictor "
                f"(`predictor.load(folder)`), got {predictor!r}"
            )
        return PREDICTORS[predictor]()
    if not hasattr(predictor, "predict") and not hasattr(predictor, "expected"):
        raise ValueError(
            f"predictor must be a name or an object with bind and predict, or init, update and expected, got "
            f"{predictor!r}"
        )
    if isinstance(predictor, type):
        raise ValueError(
            f"predictor must be an object, got the class {predictor.__name__}; pass an instance of it"
        )
    try:
        if hasattr(predictor, "predict"):
            hash(completed(cast(Predictor, predictor)).architecture)
    except TypeError:
        raise ValueError(
            f"predictor {type(predictor).__name__} must be hashable, because engines with equal predictors "
            "share programs; if it is a dataclass, set frozen=True or eq=False"
        ) from None
    return predictor
