"""The dense parts of a step: on the device, wherever experts are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.models.layers import PAD_POSITION, KVCache
from layerscope_jax.offload.bank import device_sharding
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts
from layerscope_jax.prediction.forecasts import Forecasts, counted_rows
from layerscope_jax.runtime.programs import Between, programs
from layerscope_jax.runtime.runner import Stepped
from layerscope_jax.runtime.sampling import Sampling
from layerscope_jax.scheduling.plan import Phase
from layerscope_jax.support.interrupts import check


class StepInputs(NamedTuple):
    """What is the same in all layers of a step.

    Attributes:
        phase: "prefill" or "decode".
        active: [T] bool, which rows are tokens.
        positions: [B, S], on the device.
        counted: see `counted_rows`, on the device; None without a predictor in the programs.
    """

    phase: Phase
    active: np.ndarray
    positions: jax.Array
    counted: jax.Array | None


Layer = Callable[[int, StepInputs, Between, KVCache], tuple[Between, KVCache]]
"""Goes through one layer: its number, the step, what the layer before handed on, the cache, donated."""


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
        self._sharding = device_sharding(model.device)
        self._choices = config.experts_per_token
        self._no_weights: dict[int, jax.Array] = {}

    def through(
        self,
        layer: Layer,
        experts: DeviceExperts | SharedExperts,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[KVCache],
        sampling: Sampling | None,
    ) -> Stepped:
        """Goes through a step, and waits until its tokens are there, which the caller reads in any case.

        Args:
            layer: is called for each layer that has a cache; see `attend`.
            experts: have the rows of the layer before the first.
            tokens, positions, last, caches, sampling: as of `Runner.step`.
        """
        active, counted = (positions != PAD_POSITION).reshape(-1), None
        if self._forecasts.in_layer is not None:
            counted = counted_rows(active, last, tokens.shape[1])
        state, places, counted = self._begin(experts, tokens, positions, counted)
        step = StepInputs("decode" if tokens.shape[1] == 1 else "prefill", active, places, counted)
        caches = list(caches)
        for number in range(len(caches)):
            check()
            state, caches[number] = layer(number, step, state, caches[number])
        found, logits = self.programs.finish(self.ends, state, places, last, sampling, self.table)
        found.block_until_ready()
        return found, logits, caches

    def _begin(self, experts: DeviceExperts | SharedExperts, tokens: Any, *others: Any) -> tuple[Any, ...]:
        """What comes into the first layer: embeddings, no experts' rows yet; and `others`, on the device."""
        hidden, *others = self.programs.embed(self.ends, tokens, *others)
        total = tokens.size * self._choices
        outputs = experts.nothing(total, hidden.shape[-1], hidden.dtype)
        if total not in self._no_weights:
            zeros = jnp.zeros((tokens.size, self._choices), jnp.float32, device=self._sharding)
            self._no_weights = {total: zeros}
        return Between(hidden, outputs, self._no_weights[total]), *others

    def attend(
        self,
        layer: int,
        step: StepInputs,
        state: Between,
        cache: KVCache,
        looks_ahead: bool,
    ) -> tuple[Any, ...]:
        """Dispatches one layer but its experts, those of the layer before added up.

        Args:
            layer: its number.
            step: that it is of.
            state: what the layer before handed on.
            cache: of the layer; donated.
            looks_ahead: whether to forecast.

        Returns:
            hidden [B, S, D] without experts, inputs [T, D] of the experts, the chosen experts [T, K], their
            weights [T, K], the cache, and the tokens expected [W, E], if they are.
        """
        if looks_ahead:
            part, forecast = self.programs.attend_and_route, (*self._forecasts.inputs(layer), step.counted)
        else:
            part, forecast = self.attend_alone, (None, None, None)
        return part(self.layers[layer], state, step.positions, cache, *forecast, self.table)
