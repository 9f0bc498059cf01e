"""Numbers of a model's routed experts, and of those that a device budget holds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from layerscope_jax.support.checks import Problems

MOST_EXPERTS = 2**24
"""Maximum number of experts of all layers, a thousand times that of any model: more means damaged input."""


class ExpertId(NamedTuple):
    """A routed expert: its layer, among those with routed experts, and its number there."""

    layer: int
    expert: int


@dataclass(frozen=True, kw_only=True)
class RoutedExperts:
    """Numbers of a model's routed experts, as routing, profiles, predictors and policies use them.

    Attributes:
        num_layers: L, number of layers with routed experts; other layers are not counted.
        num_experts: E, number of experts of each of these layers.
        experts_per_token: K, number of experts that a token chooses in each.

    Raises:
        ValueError: naming every number that is out of range.

    >>> RoutedExperts(num_layers=0, num_experts=8, experts_per_token=9)
    Traceback (most recent call last):
    ValueError: num_layers must be 1 or more, got 0; experts_per_token must be in 1..num_experts (8), got 9
    """

    num_layers: int
    num_experts: int
    experts_per_token: int

    def __post_init__(self) -> None:
        problems = Problems()
        layers, experts, choices = self.num_layers, self.num_experts, self.experts_per_token
        for name, number in (("num_layers", layers), ("num_experts", experts)):
            problems.expect(type(number) is int and number >= 1, name, "1 or more", number)
        if type(experts) is int:
            within = type(choices) is int and 1 <= choices <= experts
            problems.expect(within, "experts_per_token", f"in 1..num_experts ({experts})", choices)
        if not problems.found:
            problems.expect(
                layers * experts <= MOST_EXPERTS,
                "num_layers * num_experts",
                f"at most {MOST_EXPERTS:,}",
                layers * experts,
            )
        problems.raise_any()

    @property
    def total_experts(self) -> int:
        """Number of experts of all layers."""
        return self.num_layers * self.num_experts

    @property
    def routed(self) -> RoutedExperts:
        """These numbers alone, to compare with those of another record.

        >>> small = Geometry(num_layers=2, num_experts=4, experts_per_token=1, expert_bytes=300, slots=3)
        >>> small.routed == RoutedExperts(num_layers=2, num_experts=4, experts_per_token=1)
        True
        """
        return RoutedExperts(**self.counts())

    def counts(self) -> dict[str, Any]:
        """Returns the three numbers by name, for another record or a file."""
        return {field.name: getattr(self, field.name) for field in fields(RoutedExperts)}

    def every_expert(self) -> list[ExpertId]:
        """Returns all experts, layer by layer."""
        return [ExpertId(la, expert) for la in range(self.num_layers) for expert in range(self.num_experts)]


@dataclass(frozen=True, kw_only=True)
class Geometry(RoutedExperts):
    """Sizes of a model and of the device budget that a policy knows.

    Attributes:
        expert_bytes: size (bytes) of one expert.
        slots: number of experts that the device budget holds, copies in flight included.
        arrays_per_expert: number of arrays of one expert, each of which is copied by itself: between two of
            them, an on-demand load can overtake a prefetch. Plain formats have three, one for each matrix.
    """

    expert_bytes: int
    slots: int
    arrays_per_expert: int = 3


def of_part(geometry: Geometry, experts: int) -> Geometry:
    """Returns the geometry of a device that owns some of each layer's experts."""
    choices = min(geometry.experts_per_token, experts)
    return replace(geometry, num_experts=experts, experts_per_token=choices)
