"""The dense parts of a step: on the device, wherever experts are computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.models.layers import KVCache
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.runtime.programs import Between, programs
from layerscope_jax.runtime.sampling import Sampling


class DenseParts:
    """Dispatches embeddings, attention with router and forecast, and logits, each as one program.

    Args:
        model: the model.
        forecasts: what looks ahead within the program of attention and router.
        inside: with which dense products and attention go by our own loops; None where they are XLA's.

    Attributes:
        layers, ends: parameters of each layer, and of what is before the first and after the last.
        table: what `inside` is told by.
        programs: with the forecast.
        attend_alone: a layer's program without it.
    """

    def __init__(self, model: Model, forecasts: Forecasts, inside: Inside | None):
        config, dtype = model.config, model.bank.dtype
        self.layers = [model.dense["layers"][index] for index in range(config.num_layers)]
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
        cache: KVCache,
        counted: jax.Array | None,
        looks_ahead: bool,
    ) -> tuple[Any, ...]:
        """One layer but its experts, those of the layer before added up.

        Args:
            layer: its number.
            state: what the layer before handed on.
            positions: [B, S].
            cache: of the layer; donated.
            counted: see `counted_rows`; None without a predictor in the program.
            looks_ahead: whether to forecast.

        Returns:
            hidden [B, S, D] without experts, inputs [T, D] of the experts, the chosen experts [T, K], their
            weights [T, K], the cache, and the tokens expected [W, E], if they are.
        """
        if looks_ahead:
            part, forecast = self.programs.attend_and_route, (*self._forecasts.inputs(layer), counted)
        else:
            part, forecast = self.attend_alone, (None, None, None)
        return part(self.layers[layer], state, positions, cache, *forecast, self.table)

    def finish(
        self, state: Between, positions: jax.Array, last: np.ndarray, sampling: Sampling | None
    ) -> tuple[jax.Array, jax.Array]:
        """The next tokens [B] and logits [B, V]."""
        return self.programs.finish(self.ends, state, positions, last, sampling, self.table)
