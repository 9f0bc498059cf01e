"""The device tier's books: which experts are resident, which are on their way; both fit the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView
from typing import Any, cast

from layerscope_jax.scheduling.plan import ExpertId, LayerPlan


class Residency:
    """An expert is absent, on its way (its bytes reserved) or resident. Only the engine's thread writes here.

    Raises RuntimeError on any step that would exceed the budget or contradict the books: those are faults of
    the runtime, never of the user.

    Args:
        budget_bytes: for resident experts and copies on their way together.
        expert_bytes: of one expert.

    Attributes:
        idle_prefetches: experts that have come, or are coming, as a prefetch that nothing has used yet.

    >>> books = Residency(budget_bytes=250, expert_bytes=100)
    >>> books.slots
    2
    >>> books.reserve(ExpertId(0, 5), prefetched=False); books.used_bytes
    100
    """

    def __init__(self, budget_bytes: int, expert_bytes: int):
        self.budget_bytes = budget_bytes
        self.expert_bytes = expert_bytes
        self.slots = budget_bytes // expert_bytes
        self.peak_bytes = 0
        self.wasted_bytes = 0
        self.idle_prefetches: set[ExpertId] = set()
        self._held: dict[tuple[int, int], Any] = {}
        self._coming: dict[ExpertId, None] = {}  # in the order asked for

    @property
    def resident(self) -> KeysView[ExpertId]:
        return cast(KeysView[ExpertId], self._held.keys())

    @property
    def coming(self) -> KeysView[ExpertId]:
        return self._coming.keys()

    @property
    def used_bytes(self) -> int:
        return (len(self._held) + len(self._coming)) * self.expert_bytes

    def reserve(self, expert: ExpertId, *, prefetched: bool) -> None:
        """Absent -> on its way."""
        if expert in self._held or expert in self._coming:
            raise RuntimeError(f"{expert} is already on the device or on its way")
        if self.used_bytes + self.expert_bytes > self.budget_bytes:
            raise RuntimeError(f"no room for {expert}: {self.used_bytes} of {self.budget_bytes} bytes in use")
        self._coming[expert] = None
        if prefetched:
            self.idle_prefetches.add(expert)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def arrive(self, expert: ExpertId, weights: Any) -> None:
        """On its way -> resident."""
        if expert not in self._coming:
            raise RuntimeError(f"{expert} arrived, but was not on its way")
        del self._coming[expert]
        self._held[expert] = weights

    def release(self, expert: ExpertId) -> None:
        """On its way -> absent: the copy failed or was dropped."""
        if expert not in self._coming:
            raise RuntimeError(f"{expert} was released, but was not on its way")
        del self._coming[expert]
        self.idle_prefetches.discard(expert)

    def evict(self, expert: ExpertId) -> None:
        """Resident -> absent."""
        if expert not in self._held:
            raise RuntimeError(f"{expert} was evicted, but is not resident")
        del self._held[expert]
        if expert in self.idle_prefetches:
            self.idle_prefetches.remove(expert)
            self.wasted_bytes += self.expert_bytes

    def use(self, layer: int, experts: Iterable[int]) -> list[Any]:
        """The weights of resident experts of a layer, as they arrived; they are about to be computed."""
        try:
            found = [
                self._held[layer, expert] for expert in experts
            ]  # plain pairs are found, and made faster
        except KeyError as error:
            raise RuntimeError(
                f"{ExpertId(*error.args[0])} is to be computed on the device, but is not resident"
            ) from None
        if self.idle_prefetches:
            self.idle_prefetches.difference_update([ExpertId(layer, expert) for expert in experts])
        return found

    def follow(
        self, plan: LayerPlan, drop: Callable[[Callable[[ExpertId], bool]], list[ExpertId]]
    ) -> list[ExpertId]:
        """Enters what a plan, checked already, says of memory.

        Args:
            plan: of the layer whose turn has come.
            drop: takes prefetches that have not begun off the link, where the function that it is given says
                so; gives them.

        Returns:
            What is to cross the link before all else, as this layer waits for it.
        """
        if not (self._coming or plan.evict or plan.load or plan.prefetch):
            return []
        # What was queued for this layer in vain is not worth beginning any more.
        wanted = {ExpertId(plan.layer, expert) for expert in plan.device}
        for expert in drop(lambda e: e.layer == plan.layer and e not in wanted):
            self.release(expert)
        for expert in plan.evict:
            self.evict(expert)
        promoted = sorted(wanted & self._coming.keys())
        for expert in plan.load:
            self.reserve(expert, prefetched=False)
        for expert in plan.prefetch:
            self.reserve(expert, prefetched=True)
        return [*promoted, *plan.load]

    def unused_prefetch_bytes(self) -> int:
        """Bytes of prefetched experts that nothing has read so far: gone ones and resident ones."""
        return self.wasted_bytes + len(self.idle_prefetches & self._held.keys()) * self.expert_bytes

    def reset(self) -> None:
        """Begins the counts anew: what is resident now is no later run's waste."""
        self.wasted_bytes = 0
        self.peak_bytes = self.used_bytes
        self.idle_prefetches -= self._held.keys()
