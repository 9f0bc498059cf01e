"""Jitted programs of a step that runs layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.combining import add_experts
from layerscope_jax.kernels.dense import our_loops
from layerscope_jax.models.config import LayerKind, ModelConfig
from layerscope_jax.models.decoder import Add, Between, Decoder, to_end, to_experts
from layerscope_jax.models.decoder_layers import new_layer
from layerscope_jax.models.invariance import invariant
from layerscope_jax.models.layers import abstract
from layerscope_jax.offload.host_rows import merged
from layerscope_jax.offload.split_rows import SplitRows, exchanged
from layerscope_jax.prediction.forecasts import expected_tokens
from layerscope_jax.prediction.predictors import Predictor
from layerscope_jax.runtime.alike import alike
from layerscope_jax.runtime.exactness import options
from layerscope_jax.runtime.reading_back import packed
from layerscope_jax.runtime.sampling import sample
from layerscope_jax.runtime.scoring import scores_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["kinds"])
@dataclass(frozen=True)
class Layers:
    """Parameters of some decoder layers. Layers of the same kinds share compiled programs.

    Attributes:
        kinds: kind of each layer.
        params: parameters of each layer, as pure dicts.
    """

    kinds: tuple[LayerKind, ...]
    params: list[Any]

    @classmethod
    def of(cls, model: Model, layers: range) -> Layers:
        """Returns the parameters of some decoder layers of a model."""
        kinds = tuple(model.config.layer_kind(layer) for layer in layers)
        return cls(kinds, [model.dense["layers"][layer] for layer in layers])


class Programs(NamedTuple):
    """Jitted programs of a step: before the layers, for each MoE layer, and after the layers; and what comes
    after the layers of a step that scores tokens."""

    embed: Callable
    attend_and_route: Callable
    finish: Callable
    score: Callable


def dense_parts(
    config: ModelConfig, dtype: np.dtype
) -> tuple[Callable[[Layers], list[Any]], Callable[[Any], Decoder]]:
    """Returns functions from parameters to the dense parts of layers, and to a decoder without layers."""

    @functools.cache
    def graph_of(kind: LayerKind) -> nnx.GraphDef:
        layer = next(layer for layer in range(config.num_layers) if config.layer_kind(layer) == kind)
        return nnx.split(abstract(lambda rngs: new_layer(config, layer, rngs=rngs, dtype=dtype)))[0]

    def layers_of(layers: Layers) -> list[Any]:
        pairs = zip(layers.kinds, layers.params, strict=True)
        return [nnx.merge(graph_of(kind), params) for kind, params in pairs]

    hollow = abstract(lambda rngs: Decoder(config.without_layers(), rngs=rngs, dtype=dtype))
    ends_graph, ends_state = nnx.split(hollow)
    empty: dict[str, Any] = {key: {} for key in ("layers", "experts") if key in nnx.to_pure_dict(ends_state)}
    return layers_of, lambda params: nnx.merge(ends_graph, params | empty)


def before_layers(config: ModelConfig, hidden: jax.Array) -> Between:
    """Returns what comes into the first layer of a decode step, in which there are no experts' rows yet.

    Args:
        config: of the model.
        hidden: [B, 1, D] embeddings.
    """
    choices = (len(hidden), config.experts_per_token)
    rows = jnp.zeros((choices[0] * choices[1], hidden.shape[-1]), hidden.dtype)
    return Between(hidden, rows, jnp.zeros(choices, jnp.float32))


def add_rows(table: jax.Array | None) -> Add:
    """Returns the function that adds the experts' rows to the hidden state; see `add_experts`."""

    def add(state: Between) -> jax.Array:
        rows = exchanged(state.outputs) if isinstance(state.outputs, SplitRows) else merged(state.outputs)
        return add_experts(state.hidden, rows, state.weights, table)

    return add


@functools.lru_cache(maxsize=16)
def programs(
    config: ModelConfig,
    dtype: np.dtype,
    predictor: Predictor | None,
    exact: bool = False,
    mesh: Mesh | None = None,
) -> Programs:
    """Returns the programs for models of one shape, with a predictor's forecast.

    MoE layers with the same dense layers before them share a program, and so do all engines of models of one
    shape: another policy or budget compiles nothing. If they are to be `exact`, no row depends on another.
    With a mesh, each of its devices runs them (`alike`).
    """
    layers_of, ends_of = dense_parts(config, dtype)

    def jit(function: Callable, static: str = "", **others: Any) -> Callable:
        return jax.jit(
            alike(function, mesh, static),
            compiler_options=options() if exact else None,
            static_argnames=static or None,
            **others,
        )

    @jit
    def embed(ends, tokens, *others):
        # The other inputs of all layers pass through: a separate copy to the device would take as long.
        return ends_of(ends).embed(tokens), *others

    @functools.partial(jit, donate_argnames="caches", static="reads")
    def attend_and_route(
        span, state, positions, caches, forecast_params, number, counted, table=None, reads=None
    ):
        with our_loops(table), invariant(exact):
            hidden, inputs, routing, caches = to_experts(
                layers_of(span), state, positions, caches, add_rows(table)
            )
        expected = None
        if predictor is not None:
            with jax.named_scope("forecast"):
                # The barrier keeps the forecast from being fused with the layer, which could change the
                # layer's bits.
                known = jax.lax.optimization_barrier((inputs, routing.experts, routing.weights))
                probabilities = predictor.predict(forecast_params, *known)
                expected = expected_tokens(probabilities, counted, number, config.num_moe_layers)
        words = None
        if reads is not None:
            words = packed(routing.experts, expected, inputs if reads == "inputs" else None)
        return hidden, inputs, routing.experts, routing.weights, caches, expected, words

    @functools.partial(jit, donate_argnames="caches")
    def finish(ends, state, positions, last, sampling, tail, caches, table=None):
        rows = jnp.arange(state.hidden.shape[0])
        with our_loops(table), invariant(exact):
            hidden, caches = to_end(layers_of(tail), state, positions, caches, add_rows(table))
            logits = ends_of(ends).next_logits(hidden, last)
        return sample(logits, positions[rows, last] + 1, sampling), logits, caches

    @functools.partial(jit, donate_argnames="caches", static="top")
    def score(ends, state, positions, last, sampling, tail, caches, table, targets, top):
        with our_loops(table), invariant(exact):
            hidden, caches = to_end(layers_of(tail), state, positions, caches, add_rows(table))
            decoder = ends_of(ends)
            logits = decoder.next_logits(hidden, last)
            scores = scores_of(decoder, hidden, targets, top)
        rows = jnp.arange(state.hidden.shape[0])
        return sample(logits, positions[rows, last] + 1, sampling), logits, caches, scores

    return Programs(embed, attend_and_route, finish, score)
