"""What policies ask of an observation, who is busiest, there, expected next; and how they answer it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId, Geometry, LayerPlan, Observation


def busiest_first(seen: Observation) -> list[int]:
    """Active experts, most tokens first; ties by number."""
    return sorted(sorted(seen.demand), key=seen.demand.__getitem__, reverse=True)  # keeps the order of ties


def present(expert: ExpertId, seen: Observation) -> bool:
    """Resident or on its way."""
    return expert in seen.resident or expert in seen.in_flight


def need_a_layer(geometry: Geometry, policy: str) -> None:
    """Refuses a budget that can not hold every expert of one layer, which a prefill may need at once.

    Raises:
        ValueError: with both sizes.
    """
    if geometry.slots < geometry.num_experts:
        raise ValueError(
            f"device_budget is too small for policy {policy!r}: a layer may need all of its "
            f"{geometry.num_experts} experts on the device at once "
            f"({geometry.num_experts * geometry.expert_bytes:,} bytes), the budget holds {geometry.slots} "
            f"({geometry.slots * geometry.expert_bytes:,} bytes); raise it, or use policy 'host-only' or "
            "'fiddler', which compute the rest on the host"
        )


def need_costs(profile: HardwareProfile | None, policy: str) -> HardwareProfile:
    """The profile, which this policy can not do without.

    Raises:
        ValueError: if there is none.
    """
    if profile is None:
        raise ValueError(f"policy {policy!r} weighs costs: it needs a HardwareProfile, got None")
    return profile


def expected_next(seen: Observation, geometry: Geometry, layers: int = 1) -> list[ExpertId]:
    """Experts of the next layers that half a token or more is expected for, nearest layer, most tokens first.

    >>> geometry = Geometry(num_layers=2, num_experts=3, experts_per_token=1, expert_bytes=1, slots=3)
    >>> seen = Observation(step=0, layer=1, phase="decode", demand={}, resident=(), in_flight=(),
    ...     forecast=[[0.2, 0.9, 1.4], [0.0, 0.0, 1.0]])
    >>> expected_next(seen, geometry)
    [ExpertId(layer=0, expert=2), ExpertId(layer=0, expert=1)]
    >>> expected_next(seen, geometry, layers=2)[2:]
    [ExpertId(layer=1, expert=2)]
    """
    found = []
    for ahead, tokens in enumerate(seen.forecast[:layers], 1):
        layer = (seen.layer + ahead) % geometry.num_layers
        likely = [expert for expert, expected in enumerate(tokens) if expected >= 0.5]
        found += [ExpertId(layer, expert) for expert in sorted(likely, key=lambda e: (-tokens[e], e))]
    return found


def answer(
    seen: Observation,
    device: Sequence[int],
    *,
    evict: Iterable[ExpertId] = (),
    load: Iterable[ExpertId] = (),
    prefetch: Iterable[ExpertId] = (),
) -> LayerPlan:
    """The plan that computes `device` on the device and the rest of the layer on the host, busiest first."""
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
