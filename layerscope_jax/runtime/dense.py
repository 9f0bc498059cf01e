"""Dense parts of a step, which always run on the device: embeddings, attention, routers and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.models.decoder import Between
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.prediction.forecasts import Forecasts, counted_rows
from layerscope_jax.runtime.programs import Layers, programs
from layerscope_jax.runtime.runner import Stepped
from layerscope_jax.runtime.sampling import Sampling
from layerscope_jax.runtime.scoring import Scores
from layerscope_jax.scheduling.plan import Phase
from layerscope_jax.support.interrupts import check


class StepInputs(NamedTuple):
    """Inputs that are the same in all layers of a step.

    Attributes:
        phase: "prefill" or "decode".
        active: [T] bool, which rows are tokens and not padding.
        positions: [B, S] positions, on the device.
        counted: see `counted_rows`, on the device; None without a predictor in the programs.
    """

    phase: Phase
    active: np.ndarray
    positions: jax.Array
    counted: jax.Array | None


Layer = Callable[[int, StepInputs, Between, list[Any]], tuple[Between, list[Any]]]
"""Function that runs one MoE layer and the dense layers before it: `(number, step inputs, state from the
previous MoE layer, caches of these layers)`; the caches are donated."""

NO_LAYERS = Layers((), [])


class DenseParts:
    """Dispatches the dense parts as programs: embeddings, attention with router and forecast, and logits.

    Args:
        model: the model.
        forecasts: makes forecasts within the program of attention and router.
        inside: runs dense products and attention in this package's kernels; None to leave them to XLA.
        exact: whether no row of a program may depend on another.

    Attributes:
        spans: for each MoE layer, the decoder layers from after the previous MoE layer up to this one.
        layers, ends: parameters of each span, and of the parts before the first layer and after the last.
        tail: parameters of the dense layers after the last MoE layer.
        table: table of addresses that `inside` needs; None without it.
        programs: programs with the forecast.
        attend_alone: program of a layer without the forecast.
        reads: what the host reads of a layer in one array: "routing", or the "inputs" of its experts too;
            None where it reads each array where it lies.
    """

    def __init__(self, model: Model, forecasts: Forecasts, inside: Inside | None, exact: bool = False):
        config, dtype = model.config, model.bank.dtype
        self.spans = [slice(span.start, span.stop) for span in config.spans]
        self.layers = [Layers.of(model, span) for span in config.spans]
        self.tail = Layers.of(model, config.tail)
        self._num_layers, self._behind = config.num_layers, slice(config.tail.start, config.tail.stop)
        mesh = None if model.partition is None else model.partition.mesh
        ends = {key: value for key, value in model.dense.items() if key != "layers"}
        # Committed to the device, without a copy, as all that a layer gets from the one before: otherwise the
        # first layer's program would be compiled apart from that of the others.
        self.ends = model.put(ends)
        self.table = None if inside is None else model.put(inside.table)
        self.programs = programs(config, dtype, forecasts.in_layer, exact, mesh)
        self.attend_alone = programs(config, dtype, None, exact, mesh).attend_and_route
        self.reads: Literal["routing", "inputs"] | None = None
        self._forecasts, self._put = forecasts, model.put
        self._choices = config.experts_per_token
        self._no_weights: dict[int, jax.Array] = {}

    def through(
        self,
        layer: Layer,
        nothing: Callable[[int, int, np.dtype], Any],
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
        scored: tuple[np.ndarray, int] | None = None,
    ) -> tuple[Stepped, Scores | None]:
        """Runs a step, and waits for its tokens, which the caller reads next anyway.

        Args:
            layer: function called for each MoE layer that has caches; see `attend`.
            nothing: returns the experts' rows before the first layer; see `DeviceExperts.nothing`.
            tokens, positions, last, caches, sampling: as in `Runner.step`.
            scored: targets and number of likeliest tokens, as in `Runner.score`; None to score nothing.
        """
        active, counted = (positions != PAD_POSITION).reshape(-1), None
        if self._forecasts.in_layer is not None:
            counted = counted_rows(active, last, tokens.shape[1])
        state, places, counted = self._begin(nothing, tokens, positions, counted)
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
        inputs, scores = (self.ends, state, places, last, sampling, tail, caches[behind], self.table), None
        if scored is None:
            next_tokens, logits, caches[behind] = self.programs.finish(*inputs)
        else:
            next_tokens, logits, caches[behind], scores = self.programs.score(*inputs, *scored)
        next_tokens.block_until_ready()
        return (next_tokens, logits, caches), scores

    def _begin(self, nothing: Callable, tokens: Any, *others: Any) -> tuple[Any, ...]:
        """Returns the first layer's input, embeddings without experts' rows, and `others` on the device."""
        hidden, *others = self.programs.embed(self.ends, tokens, *others)
        total = tokens.size * self._choices
        outputs = nothing(total, hidden.shape[-1], hidden.dtype)
        if total not in self._no_weights:
            zeros = np.zeros((tokens.size, self._choices), np.float32)
            self._no_weights = {total: self._put(zeros)}
        return Between(hidden, outputs, self._no_weights[total]), *others

    def attend(
        self,
        layer: int,
        step: StepInputs,
        state: Between,
        caches: list[Any],
        looks_ahead: bool,
    ) -> tuple[Any, ...]:
        """Dispatches a MoE layer without its experts, after adding up the previous MoE layer's experts.

        Args:
            layer: number of the MoE layer; the dense layers before it are run too.
            step: inputs of the step.
            state: state from the previous MoE layer.
            caches: caches of these layers; donated.
            looks_ahead: whether to compute a forecast.

        Returns:
            hidden [B, S, D] without experts, inputs [T, D] of the experts, the chosen experts [T, K], their
            weights [T, K], the caches, the expected tokens [W, E] (None without a forecast), and what the
            host reads in one array (see `reads`).
        """
        if looks_ahead:
            part, forecast = self.programs.attend_and_route, (*self._forecasts.inputs(layer), step.counted)
        else:
            part, forecast = self.attend_alone, (None, None, None)
        places = step.positions
        return part(self.layers[layer], state, places, caches, *forecast, self.table, self.reads)
