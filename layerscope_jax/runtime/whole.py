"""Everything resident: one step of the whole model as one jitted function."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.runtime.sampling import Sampling, sample
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.support.interrupts import check


class WholeModel:
    """Runs steps of a model whose experts are all on the device, stacked."""

    mode = "whole"

    def __init__(self, model: Model):
        self.model = model
        self.meter = Meter()
        self.account: Any = None
        graphdef, variables = nnx.split(model.whole())
        self.params = nnx.to_pure_dict(variables)
        self.run = program(graphdef)

    @staticmethod
    def is_faster_on(device: jax.Device) -> bool:
        """Whether a step is faster so than layer by layer: not on a CPU.

        There our own loops compute experts where they lie, and nothing is copied to be stacked (`resident`,
        `benchmarks/bench_resident.py`).
        """
        return device.platform != "cpu"

    def step(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        last: jax.Array,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> tuple[jax.Array, jax.Array, list[Any]]:
        """One forward pass; see `LayerByLayer.step`."""
        check()
        began = time.perf_counter()
        found = self.run(self.params, tokens, positions, last, caches, sampling)
        found[0].block_until_ready()
        self.meter.device_busy_s += time.perf_counter() - began
        return found


@functools.lru_cache(maxsize=16)
def program(graphdef: nnx.GraphDef) -> Callable:
    """The jitted step; engines of models of one shape share it."""

    @functools.partial(jax.jit, donate_argnames="caches")
    def run(params, tokens, positions, last, caches, sampling):
        decoder: Decoder = nnx.merge(graphdef, params)
        hidden, _, caches = decoder.run(decoder.embed(tokens), positions, caches)
        rows = jnp.arange(tokens.shape[0])
        logits = decoder.next_logits(hidden, last)
        return sample(logits, positions[rows, last] + 1, sampling), logits, caches

    return run
