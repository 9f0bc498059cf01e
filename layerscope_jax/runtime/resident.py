"""Everything resident on a CPU: a decode step is one jitted function, with the bits of single layers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels import inside
from layerscope_jax.kernels.attention import our_loops
from layerscope_jax.kernels.combining import add_experts
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.layers import PAD_POSITION, KVCache
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.programs import dense_parts
from layerscope_jax.runtime.sampling import Sampling, sample
from layerscope_jax.support.errors import TransferError
from layerscope_jax.support.interrupts import check


class ResidentOnCpu(LayerByLayer):
    """As `LayerByLayer` for prefills, and where plans or demand are to be recorded.

    A prefill has so much arithmetic that Python between its layers does not count, and many shapes to
    compile.
    """

    mode = "decode"

    def __init__(self, model: Model, *others: Any):
        super().__init__(model, *others)
        inside = self.host_experts.inside
        assert inside is not None
        self.inside = inside
        self._experts = self.host_experts.everything()  # whose memory the tables name
        self._tables = [jax.device_put(inside.table_of(layer), model.device) for layer in self._experts]
        assert inside.target is not None
        self._decode = decode_program(model.config, model.bank.dtype, inside.target)

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[KVCache],
        sampling: Sampling | None,
    ) -> tuple[jax.Array, jax.Array, list[KVCache]]:
        self.inside.check_open()
        check()
        watched = self.record is not None or self.decoded is not None or self.tap is not None
        layers = self.model.config.num_layers
        if tokens.shape[1] > 1 or watched or len(caches) < layers:
            return super().step(tokens, positions, last, caches, sampling)
        if not self._settled:
            self.settle()
        self._settled = False
        began = time.perf_counter()
        try:
            found, logits, caches = self.decode(tokens, positions, last, caches, sampling)
            found.block_until_ready()
        except BaseException:
            with suppress(TransferError):  # then the next step tries again
                self.settle()
            raise
        self._settled = True
        self.meter.device_busy_s += time.perf_counter() - began
        self.steps += 1
        experts, assignments = self.inside.take_counts()
        self.meter.count_resident(layers, experts, assignments)
        stats, kernel = self.device_experts.stats, self.host_experts.cpu.kernel
        stats.count(experts, assignments, assignments)
        assert kernel is not None
        stats.by_kernel[kernel.name] += experts
        return found, logits, caches

    def settle(self) -> None:
        super().settle()
        self.inside.take_counts()  # of a step that nobody will count

    def decode(self, tokens: np.ndarray, *others: Any) -> tuple[jax.Array, jax.Array, list[KVCache]]:
        """The step alone: nothing is counted.

        Raises:
            ValueError: if the engine was closed.
        """
        self.inside.check_open()
        positions, last, caches, sampling = others
        return self._decode(
            self._layers,
            self._ends,
            self.table,
            self._tables,
            tokens,
            positions,
            last,
            list(caches),
            sampling,
        )


@functools.lru_cache(maxsize=16)
def decode_program(config: ModelConfig, dtype: np.dtype, target: str) -> Callable:
    """The jitted step; engines of models of one shape share it."""
    layer_of, ends_of = dense_parts(config, dtype)

    @functools.partial(jax.jit, donate_argnames="caches")
    def run(
        layers: Sequence[Any],
        ends: Any,
        table: jax.Array,
        tables: Sequence[jax.Array],
        tokens: jax.Array,
        positions: jax.Array,
        last: jax.Array,
        caches: list[KVCache],
        sampling: Sampling | None,
    ) -> tuple[jax.Array, jax.Array, list[KVCache]]:
        decoder = ends_of(ends)
        hidden, active = decoder.embed(tokens), (positions != PAD_POSITION).reshape(-1)
        choices = (len(tokens), config.experts_per_token)
        # As one layer a program begins: with no experts' rows yet.
        rows = jnp.zeros((choices[0] * choices[1], hidden.shape[-1]), hidden.dtype)
        weights = jnp.zeros(choices, jnp.float32)
        found = []
        with our_loops(table):
            for params, lies, cache in zip(layers, tables, caches, strict=True):
                hidden = add_experts(hidden, rows, weights, table)
                hidden, inputs, routing, cache = layer_of(params).attend_and_route(hidden, positions, cache)
                with jax.named_scope("experts"):
                    rows = inside.rows(target, inputs, routing.experts, active, lies)
                weights = routing.weights
                found.append(cache)
            hidden = add_experts(hidden, rows, weights, table)
            logits = decoder.next_logits(hidden, last)
        return sample(logits, positions[np.arange(len(tokens)), last] + 1, sampling), logits, found

    return run
