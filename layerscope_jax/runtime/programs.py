"""The jitted parts of a step that goes layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layerscope_jax.kernels.attention import our_loops
from layerscope_jax.kernels.combining import add_experts
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder import Decoder, DecoderLayer
from layerscope_jax.prediction.forecasts import expected_tokens
from layerscope_jax.prediction.predictors import Predictor
from layerscope_jax.runtime.sampling import sample


class Between(NamedTuple):
    """What one layer hands to the next, which adds it up: so the sum is no dispatch of its own.

    Attributes:
        hidden: [B, S, D] the residual stream without the experts.
        outputs: [T * K + 1, D] unweighted rows of their outputs, the last of no meaning.
        weights: [T, K] of the router, float32.
    """

    hidden: jax.Array
    outputs: jax.Array | np.ndarray
    weights: jax.Array


class Programs(NamedTuple):
    """The jitted parts of a step."""

    embed: Callable
    attend_and_route: Callable
    finish: Callable


def dense_parts(config: ModelConfig, dtype: np.dtype) -> tuple[Callable, Callable]:
    """From their parameters: the dense part of a layer, and a decoder without layers."""
    layer = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0), dtype=dtype))
    layer_graph, _ = nnx.split(layer)
    hollow = nnx.eval_shape(lambda: Decoder(replace(config, num_layers=0), rngs=nnx.Rngs(0), dtype=dtype))
    ends_graph, ends_state = nnx.split(hollow)
    empty: dict[str, Any] = {key: {} for key in ("layers", "experts") if key in nnx.to_pure_dict(ends_state)}
    return (
        lambda params: nnx.merge(layer_graph, params),
        lambda params: nnx.merge(ends_graph, params | empty),
    )


@functools.lru_cache(maxsize=16)
def programs(config: ModelConfig, dtype: np.dtype, predictor: Predictor | None) -> Programs:
    """Embed; add the experts of the layer before, attend, route and forecast; add the last ones and finish.

    Every layer shares them, and so do all engines of models of one shape: another policy or budget compiles
    nothing anew.
    """
    layer_of, ends_of = dense_parts(config, dtype)

    @jax.jit
    def embed(ends, tokens, *others):
        # Whatever all layers read comes along: a copy to the device of its own takes as long as this does.
        return ends_of(ends).embed(tokens), *others

    @functools.partial(jax.jit, donate_argnames="cache")
    def attend_and_route(layer, state, positions, cache, forecast_params, number, counted, table=None):
        hidden = add_experts(state.hidden, state.outputs, state.weights, table)
        with our_loops(table):
            hidden, inputs, routing, cache = layer_of(layer).attend_and_route(hidden, positions, cache)
        expected = None
        if predictor is not None:
            with jax.named_scope("forecast"):
                # Behind a barrier nothing of it is fused with the layer, whose bits must not change by it.
                known = jax.lax.optimization_barrier((inputs, routing.experts, routing.weights))
                probabilities = predictor.predict(forecast_params, *known)
                expected = expected_tokens(probabilities, counted, number, config.num_layers)
        return hidden, inputs, routing.experts, routing.weights, cache, expected

    @jax.jit
    def finish(ends, state, positions, last, sampling, table=None):
        hidden = add_experts(state.hidden, state.outputs, state.weights, table)
        rows = jnp.arange(hidden.shape[0])
        with our_loops(table):
            logits = ends_of(ends).next_logits(hidden, last)
        return sample(logits, positions[rows, last] + 1, sampling), logits

    return Programs(embed, attend_and_route, finish)
