"""The interface through which an engine runs a model's steps (`Runner`), however they are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from layerscope_jax.runtime.sampling import Sampling
from layerscope_jax.runtime.scoring import Scores
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.policy import PolicyBase

if TYPE_CHECKING:
    from layerscope_jax.runtime.accounts import Account

Stepped = tuple[jax.Array, jax.Array, list[Any]]
"""Result of a step: the next tokens [B], logits [B, V] in float32, caches with the new keys and values."""

Scored = tuple[Stepped, Scores]
"""Result of a step that scores tokens too."""


@dataclass(frozen=True, kw_only=True)
class RunnerStats:
    """The runner's part of a call's statistics.

    Attributes:
        policy, mode, format, dense_format, dense_bytes, dense_kernels, predictor, ways: as in `RunStats`.
        peak_expert_bytes, predictor_bytes: as in `RunStats`.
        least_decode_s: lower bound (seconds) on the time of the call's decode steps under any policy, by the
            machine's costs; None if the call's account did not ask for it, or no costs are known.
        expert_bytes: size (bytes) of an expert.
    """

    policy: str
    mode: str
    format: str
    dense_kernels: dict[str, str]
    peak_expert_bytes: int
    dense_format: str = ""
    dense_bytes: int = 0
    predictor: str | None = None
    predictor_bytes: int = 0
    ways: dict[str, dict[str, float]] | None = None
    least_decode_s: float | None = None
    expert_bytes: int = 0


class Runner(Protocol):
    """Runs the steps of one model, one step at a time; only one thread may call it at a time.

    After a step that failed or was interrupted at any point, all threads of the runner are idle and its
    queues are empty, or the next step begins by making them so; only time is lost.

    Attributes:
        policy: the policy that plans each layer; `Resident` if there is nothing to decide.
        costs: costs of the machine, used by the policy and for `RunnerStats.least_decode_s`; None if they are
            not known.
        resident_experts: number of experts on the device now; any thread may ask.
    """

    @property
    def policy(self) -> PolicyBase: ...

    @property
    def costs(self) -> HardwareProfile | None: ...

    @property
    def resident_experts(self) -> int: ...

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        """Runs one forward pass: prefill (S > 1) or decode (S = 1).

        Args:
            tokens: [B, S] int32.
            positions: [B, S] int32; `PAD_POSITION` marks padding and finished requests, which are routed to
                no expert.
            last: [B] index along S of the token whose successor is predicted.
            caches: one per decoder layer; donated.
            sampling: how the next tokens are picked; None for greedy.

        Returns:
            The next tokens [B], logits [B, V] in float32, and the caches with the new keys and values.

        Raises:
            TransferError: if an expert that is needed on the device could not be copied there.
            ValueError: if the policy's plan is invalid (see `check_plan`), or the runner was closed.
                Exceptions that the policy raises pass through.
        """

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
        """Runs a prefill step as `step` does, and scores the tokens that follow.

        Args:
            tokens, positions, last, caches, sampling: as of `step`.
            targets: [B, S] int32, the token that follows each; any where there is none.
            top: number of likeliest tokens to report beside each of them.
        """

    def reset(self, account: Account | None) -> None:
        """Counts and records for one call from now on, and stores the counts of the call before.

        Calls that overlap take turns step by step, so a call may be counted for again after others. Copies
        between two steps are counted for the call of the first step.

        Args:
            account: account of the call; None to count for no call, after a call has ended.
        """

    def stats(self, account: Account) -> RunnerStats:
        """Returns the statistics of what the runner did for a call."""

    def rehearsal(self) -> Runner:
        """Returns a runner whose steps compile what this runner's steps will need, and change nothing else.

        It need not be closed, and its tokens are meaningless. A runner that has several ways of decode steps
        may lose its resident experts, which only costs time.
        """

    def settle_if_needed(self) -> None:
        """Waits for what an interrupted step has left behind, if anything.

        Raises:
            TransferError: if a copy does not end.
        """

    def close(self) -> None:
        """Ends the runner's threads and lets go of the experts on the device; it runs no more steps.

        It may be called again, as after an interrupt.

        Raises:
            BaseException: the first exception raised while ending a part of the runner; all other parts are
                ended too.
        """
