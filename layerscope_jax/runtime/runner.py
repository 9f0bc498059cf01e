"""What runs a model's steps, whichever way it goes: the face that an engine knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from layerscope_jax.runtime.sampling import Sampling
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.policy import PolicyBase

if TYPE_CHECKING:
    from layerscope_jax.runtime.accounts import Account

Stepped = tuple[jax.Array, jax.Array, list[Any]]
"""What a step gives: the next tokens [B], logits [B, V] in float32, caches with the new keys and values."""


@dataclass(frozen=True, kw_only=True)
class RunnerStats:
    """What the statistics of a call say of the runner that it went by; see `RunStats`.

    Attributes:
        policy, mode, format, dense_kernels, predictor, ways: as there.
        peak_expert_bytes, predictor_bytes: as there.
        least_decode_s: least time that the costs allow any policy for the call's decode steps; None if the
            call's account did not ask for it, or no costs are known.
    """

    policy: str
    mode: str
    format: str
    dense_kernels: dict[str, str]
    peak_expert_bytes: int
    predictor: str | None = None
    predictor_bytes: int = 0
    ways: dict[str, dict[str, float]] | None = None
    least_decode_s: float | None = None


class Runner(Protocol):
    """Runs the steps of one model, one at a time, by one thread at a time.

    After a step that failed or was interrupted, whatever it waited for, all of its threads are idle and its
    queues empty, or the next step begins with that; nothing but time is lost.

    Attributes:
        policy: what decides; `Resident` where nothing is left to decide.
        costs: of the machine, by which the policy decides and `RunnerStats.least_decode_s` is counted; None
            where none are known.
    """

    @property
    def policy(self) -> PolicyBase: ...

    @property
    def costs(self) -> HardwareProfile | None: ...

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        caches: list[Any],
        sampling: Sampling | None,
    ) -> Stepped:
        """One forward pass: prefill (S > 1) or decode (S = 1).

        Args:
            tokens: [B, S] int32.
            positions: [B, S] int32; `PAD_POSITION` marks padding and finished requests, which route nowhere.
            last: [B] index in S of the token whose successor is asked for.
            caches: one a decoder layer; donated.
            sampling: how the next tokens are picked, None for greedy.

        Raises:
            TransferError: if an expert that is needed on the device could not be copied there.
            ValueError: if the policy's plan is not one (see `check_plan`), or the runner was closed. What the
                policy raises passes through.
        """

    def reset(self, account: Account | None) -> None:
        """Counts and records for one call from now on, and puts aside what was counted for another.

        A call may be counted for again after others were: calls go on beside each other, step by step. What
        crosses the link between two steps is counted for whoever had the first.

        Args:
            account: of the call; None for nobody, where one has ended.
        """

    def stats(self, account: Account) -> RunnerStats:
        """What it did for a call."""

    def rehearsal(self) -> Runner:
        """A runner whose steps compile what the steps of this one will need, and leave all else as it was.

        It has nothing of its own to be closed, and gives no tokens that mean anything.
        """

    def close(self) -> None:
        """Ends its threads; it runs no more. May be called again, as after an interrupt.

        Raises:
            BaseException: the first that ending a part of it ended with; the others were ended too.
        """
