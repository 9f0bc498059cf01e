"""Several devices on the virtual clock: each has its own link and budget, and all share one host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from layerscope_jax.runtime.lower_bound import lower_bound_ms
from layerscope_jax.runtime.outcome import busy, counted
from layerscope_jax.runtime.statistics import Meter
from layerscope_jax.scheduling.costs import HardwareProfile, sharing_host
from layerscope_jax.scheduling.geometry import of_part
from layerscope_jax.scheduling.plan import Geometry, LayerPlan, Observation, Policy
from layerscope_jax.scheduling.policy import completed
from layerscope_jax.simulation.simulator import Simulated, VirtualRun
from layerscope_jax.simulation.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Server:
    """Devices of one server that share a model's experts, as of `layerscope_jax.runtime.expert_parallel`.

    Attributes:
        devices: N; each owns as many of every layer's experts, and has a link of its own.
        root_ms: time (ms) of an expert on what all links share, such as the root complex: while n links are
            busy, a copy takes n times that, if it is more than on its own link. 0 if nothing is shared.
        exchange_ms_per_token: time (ms) in which the devices exchange the rows of one layer, for each token.

    Raises:
        ValueError: for numbers out of range.
    """

    devices: int
    root_ms: float = 0.0
    exchange_ms_per_token: float = 0.0

    def __post_init__(self) -> None:
        if type(self.devices) is not int or self.devices < 1:
            raise ValueError(f"devices must be 1 or more, got {self.devices!r}")
        for name in ("root_ms", "exchange_ms_per_token"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < np.inf):
                raise ValueError(f"{name} must be a time in ms, 0 or more, got {value!r}")

    @classmethod
    def of(
        cls,
        devices: int,
        geometry: Geometry,
        costs: HardwareProfile,
        row_bytes: int,
        root_bandwidth: float | None = None,
    ) -> Server:
        """Returns a server whose devices exchange rows over the links that experts cross.

        Args:
            devices: N.
            geometry: of the model.
            costs: of the machine with one device.
            row_bytes: of a token's row, D numbers.
            root_bandwidth: bytes/s of what the links share; None if nothing is shared.
        """
        link = geometry.expert_bytes / (1e-3 * costs.transfer_ms) if costs.transfer_ms else np.inf
        each = min(link, np.inf if root_bandwidth is None else root_bandwidth / devices)
        # In a ring each device sends 2 (N - 1) / N of the rows.
        sent = 2 * (devices - 1) / devices * geometry.experts_per_token * row_bytes
        root_ms = 0.0 if root_bandwidth is None else 1e3 * geometry.expert_bytes / root_bandwidth
        return cls(devices=devices, root_ms=root_ms, exchange_ms_per_token=1e3 * sent / each)

    def part(self, geometry: Geometry) -> Geometry:
        """Returns the geometry of one of the devices.

        Raises:
            ValueError: if the experts cannot be shared evenly.
        """
        self._check_even(geometry.num_experts)
        own = of_part(geometry, geometry.num_experts // self.devices)
        return replace(own, slots=min(own.slots, own.total_experts))

    def _check_even(self, experts: int) -> None:
        if experts % self.devices:
            raise ValueError(
                f"devices must share the {experts} experts of a layer evenly, got {self.devices}"
            )

    def parts(self, counts: np.ndarray) -> list[np.ndarray]:
        """Returns the counts [..., E / N] of each device's experts from those of all [..., E].

        Raises:
            ValueError: if the experts cannot be shared evenly.
        """
        self._check_even(counts.shape[-1])
        return np.split(counts, self.devices, axis=-1)


def simulate_server(
    policies: Sequence[Policy],
    workloads: Sequence[Workload],
    geometry: Geometry,
    costs: HardwareProfile,
    server: Server,
) -> list[Simulated]:
    """Runs policies on several devices over recorded demand; see `simulator.simulate`.

    Every device computes a layer's attention and plans for its own experts. The layer ends when all devices
    and the host, which computes what all plans give it, are done and have exchanged their rows. How many
    links share the root complex is looked at when a layer has been planned, and taken to hold until the next
    one.

    Args:
        policies: the policy of each device, usually the same; each has a state of its own.
        workloads, geometry, costs: as of `simulate`; slots are those of each device.
        server: the devices.

    Returns:
        The outcome of each workload: counts and bytes of all devices together, shares of the mean device.

    Raises:
        ValueError: as of `simulate`, and if the experts cannot be shared evenly.
    """
    for workload in workloads:
        workload.check(geometry)
    if len(policies) != server.devices:
        raise ValueError(f"expected a policy for each of {server.devices} devices, got {len(policies)}")
    run = _Server(policies, geometry, costs, server)
    return [run.workload(workload) for workload in workloads]


class _Server:
    """State of a simulated run on several devices."""

    def __init__(
        self, policies: Sequence[Policy], geometry: Geometry, costs: HardwareProfile, server: Server
    ):
        self.server, self.costs = server, costs
        self.own = server.part(geometry)
        self.each = self.own.num_experts
        # What policies plan with: the host is everybody's, and all links may be busy.
        all_busy_ms = max(costs.transfer_ms, server.devices * server.root_ms)
        shared = replace(sharing_host(costs, server.devices), transfer_ms=all_busy_ms)
        self.sides = [VirtualRun(completed(policy), self.own, shared, (), None, None) for policy in policies]
        self.now = self.host_ms = 0.0

    def workload(self, workload: Workload) -> Simulated:
        """Runs all steps of a workload; the residency of each device is kept."""
        sides, each = self.sides, self.each
        for side in sides:
            side.begin(self.now)
        self.host_ms = 0.0
        ends = [self.now]
        forecasts = workload.forecasts
        for step, counts in enumerate(workload.counts):
            for layer, row in enumerate(counts):
                seen = []
                for number, side in enumerate(sides):
                    own = slice(number * each, (number + 1) * each)
                    active = np.flatnonzero(row[own])
                    seen.append(
                        Observation(
                            step=side.steps,
                            layer=layer,
                            phase=workload.phase,
                            demand=dict(zip(active.tolist(), row[own][active].tolist(), strict=True)),
                            resident=side.books.resident,
                            in_flight=side.books.coming,
                            forecast=() if forecasts is None else forecasts[step][layer][:, own].tolist(),
                        )
                    )
                looks_ahead = forecasts is not None and any(
                    side.policy.wants_forecast(side.state) for side in sides
                )
                self.layer(seen, workload.tokens, looks_ahead)
            for side in sides:
                side.steps += 1
            ends.append(self.now)
        return self.result(workload, ends)

    def layer(self, seen: Sequence[Observation], tokens: int, looks_ahead: bool) -> None:
        """Runs one layer on all devices."""
        sides, costs, began = self.sides, self.costs, self.now
        other_ms = costs.layer_ms(tokens) + (costs.forecast_ms(tokens) if looks_ahead else 0.0)
        plans: list[LayerPlan] = []
        for side, each in zip(sides, seen, strict=True):
            side.now = began + other_ms
            side.device_ms += other_ms
            elapsed_ms = began - side.planned_ms + (other_ms if each.layer else 0.0)
            plans.append(side.decide(replace(each, elapsed_ms=elapsed_ms)))
        busy_links = sum(not side.link.idle(side.now) for side in sides)
        pace = max(costs.transfer_ms, busy_links * self.server.root_ms)
        for side in sides:
            side.link.pace(pace, side.now)
        # The host computes what all plans give it, one expert after the other.
        hosted = [each.demand[e] for each, plan in zip(seen, plans, strict=True) for e in plan.host]
        host_ms = sum((costs.host_ms(tokens) for tokens in hosted), costs.host_start_ms if hosted else 0.0)
        self.host_ms += host_ms
        ended = max(
            side.on_device(plan, each.demand, 1.0)
            for side, plan, each in zip(sides, plans, seen, strict=True)
        )
        ended = max(ended, max(side.now for side in sides) + host_ms)
        self.now = ended + self.server.exchange_ms_per_token * tokens

    def result(self, workload: Workload, ends: Sequence[float]) -> Simulated:
        """Returns the outcome of the workload that has just run."""
        for side in self.sides:
            side.now = self.now
        parts = [side.result(workload, ends) for side in self.sides]
        meter, total_ms = Meter(), ends[-1] - ends[0]
        for side in self.sides:
            for field in fields(Meter):
                if field.name not in ("forecast", "device_busy_s"):
                    whole = getattr(meter, field.name) + getattr(side.meter, field.name)
                    setattr(meter, field.name, whole)
        mean = {
            name: sum(getattr(part, f"{name}_share") for part in parts) / len(parts) * total_ms
            for name in ("device", "link")
        }
        return replace(
            parts[0],
            budget_bytes=sum(part.budget_bytes for part in parts),
            peak_expert_bytes=sum(part.peak_expert_bytes for part in parts),
            **busy(total_ms, **mean, host=self.host_ms),
            **counted(
                meter,
                demand_bytes=sum(part.bytes_demand for part in parts),
                prefetch_bytes=sum(part.bytes_prefetch for part in parts),
                wasted_bytes=sum(part.bytes_wasted for part in parts),
            ),
        )


def server_bound_ms(
    workload: Workload, geometry: Geometry, costs: HardwareProfile, server: Server, from_empty: bool
) -> float:
    """Returns a lower bound on the time (ms) of all steps on several devices, under any policy.

    Each device alone, with the whole host for itself, takes at least the bound of its own experts; all
    devices together take no less than the one that takes longest.

    Args:
        workload: the demand.
        geometry, costs, server: as of `simulate_server`.
        from_empty: whether nothing is resident at first; otherwise the best choice is.
    """
    own = server.part(geometry)
    exchanges = workload.counts.shape[0] * geometry.num_layers * workload.tokens
    return server.exchange_ms_per_token * exchanges + max(
        lower_bound_ms(part, workload.tokens, own, costs, resident=() if from_empty else None)
        for part in server.parts(workload.counts)
    )
