"""The device tier's books: which experts are resident, which are on their way; both fit the budget."""

from __future__ import annotations

from collections.abc import KeysView
from dataclasses import dataclass

from layerscope_jax.experts.compute import ExpertWeights
from layerscope_jax.scheduling.plan import ExpertId


@dataclass
class Held:
    """One resident expert and whether its copy has earned its bytes yet."""

    weights: ExpertWeights
    prefetched: bool
    used: bool = False


class Residency:
    """An expert is absent, on its way (its bytes reserved) or resident. Only the engine's thread writes here.

    Raises RuntimeError on any step that would exceed the budget or contradict the books: those are faults of
    the runtime, never of the user.

    Args:
        budget_bytes: for resident experts and copies on their way together.
        expert_bytes: of one expert.

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
        self._held: dict[ExpertId, Held] = {}
        self._coming: dict[ExpertId, bool] = {}  # expert -> whether it is (still) a prefetch

    @property
    def resident(self) -> KeysView[ExpertId]:
        return self._held.keys()

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
        self._coming[expert] = prefetched
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def arrive(self, expert: ExpertId, weights: ExpertWeights) -> None:
        """On its way -> resident."""
        if expert not in self._coming:
            raise RuntimeError(f"{expert} arrived, but was not on its way")
        self._held[expert] = Held(weights, self._coming.pop(expert))

    def release(self, expert: ExpertId) -> None:
        """On its way -> absent: the copy failed or was dropped."""
        if expert not in self._coming:
            raise RuntimeError(f"{expert} was released, but was not on its way")
        del self._coming[expert]

    def evict(self, expert: ExpertId) -> None:
        """Resident -> absent."""
        if expert not in self._held:
            raise RuntimeError(f"{expert} was evicted, but is not resident")
        held = self._held.pop(expert)
        self.wasted_bytes += self.expert_bytes * (held.prefetched and not held.used)

    def use(self, expert: ExpertId) -> ExpertWeights:
        """The weights of a resident expert, which is about to be computed."""
        if expert not in self._held:
            raise RuntimeError(f"{expert} is to be computed on the device, but is not resident")
        held = self._held[expert]
        held.used = True
        return held.weights

    def is_prefetch(self, expert: ExpertId) -> bool:
        """Whether an expert has come, or is coming, as a prefetch that nothing has used yet."""
        held = self._held.get(expert)
        return self._coming.get(expert, False) if held is None else held.prefetched and not held.used

    def unused_prefetch_bytes(self) -> int:
        """Bytes of prefetched experts that nothing has read so far: gone ones and resident ones."""
        waiting = sum(held.prefetched and not held.used for held in self._held.values())
        return self.wasted_bytes + waiting * self.expert_bytes

    def reset(self) -> None:
        """Begins the counts anew: what is resident now is no later run's waste."""
        self.wasted_bytes = 0
        self.peak_bytes = self.used_bytes
        for held in self._held.values():
            held.prefetched = False
