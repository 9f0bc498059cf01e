"""The dense parts of a step: on the device, wherever experts are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.models.decoder import Between
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.offload.bank import device_sharding
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts
from layerscope_jax.prediction.forecasts import Forecasts, counted_rows
from layerscope_jax.runtime.programs import Layers, programs
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


Layer = Callable[[int, StepInputs, Between, list[Any]], tuple[Between, list[Any]]]
"""Goes through one MoE layer and the dense ones on the way to it: its number, the step, what the MoE
layer before handed on, the caches of these layers, donated."""

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
        self.spans = [slice(span.start, span.stop) for span in config.spans]
        self.layers = [Layers.of(model, span) for span in config.spans]
        self.tail = Layers.of(model, config.tail)
        self._num_layers, self._behind = config.num_layers, slice(config.tail.start, config.tail.stop)
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
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        """Goes through a step, and waits until its tokens are there, which the caller reads in any case.

        Args:
            layer: is called for each MoE layer whose caches are there; see `attend`.
            experts: have the rows of the layer before the first.
            tokens, positions, last, caches, sampling: as of `Runner.step`.
        """
        active, counted = (positions != PAD_POSITION).reshape(-1), None
        if self._forecasts.in_layer is not None:
            counted = counted_rows(active, last, tokens.shape[1])
        state, places, counted = self._begin(experts, tokens, positions, counted)
        step = StepInputs("decode" if tokens.shape[1] == 1 else "prefill", active, places, counted)
        caches = list(caches)
        for number, span in enumerate(self.spans):
            if span.stop > len(caches):
                break
            check()
            state, caches[span] = layer(number, step, state, caches[span])
        tail, behind = self.tail, self._behind
        if len(caches) < self._num_layers:
            tail, behind = NO_LAYERS, slice(0, 0)
        found, logits, caches[behind] = self.programs.finish(
            self.ends, state, places, last, sampling, tail, caches[behind], self.table
        )
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
        caches: list[Any],
        looks_ahead: bool,
    ) -> tuple[Any, ...]:
        """Dispatches a MoE layer but its experts, those of the one before added up, and dense ones before it.

        Args:
            layer: number of the MoE layer.
            step: that it is of.
            state: what the layer before handed on.
            caches: of these layers; donated.
            looks_ahead: whether to forecast.

        Returns:
            hidden [B, S, D] without experts, inputs [T, D] of the experts, the chosen experts [T, K], their
            weights [T, K], the caches, and the tokens expected [W, E], if they are.
        """
        if looks_ahead:
            part, forecast = self.programs.attend_and_route, (*self._forecasts.inputs(layer), step.counted)
        else:
            part, forecast = self.attend_alone, (None, None, None)
        return part(self.layers[layer], state, step.positions, caches, *forecast, self.table)
