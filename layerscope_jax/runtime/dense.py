"""The dense parts of a step: on the device, wherever experts are computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.models.decoder import Between
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.runtime.programs import Layers, programs
from layerscope_jax.runtime.sampling import Sampling

NO_LAYERS = Layers((), [])


class DenseParts:
    """Dispatches embeddings, attention with router and forecast, and logits, each as one program.

    Args:
        model: the model.
        forecasts: what looks ahead within the program of attention and router.
        inside: with which dense products and attention go by our own loops; None where they are XLA's.

    Attributes:
        spans: by MoE layer, the decoder layers that end with it: dense ones on the way, and it.
        layers, ends: parameters of each span, and of what is before the first layer and after the last.
        tail: parameters of the dense layers behind the last MoE layer.
        table: what `inside` is told by.
        programs: with the forecast.
        attend_alone: a layer's program without it.
    """

    def __init__(self, model: Model, forecasts: Forecasts, inside: Inside | None):
        config, dtype = model.config, model.bank.dtype
        self.spans, self._tail = config.spans, config.tail
        self._num_layers = config.num_layers
        self.layers = [Layers.of(model, span) for span in self.spans]
        self.tail = Layers.of(model, self._tail)
        self.ends = {key: value for key, value in model.dense.items() if key != "layers"}
        self.table = None if inside is None else jax.device_put(inside.table, model.device)
        self.programs = programs(config, dtype, forecasts.in_layer)
        self.attend_alone = programs(config, dtype, None).attend_and_route
        self._forecasts = forecasts
        self._device = model.device
        self._choices = config.experts_per_token
        self._no_weights: dict[int, jax.Array] = {}

    def begin(self, experts: DeviceExperts | SharedExperts, tokens: Any, *others: Any) -> tuple[Any, ...]:
        """What comes into the first layer: embeddings, no experts' rows yet; and `others`, on the device."""
        hidden, *others = self.programs.embed(self.ends, tokens, *others)
        total = tokens.size * self._choices
        outputs = experts.nothing(total, hidden.shape[-1], hidden.dtype)
        if total not in self._no_weights:
            zeros = jnp.zeros((tokens.size, self._choices), jnp.float32, device=self._device)
            self._no_weights = {total: zeros}
        return Between(hidden, outputs, self._no_weights[total]), *others

    def attend(
        self,
        layer: int,
        state: Between,
        positions: jax.Array,
        caches: list[Any],
        counted: jax.Array | None,
        looks_ahead: bool,
    ) -> tuple[Any, ...]:
        """One MoE layer but its experts, those of the layer before added up, and dense ones on the way to it.

        Args:
            layer: number of the MoE layer.
            state: what the layer before handed on.
            positions: [B, S].
            caches: of every decoder layer; those of the span are donated and replaced.
            counted: see `counted_rows`; None without a predictor in the program.
            looks_ahead: whether to forecast.

        Returns:
            hidden [B, S, D] without experts, inputs [T, D] of the experts, the chosen experts [T, K], their
            weights [T, K], and the tokens expected [W, E], if they are.
        """
        if looks_ahead:
            part, forecast = self.programs.attend_and_route, (*self._forecasts.inputs(layer), counted)
        else:
            part, forecast = self.attend_alone, (None, None, None)
        span = slice(self.spans[layer].start, self.spans[layer].stop)
        hidden, inputs, experts, weights, caches[span], expected = part(
            self.layers[layer], state, positions, caches[span], *forecast, self.table
        )
        return hidden, inputs, experts, weights, expected

    def within(self, caches: list[Any]) -> range:
        """MoE layers that a step with so many caches goes through: all, or the first ones, to be timed."""
        return range(sum(span.stop <= len(caches) for span in self.spans))

    def finish(
        self,
        state: Between,
        positions: jax.Array,
        last: np.ndarray,
        sampling: Sampling | None,
        caches: list[Any],
    ) -> tuple[jax.Array, jax.Array]:
        """The dense layers behind the last MoE layer, then the next tokens [B] and logits [B, V].

        Args:
            state: what the last MoE layer handed on.
            positions, last, sampling: as of `Runner.step`.
            caches: of every decoder layer; those of these layers are donated and replaced.
        """
        tail, rest = self.tail, slice(self._tail.start, self._tail.stop)
        if len(caches) < self._num_layers:
            tail, rest = NO_LAYERS, slice(0, 0)
        tokens, logits, caches[rest] = self.programs.finish(
            self.ends, state, positions, last, sampling, tail, caches[rest], self.table
        )
        return tokens, logits
