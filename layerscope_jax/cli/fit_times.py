"""Expected times of a model on the machine of a profile, from the simulator, for `layerscope fit`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.scheduling.baselines import Resident
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.simulation.policies import run, workloads
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.simulation.simulator import simulate

DECODE_ERROR, PREFILL_ERROR = 0.219, 0.137
"""Errors of simulated times, relative to measured ones, that nine of ten stay below: of decode steps, with
the time of planning left out, as it is here; and of one prefill under each of seven policies
(`benchmarks/answers/simulator.md`)."""

ERROR_SOURCE = "measured on a CPU of 2 cores with a slowed link, on no accelerator"
"""Where these errors come from."""

POLICY, PREDICTOR = "auto", "gate"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Simulated times of a batch of recorded requests.

    Attributes:
        batch: number of requests.
        prompt_tokens: tokens of their prompts, prefilled in one step from a device without experts, or with
            all if they fit.
        ttft_s, tpot_s: time (s) to the first token, and of each decode step.
    """

    batch: int
    prompt_tokens: int
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Simulated times, and what they rest on.

    Attributes:
        profile, source: name of the profile, and where its costs come from.
        routing: name or file of the recorded routing.
        policy: name of the policy.
        experts: number of experts on the device.
        times: for each batch.
        decode_error, prefill_error: errors of such times, relative to measured ones, that nine of ten stayed
            below.
        error_source: where these errors were measured.
    """

    profile: str
    source: str
    routing: str
    policy: str
    experts: int
    times: tuple[Times, ...]
    decode_error: float = DECODE_ERROR
    prefill_error: float = PREFILL_ERROR
    error_source: str = ERROR_SOURCE


class Known(NamedTuple):
    """Recorded routing, and its name or where it was given."""

    name: str
    routing: Routing


def check_profile(profile: MachineProfile, config: ModelConfig, format: str) -> None:
    """Checks that a profile is of a model whose experts have this format.

    Raises:
        ValueError: if it is of another, saying how they differ.
    """
    model = profile.model
    sizes = (config.num_moe_layers, config.num_experts, config.experts_per_token)
    theirs = (model.num_layers, model.num_experts, model.experts_per_token)
    widths = (config.hidden_size, config.moe_intermediate_size)
    held = (model.hidden_size, model.moe_intermediate_size)
    if (sizes, widths, format) != (theirs, held, model.dtype):
        raise ValueError(
            f"the profile {profile.name!r} is of another model: {theirs[0]} layers of {theirs[1]} experts, "
            f"{theirs[2]} a token, {held[0]} x {held[1]} in {model.dtype}, and this one has {sizes[0]} of "
            f"{sizes[1]}, {sizes[2]} a token, {widths[0]} x {widths[1]} in {format}; run `layerscope "
            "calibrate` with this model on that machine"
        )


def known_routing(profile: MachineProfile, given: Routing | None) -> Known | None:
    """Returns the routing that was given, or that a profile names, or that is shipped; None for none of them.

    Raises:
        ValueError: if it is of another model than the profile.
    """
    name = "--trace" if given is not None else profile.routing or Routing.shipped_for(profile.model)
    if name is None:
        return None
    routing = given or Routing.shipped(name)
    if routing.routed != profile.model.routed:
        raise ValueError("the recorded routing is of another model than the profile; use one of this model")
    return Known(name, routing)


def expected(
    profile: MachineProfile, known: Known, *, slots: int, max_num_seqs: int, link_bytes_per_s: int | None
) -> Expected:
    """Simulates policy "auto" for one request, and for as many as run at once.

    Args:
        profile: costs of a machine.
        known: recorded routing of the profile's model.
        slots: number of experts that fit on the device.
        max_num_seqs: requests at once; at most as many as were recorded are simulated.
        link_bytes_per_s: speed of the link, in place of the profile's; None for the profile's.
    """
    model, (name, routing) = profile.model, known
    costs, source = profile.costs, profile.costs.source
    if link_bytes_per_s is not None:
        costs = over(costs, 1e3 * model.expert_bytes / link_bytes_per_s)
        source = f"{source}; copies at {link_bytes_per_s / 1e9:.3g} GB/s"
    geometry = model.geometry(min(slots, model.total_experts))
    resident = geometry.slots == geometry.total_experts
    times = []
    for batch in sorted({1, min(max_num_seqs, routing.requests)}):
        forecast = PREDICTOR if PREDICTOR in routing.predictors and not resident else "none"
        demand = workloads(routing, batch, forecast)
        if resident:
            results = simulate(Resident(), demand, geometry, costs, geometry.every_expert())
        else:
            results = run(POLICY, demand, geometry, costs)
        prefill, decode = results
        times.append(
            Times(batch=batch, prompt_tokens=demand[0].tokens, ttft_s=prefill.ttft_s, tpot_s=decode.tpot_s)
        )
    return Expected(
        profile=profile.name,
        source=source,
        routing=name,
        policy=Resident.name if resident else POLICY,
        experts=geometry.slots,
        times=tuple(times),
    )


def over(costs: HardwareProfile, transfer_ms: float) -> HardwareProfile:
    """Returns costs over another link; copies beside other work slow down in the same proportion."""
    if costs.alone is None:
        return replace(costs, transfer_ms=transfer_ms)
    slower = costs.transfer_ms / costs.alone.transfer_ms if costs.alone.transfer_ms else 1.0
    alone = replace(costs.alone, transfer_ms=transfer_ms)
    return replace(costs, transfer_ms=transfer_ms * slower, alone=alone)
