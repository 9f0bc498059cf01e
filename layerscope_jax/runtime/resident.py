"""Everything resident on a CPU: a decode step is one jitted function, with the bits of single layers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels import inside
from layerscope_jax.kernels.dense import our_loops
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder import Between, through
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.models.router import Routing
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.programs import Layers, add_rows, dense_parts
from layerscope_jax.runtime.runner import Stepped
from layerscope_jax.runtime.sampling import Sampling, sample
from layerscope_jax.runtime.warmup import Rehearsal
from layerscope_jax.support.interrupts import check


class DecodeRehearsal(Rehearsal):
    """As `Rehearsal` for prefills; decode steps are as they are, but for being counted."""

    runner: ResidentOnCpu

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        if tokens.shape[1] > 1:
            return super().step(tokens, positions, last, caches, sampling)
        self.runner.settle_if_needed()
        try:
            found = self.runner.decode(tokens, positions, last, caches, sampling)
            found[0].block_until_ready()
        except BaseException:
            self.settle()
            raise
        finally:
            self.runner.inside.take_counts()
        return found


class ResidentOnCpu(LayerByLayer):
    """As `LayerByLayer` for prefills, and where plans or demand are to be recorded.

    A prefill has so much arithmetic that Python between its layers does not count, and many shapes to
    compile.
    """

    mode = "decode"
    rehearsed_by = DecodeRehearsal

    def __init__(self, model: Model, *others: Any):
        super().__init__(model, *others)
        inside = self.host_experts.inside
        assert inside is not None
        self.inside = inside
        self._layers = Layers.of(model, range(model.config.num_layers))
        self._experts = self.host_experts.everything()  # whose memory the tables name
        self._tables = [jax.device_put(inside.table_of(layer), model.device) for layer in self._experts]
        assert inside.target is not None
        self._decode = decode_program(model.config, model.bank.dtype, inside.target)

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        self.inside.check_open()
        check()
        account, config = self.account, self.model.config
        whole = len(caches) == config.num_layers and self.tap is None
        if tokens.shape[1] > 1 or account.records or not whole:
            return super().step(tokens, positions, last, caches, sampling)
        with self.settled_after():
            began = time.perf_counter()
            found, logits, caches = self.decode(tokens, positions, last, caches, sampling)
            found.block_until_ready()
        account.meter.device_busy_s += time.perf_counter() - began
        account.steps += 1
        experts, assignments = self.inside.take_counts()
        account.meter.count_resident(config.num_moe_layers, experts, assignments)
        stats, kernel = self.device_experts.stats, self.host_experts.cpu.kernel
        stats.count(experts, assignments, assignments)
        assert kernel is not None
        stats.by_kernel[kernel.name] += experts
        return found, logits, caches

    def settle(self) -> None:
        super().settle()
        self.inside.take_counts()  # of a step that nobody will count

    def decode(self, tokens: np.ndarray, *others: Any) -> Stepped:
        """The step alone: nothing is counted.

        Raises:
            ValueError: if the engine was closed.
        """
        self.inside.check_open()
        positions, last, caches, sampling = others
        return self._decode(
            self._layers,
            self.dense.ends,
            self.dense.table,
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
    layers_of, ends_of = dense_parts(config, dtype)

    @functools.partial(jax.jit, donate_argnames="caches")
    def run(
        layers: Layers,
        ends: Any,
        table: jax.Array,
        tables: Sequence[jax.Array],
        tokens: jax.Array,
        positions: jax.Array,
        last: jax.Array,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> tuple[jax.Array, jax.Array, list[Any]]:
        decoder = ends_of(ends)
        hidden, active = decoder.embed(tokens), (positions != PAD_POSITION).reshape(-1)
        choices = (len(tokens), config.experts_per_token)
        # As one layer a program begins: with no experts' rows yet.
        rows = jnp.zeros((choices[0] * choices[1], hidden.shape[-1]), hidden.dtype)
        state = Between(hidden, rows, jnp.zeros(choices, jnp.float32))

        def experts(number: int, inputs: jax.Array, routing: Routing) -> jax.Array:
            return inside.rows(target, inputs, routing.experts, active, tables[number])

        with our_loops(table):
            hidden, _, found = through(
                config, layers_of(layers), state, positions, caches, experts, add_rows(table)
            )
            logits = decoder.next_logits(hidden, last)
        return sample(logits, positions[np.arange(len(tokens)), last] + 1, sampling), logits, found

    return run
