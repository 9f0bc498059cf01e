"""Residency: which experts are resident on the device or in flight, always within the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView
from typing import Any, cast

from layerscope_jax.scheduling.plan import ExpertId, LayerPlan


class Residency:
    """State of each expert: absent, in flight (its bytes are reserved) or resident. Written by one thread.

    Methods raise RuntimeError for changes that would exceed the budget or contradict the state. Those are
    bugs of the runtime and never the user's mistake.

    Args:
        budget_bytes: budget (bytes) for resident experts and copies in flight together.
        expert_bytes: size (bytes) of one expert.

    Attributes:
        let_go: is called with the weights of an expert that is evicted.
        idle_prefetches: experts that were prefetched, or are in flight as a prefetch, and not used yet.
        beside_bytes: memory (bytes) that somebody else uses for experts, added to `peak_bytes`.

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
        self.peak_bytes = self.beside_bytes = 0
        self.wasted_bytes = 0
        self.idle_prefetches: set[ExpertId] = set()
        self.let_go: Callable[[Any], None] = lambda weights: None
        self._held: dict[tuple[int, int], Any] = {}
        self._coming: dict[ExpertId, None] = {}  # in the order of their requests

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
        """Changes an expert from absent to in flight."""
        if expert in self._held or expert in self._coming:
            raise RuntimeError(f"{expert} is already on the device or on its way")
        if self.used_bytes + self.expert_bytes > self.budget_bytes:
            raise RuntimeError(f"no room for {expert}: {self.used_bytes} of {self.budget_bytes} bytes in use")
        self._coming[expert] = None
        if prefetched:
            self.idle_prefetches.add(expert)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes + self.beside_bytes)

    def arrive(self, expert: ExpertId, weights: Any) -> None:
        """Changes an expert from in flight to resident."""
        if expert not in self._coming:
            raise RuntimeError(f"{expert} arrived, but was not on its way")
        del self._coming[expert]
        self._held[expert] = weights

    def release(self, expert: ExpertId) -> None:
        """Changes an expert from in flight to absent, because its copy failed or was dropped."""
        if expert not in self._coming:
            raise RuntimeError(f"{expert} was released, but was not on its way")
        del self._coming[expert]
        self.idle_prefetches.discard(expert)

    def evict(self, expert: ExpertId) -> None:
        """Changes an expert from resident to absent."""
        if expert not in self._held:
            raise RuntimeError(f"{expert} was evicted, but is not resident")
        self.let_go(self._held.pop(expert))
        if expert in self.idle_prefetches:
            self.idle_prefetches.remove(expert)
            self.wasted_bytes += self.expert_bytes

    def use(self, layer: int, experts: Iterable[int]) -> list[Any]:
        """Returns the weights of resident experts of a layer, and counts the experts as used."""
        try:
            # A plain pair equals an `ExpertId` and is made faster.
            weights = [self._held[layer, expert] for expert in experts]
        except KeyError as error:
            raise RuntimeError(
                f"{ExpertId(*error.args[0])} is to be computed on the device, but is not resident"
            ) from None
        if self.idle_prefetches:
            self.idle_prefetches.difference_update([ExpertId(layer, expert) for expert in experts])
        return weights

    def follow(
        self, plan: LayerPlan, drop: Callable[[Callable[[ExpertId], bool]], list[ExpertId]]
    ) -> list[ExpertId]:
        """Carries out the evictions and reservations of a checked plan.

        Args:
            plan: plan of the layer to compute now.
            drop: removes prefetches that have not begun and for which a function holds from the link; returns
                them.

        Returns:
            On-demand loads of this layer, which the link must copy first.
        """
        if not (self._coming or plan.evict or plan.load or plan.prefetch):
            return []
        # Prefetches for this layer that it does not need are dropped unless they have begun.
        needed = {ExpertId(plan.layer, expert) for expert in plan.device}
        for expert in drop(lambda e: e.layer == plan.layer and e not in needed):
            self.release(expert)
        for expert in plan.evict:
            self.evict(expert)
        promoted = sorted(needed & self._coming.keys())
        for expert in plan.load:
            self.reserve(expert, prefetched=False)
        for expert in plan.prefetch:
            self.reserve(expert, prefetched=True)
        return [*promoted, *plan.load]

    def unused_prefetch_bytes(self) -> int:
        """Returns the bytes of prefetched experts that were never used, evicted and resident ones."""
        return self.wasted_bytes + len(self.idle_prefetches & self._held.keys()) * self.expert_bytes

    def clear(self) -> None:
        """Lets go of every expert, when nothing is computed from them any more; the counts stay."""
        self.wasted_bytes = self.unused_prefetch_bytes()
        self.idle_prefetches.clear()
        self._held.clear()
        self._coming.clear()

    def reset(self) -> None:
        """Resets the counts; experts that are resident now do not count as wasted later."""
        self.wasted_bytes = 0
        self.peak_bytes = self.used_bytes + self.beside_bytes
        self.idle_prefetches -= self._held.keys()
