"""Helpers of policies: the busiest experts, the present and the expected ones, and building the plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation


def busiest_first(seen: Observation) -> list[int]:
    """Returns the active experts, most tokens first; ties by number."""
    return sorted(sorted(seen.demand), key=seen.demand.__getitem__, reverse=True)  # keeps the order of ties


def present(expert: ExpertId, seen: Observation) -> bool:
    """Whether an expert is resident or in flight."""
    return expert in seen.resident or expert in seen.in_flight


def need_a_layer(geometry: Geometry, policy: str) -> None:
    """Refuses a budget that cannot hold every expert of one layer, which a prefill may need at once.

    Raises:
        ValueError: naming both sizes.
    """
    if geometry.slots < geometry.num_experts:
        raise ValueError(
            f"device_budget is too small for policy {policy!r}: a layer may need all of its "
            f"{geometry.num_experts} experts on the device at once "
            f"({geometry.num_experts * geometry.expert_bytes:,} bytes), but the budget holds only "
            f"{geometry.slots}; raise it, or use policy 'host-only' or 'fiddler', which compute the others "
            "on the host"
        )


def need_costs(profile: HardwareProfile | None, policy: str) -> HardwareProfile:
    """Returns the profile of a policy that cannot do without one.

    Raises:
        ValueError: if there is none.
    """
    if profile is None:
        raise ValueError(f"policy {policy!r} weighs costs: it needs a HardwareProfile, got None")
    return profile


def expected_next(seen: Observation, geometry: Geometry, layers: int = 1) -> list[ExpertId]:
    """Returns experts of the next layers with half an expected token or more, nearest and busiest first.

    >>> geometry = Geometry(num_layers=2, num_experts=3, experts_per_token=1, expert_bytes=1, slots=3)
    >>> seen = Observation(step=0, layer=1, phase="decode", demand={}, resident=(), in_flight=(),
    ...     forecast=[[0.2, 0.9, 1.4], [0.0, 0.0, 1.0]])
    >>> expected_next(seen, geometry)
    [ExpertId(layer=0, expert=2), ExpertId(layer=0, expert=1)]
    >>> expected_next(seen, geometry, layers=2)[2:]
    [ExpertId(layer=1, expert=2)]
    """
    experts = []
    for ahead, tokens in enumerate(seen.forecast[:layers], 1):
        layer = (seen.layer + ahead) % geometry.num_layers
        likely = [expert for expert, expected in enumerate(tokens) if expected >= 0.5]
        experts += [ExpertId(layer, expert) for expert in sorted(likely, key=lambda e: (-tokens[e], e))]
    return experts


def answer(
    seen: Observation,
    device: Sequence[int],
    *,
    evict: Iterable[ExpertId] = (),
    load: Iterable[ExpertId] = (),
    prefetch: Iterable[ExpertId] = (),
) -> LayerPlan:
    """Returns the plan that computes `device` on the device and the other active experts on the host."""
    rest = busiest_first(seen)
    if device:
        chosen = set(device)
        rest = [expert for expert in rest if expert not in chosen]
    return LayerPlan(
        step=seen.step,
        layer=seen.layer,
        device=tuple(device),
        host=tuple(rest),
        evict=tuple(evict),
        load=tuple(load),
        prefetch=tuple(prefetch),
    )
