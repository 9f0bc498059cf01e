"""All experts resident on a CPU: a decode step is one jitted function, bit-identical to single layers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels import inside
from layerscope_jax.kernels.dense import our_loops
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder import through
from layerscope_jax.models.invariance import invariant
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.models.router import Routing
from layerscope_jax.runtime.exactness import options
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.programs import Layers, add_rows, before_layers, dense_parts
from layerscope_jax.runtime.runner import Stepped
from layerscope_jax.runtime.sampling import Sampling, sample
from layerscope_jax.runtime.warmup import Rehearsal
from layerscope_jax.support.interrupts import check


class DecodeRehearsal(Rehearsal):
    """`Rehearsal` for prefills; decode steps are run as usual, but not counted."""

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
            stepped = self.runner.decode(tokens, positions, last, caches, sampling)
            stepped[0].block_until_ready()
        except BaseException:
            self.settle()
            raise
        finally:
            self.runner.inside.take_counts()
        return stepped


class ResidentOnCpu(LayerByLayer):
    """Runs decode steps as one jitted function; prefills, and recorded steps, as `LayerByLayer` does.

    A prefill has so much arithmetic that Python between its layers does not matter, and its many shapes would
    all be compiled.
    """

    mode = "decode"
    rehearsed_by = DecodeRehearsal

    def __init__(self, model: Model, *others: Any, exact: bool = False):
        super().__init__(model, *others, exact=exact)
        inside = self.host_experts.inside
        assert inside is not None
        self.inside = inside
        self._layers = Layers.of(model, range(model.config.num_layers))
        self._experts = self.host_experts.everything()  # own the memory in the tables
        self._tables = [jax.device_put(inside.table_of(layer), model.device) for layer in self._experts]
        assert inside.target is not None
        self._decode = decode_program(model.config, model.bank.dtype, inside.target, exact)

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
        if not self.is_whole_decode(tokens, caches):
            return super().step(tokens, positions, last, caches, sampling)
        with self.settled_after():
            began = time.perf_counter()
            next_tokens, logits, caches = self.decode(tokens, positions, last, caches, sampling)
            next_tokens.block_until_ready()
        now = time.perf_counter()
        account.meter.device_busy_s += now - began
        if account.timeline is not None:
            account.timeline.whole_step(account.steps, tokens.shape[1], began, now)
        account.steps += 1
        experts, assignments = self.inside.take_counts()
        account.meter.count_resident(config.num_moe_layers, experts, assignments)
        stats, kernel = self.device_experts.stats, self.host_experts.cpu.kernel
        stats.count(experts, assignments, assignments)
        assert kernel is not None
        stats.by_kernel[kernel.name] += experts
        return next_tokens, logits, caches

    def settle(self) -> None:
        super().settle()
        self.inside.take_counts()  # counts of the failed step are dropped

    def decode(self, tokens: np.ndarray, *others: Any) -> Stepped:
        """Runs a decode step without counting it.

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
def decode_program(config: ModelConfig, dtype: np.dtype, target: str, exact: bool = False) -> Callable:
    """Returns the jitted step, which engines of models of one shape share; see `programs` on `exact`."""
    layers_of, ends_of = dense_parts(config, dtype)

    @functools.partial(jax.jit, donate_argnames="caches", compiler_options=options() if exact else None)
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
        decoder, active = ends_of(ends), (positions != PAD_POSITION).reshape(-1)
        state = before_layers(config, decoder.embed(tokens))

        def experts(number: int, inputs: jax.Array, routing: Routing) -> jax.Array:
            return inside.rows(target, inputs, routing.experts, active, tables[number])

        with our_loops(table), invariant(exact):
            hidden, _, caches = through(
                config, layers_of(layers), state, positions, caches, experts, add_rows(table)
            )
            logits = decoder.next_logits(hidden, last)
        return sample(logits, positions[np.arange(len(tokens)), last] + 1, sampling), logits, caches

    return run
