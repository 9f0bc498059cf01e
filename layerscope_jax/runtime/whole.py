"""All experts resident: a step of the whole model as one jitted function."""

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
from layerscope_jax.runtime.runner import RunnerStats, Scored, Stepped
from layerscope_jax.runtime.sampling import Sampling, sample
from layerscope_jax.runtime.scoring import scores_of
from layerscope_jax.scheduling.baselines import Resident
from layerscope_jax.support.interrupts import check


class WholeModel:
    """A `Runner` of a model whose experts are all on the device, stacked.

    Attributes:
        account: account of the call that is counted for; at first of no call.
    """

    mode = "whole"
    costs = None

    def __init__(self, model: Model):
        self.model, self.policy = model, Resident()
        self.account = Account()
        graphdef, variables = nnx.split(model.whole())
        self.params = nnx.to_pure_dict(variables)
        self.run, self._scoring = program(graphdef), scoring_program(graphdef)

    @property
    def resident_experts(self) -> int:
        """Number of experts on the device: all of them."""
        return self.model.config.num_moe_layers * self.model.config.num_experts

    @staticmethod
    def is_faster_on(device: jax.Device) -> bool:
        """Whether this is faster than layer by layer on a device; false for CPUs.

        On a CPU this package's kernels compute experts in place, without copying them into stacks
        (`resident`, `benchmarks/bench_resident.py`).
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
        """Runs one forward pass; see `Runner.step`."""
        return self._counted(self.run, tokens, positions, last, caches, sampling)

    def score(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
        targets: np.ndarray,
        top: int,
    ) -> Scored:
        """Runs a prefill step and scores tokens; see `Runner.score`."""
        *stepped, scores = self._counted(
            self._scoring, tokens, positions, last, caches, sampling, targets, top
        )
        return tuple(stepped), scores

    def _counted(self, run: Callable, tokens: np.ndarray, *others: Any) -> Any:
        """Runs and counts one forward pass of a program."""
        check()
        began = time.perf_counter()
        stepped = run(self.params, tokens, *others)
        stepped[0].block_until_ready()
        now, account = time.perf_counter(), self.account
        account.meter.device_busy_s += now - began
        if account.timeline is not None:
            account.timeline.whole_step(account.steps, tokens.shape[1], began, now)
        account.steps += 1
        return stepped

    def reset(self, account: Account | None) -> None:
        """Starts to count for a call; see `Runner.reset`."""
        self.account = account or Account()

    def stats(self, account: Account) -> RunnerStats:
        """Returns the statistics of a call; see `Runner.stats`."""
        bank = self.model.bank
        return RunnerStats(
            policy=self.policy.name,
            mode=self.mode,
            format=bank.format.name,
            dense_kernels=dense_kernels(
                self.model.config.hidden_size,
                bank.dtype,
                False,
                self.model.config.latent is not None,
                self.model.dense_format,
                self.model.config.delta,
            ),
            dense_format=self.model.dense_format or bank.dtype.name,
            dense_bytes=self.model.dense_bytes,
            peak_expert_bytes=bank.total_bytes,
        )

    def rehearsal(self) -> WholeModel:
        """Returns a runner of the same program that counts for no call; see `Runner.rehearsal`."""
        other = copy.copy(self)
        other.account = Account()
        return other

    def settle_if_needed(self) -> None:
        """Does nothing: a step reads arrays alone, which JAX keeps for it."""

    def close(self) -> None:
        """Lets go of the device's memory; there are no threads."""
        self.params = {}


@functools.lru_cache(maxsize=16)
def program(graphdef: nnx.GraphDef) -> Callable:
    """Returns the jitted step, which engines of models of one shape share."""

    @functools.partial(jax.jit, donate_argnames="caches")
    def run(params, tokens, positions, last, caches, sampling):
        decoder: Decoder = nnx.merge(graphdef, params)
        hidden, _, caches = decoder.run(decoder.embed(tokens), positions, caches)
        rows = jnp.arange(tokens.shape[0])
        logits = decoder.next_logits(hidden, last)
        return sample(logits, positions[rows, last] + 1, sampling), logits, caches

    return run


@functools.lru_cache(maxsize=16)
def scoring_program(graphdef: nnx.GraphDef) -> Callable:
    """Returns the jitted step that scores tokens too."""

    @functools.partial(jax.jit, donate_argnames="caches", static_argnames="top")
    def run(params, tokens, positions, last, caches, sampling, targets, top):
        decoder: Decoder = nnx.merge(graphdef, params)
        hidden, _, caches = decoder.run(decoder.embed(tokens), positions, caches)
        rows = jnp.arange(tokens.shape[0])
        logits = decoder.next_logits(hidden, last)
        scores = scores_of(decoder, hidden, targets, top)
        return sample(logits, positions[rows, last] + 1, sampling), logits, caches, scores

    return run
