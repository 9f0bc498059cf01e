"""An engine's runner, made anew with fewer resident experts when the device's memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

from layerscope_jax.runtime.alternating import Alternating
from layerscope_jax.runtime.resources import Resources
from layerscope_jax.runtime.runner import Runner
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.support.units import gib

logger = logging.getLogger(__name__)

KEPT = 7 / 8
"""Share of the experts that stay when memory ran out: each further try costs a prefill of all requests."""

Make = Callable[[int, HardwareProfile | None, bool], Runner]
"""Function that makes a runner: `(budget_bytes, costs, alternates)`; None for costs that are not known yet,
and whether policy "auto" may also run decode steps with the cache inside."""


class Fitting:
    """The runner of an engine, and the budget that it has.

    Args:
        make: makes a runner.
        resources: own the runner, and end it.
        budget_bytes: device memory (bytes) for experts, at first.
        expert_bytes: size (bytes) of one expert.
        may_shrink: whether the budget may become smaller.

    Attributes:
        runner: the current one.
        budget_bytes: the current budget.
        cuts: how often the budget became smaller.

    Raises:
        ValueError: from `make`.
    """

    def __init__(
        self, make: Make, resources: Resources, budget_bytes: int, expert_bytes: int, may_shrink: bool
    ):
        self._make, self._resources = make, resources
        self._expert_bytes, self._may_shrink, self._alternates = expert_bytes, may_shrink, True
        self.budget_bytes, self.cuts = budget_bytes, 0
        self.runner = self._made(None)

    def can_shrink(self, error: BaseException) -> bool:
        """Whether an error says that the device's memory ran out, and fewer experts may be there."""
        return self._may_shrink and self.budget_bytes >= self._expert_bytes and ran_out(error)

    def shrink(self) -> None:
        """Makes another runner, with fewer experts on the device; none of them is there at first.

        As many may be there as before if policy "auto" had another way on trial, which is given up. Nothing
        may hold arrays of the current runner, such as the traceback of its error. If the policy refuses the
        smaller budget, the runner gets the current budget again, which then no longer shrinks.
        """
        costs, before = self.runner.costs, self.budget_bytes
        on_trial = isinstance(self.runner, Alternating) and self.runner.failed
        with self._resources.opening():  # an engine without a runner is closed
            self._resources.drop(self.runner)  # which lets go of its experts
            gc.collect()
            if on_trial:
                self._alternates = False
            else:
                self._lower()
            try:
                self.runner = self._made(costs)
            except ValueError:
                self.budget_bytes, self._may_shrink, self.cuts = before, False, self.cuts - 1
                self.runner = self._made(costs)

    def _made(self, costs: HardwareProfile | None) -> Runner:
        """Returns a runner with as many experts as fit."""
        while True:
            try:
                return self._resources.add(self._make(self.budget_bytes, costs, self._alternates))
            except Exception as error:
                if not self.can_shrink(error):
                    raise
            gc.collect()
            self._lower()

    def _lower(self) -> None:
        before = self.budget_bytes
        self.budget_bytes = int(KEPT * (before // self._expert_bytes)) * self._expert_bytes
        self.cuts += 1
        (logger.info if self.cuts > 1 else logger.warning)(
            "the device's memory ran out: experts may now take %s of it instead of %s, and what was running "
            "is repeated; a lower device_budget, max_num_seqs or prefill_chunk_size avoids that",
            gib(self.budget_bytes),
            gib(before),
        )


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a device's memory ran out.

    >>> ran_out(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))
    True
    """
    while error is not None:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__
    return False
