"""Everything resident: one step of the whole model as one jitted function."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.kernels.dense import dense_kernels
from layerscope_jax.models.decoder import Decoder
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.runner import RunnerStats, Stepped
from layerscope_jax.runtime.sampling import Sampling, sample
from layerscope_jax.scheduling.baselines import Resident
from layerscope_jax.support.interrupts import check


class WholeModel:
    """A `Runner` of a model whose experts are all on the device, stacked.

    Attributes:
        account: of the call that it counts for; nobody's at first.
    """

    mode = "whole"
    costs = None

    def __init__(self, model: Model):
        self.model, self.policy = model, Resident()
        self.account = Account()
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
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        """One forward pass; see `Runner.step`."""
        check()
        began = time.perf_counter()
        found = self.run(self.params, tokens, positions, last, caches, sampling)
        found[0].block_until_ready()
        self.account.meter.device_busy_s += time.perf_counter() - began
        return found

    def reset(self, account: Account | None) -> None:
        """Counts for one call from now on; see `Runner.reset`."""
        self.account = account or Account()

    def stats(self, account: Account) -> RunnerStats:
        """What it did for a call; see `Runner.stats`."""
        bank = self.model.bank
        return RunnerStats(
            policy=self.policy.name,
            mode=self.mode,
            format=bank.format.name,
            dense_kernels=dense_kernels(
                self.model.config.hidden_size, bank.dtype, False, self.model.config.latent is not None
            ),
            peak_expert_bytes=bank.total_bytes,
        )

    def rehearsal(self) -> WholeModel:
        """One that counts for nobody: its steps compile this one's; see `Runner.rehearsal`."""
        other = copy.copy(self)
        other.account = Account()
        return other

    def close(self) -> None:
        """Nothing: it has no threads."""


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
