"""What policies ask of an observation: who is busiest, who is there, who is expected next."""

from __future__ import annotations

from layerscope_jax.scheduling.plan import ExpertId, Geometry, Observation


def busiest_first(seen: Observation) -> list[int]:
    """Active experts, most tokens first; ties by number."""
    return sorted(seen.demand, key=lambda expert: (-seen.demand[expert], expert))


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


def expected_next(seen: Observation, geometry: Geometry) -> list[ExpertId]:
    """Experts of the next layer that half a token or more is expected for, most tokens first.

    >>> geometry = Geometry(num_layers=2, num_experts=3, experts_per_token=1, expert_bytes=1, slots=3)
    >>> seen = Observation(step=0, layer=1, phase="decode", demand={}, resident=(), in_flight=(),
    ...     forecast=[[0.2, 0.9, 1.4]])
    >>> expected_next(seen, geometry)
    [ExpertId(layer=0, expert=2), ExpertId(layer=0, expert=1)]
    """
    if not seen.forecast:
        return []
    layer = (seen.layer + 1) % geometry.num_layers
    tokens = seen.forecast[0]
    likely = [expert for expert, expected in enumerate(tokens) if expected >= 0.5]
    return [ExpertId(layer, expert) for expert in sorted(likely, key=lambda e: (-tokens[e], e))]
