"""Chooses the runner of a model and builds it."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Literal

import jax

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.formats import PlainFormat
from layerscope_jax.kernels.cpu import default_threads
from layerscope_jax.kernels.xla_ffi import Unavailable
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.offload.disk import DiskBank
from layerscope_jax.offload.fills import fill_for
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import AHEAD_BYTES, Transfers
from layerscope_jax.offload.partition import Partition
from layerscope_jax.offload.pool import HostPool
from layerscope_jax.offload.residency import Residency
from layerscope_jax.offload.staged import host_parts
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.prediction.predictors import History, Predictor, make_predictor
from layerscope_jax.runtime.alternating import alternating
from layerscope_jax.runtime.exactness import check_exact
from layerscope_jax.runtime.expert_parallel import ExpertParallel
from layerscope_jax.runtime.in_step import InStepCache
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.resident import ResidentOnCpu
from layerscope_jax.runtime.runner import Runner
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.scheduling.baselines import HostOnly, Resident
from layerscope_jax.scheduling.costs import HardwareProfile, sharing_host
from layerscope_jax.scheduling.geometry import of_part
from layerscope_jax.scheduling.guard import Guard
from layerscope_jax.scheduling.in_step import InStep, Streaming, slots_beside
from layerscope_jax.scheduling.plan import Policy
from layerscope_jax.scheduling.policy import PolicyBase, completed
from layerscope_jax.support.machine import cpu_device

logger = logging.getLogger(__name__)

MOST_STAGED = 8
"""Most experts that are set aside for copies on the way to their slots, however small they are."""

Measure = Callable[..., HardwareProfile]
"""Function that measures the machine's costs: `(model, host executor, link, slots)`, both idle; and, where
several devices of this process share the model, `neighbours`, the others."""


def build(
    model: Model,
    policy: Policy,
    predictor: Predictor | History | None = None,
    *,
    budget_bytes: int,
    measure: Measure,
    policy_is_obeyed: bool = False,
    alternates: bool = True,
    numerics: Literal["auto", "exact", "fast"] = "auto",
    costs: HardwareProfile | None = None,
    bandwidth: int | None = None,
    threads: int | None = None,
    host_device: jax.Device | None = None,
    host_bytes: int | None = None,
) -> Runner:
    """Returns a model's runner, whose threads run until it is closed.

    Args:
        model: the model, on its device.
        policy: plans each layer, unless every expert fits and nothing is left to decide.
        predictor: makes the forecasts; None for the policy's default predictor, if it has one.
        budget_bytes: device memory (bytes) for experts and the predictor.
        measure: measures costs if the policy needs them and `costs` is None.
        policy_is_obeyed: whether the policy plans even if every expert fits.
        alternates: whether policy "auto" may also run decode steps with the cache inside.
        numerics: as of `OffloadConfig`.
        costs: costs of the machine; None if they are not known.
        bandwidth: emulated bandwidth (bytes/s) of the link; None for full speed.
        threads: number of threads that compute on the host; None for a number that suits the machine.
        host_device: the JAX CPU device of the host; None for the last one.
        host_bytes: host memory (bytes) for experts that are on the disk; None for all of them.

    Raises:
        ValueError: if the budget is too small for the policy beside the predictor, or the predictor was made
            for another model.
    """
    chosen = completed(policy)
    nothing_to_decide = budget_bytes >= model.own_bytes and (
        isinstance(policy, Resident) or (chosen.uses_device and not policy_is_obeyed)
    )
    # A whole model has plain experts; packed ones are computed from their packed form.
    plain = isinstance(model.bank.format, PlainFormat)
    if nothing_to_decide and plain and model.partition is None and WholeModel.is_faster_on(model.device):
        if numerics == "fast":
            return WholeModel(model)
        logger.warning(
            "every expert fits on %s: OffloadConfig(numerics='fast') runs a step as one program there, "
            "without Python between layers; its logits agree with those of other budgets to rounding",
            model.device,
        )
    if model.partition is not None:
        warn_of_single_programs(chosen, numerics)
    on_disk = isinstance(model.bank, DiskBank)
    if nothing_to_decide and on_disk and not WholeModel.is_faster_on(model.device):
        # The device's memory is the host's, so that the pool alone holds experts.
        nothing_to_decide, chosen, budget_bytes, predictor = False, HostOnly(), 0, None
    if nothing_to_decide:
        chosen, predictor = Resident(), None
    elif predictor is None and chosen.predictor is not None:
        predictor = make_predictor(chosen.predictor)
    with ExitStack() as stack:
        pool, host, link = host_parts(
            model.on_one().bank,  # of a part of the experts, costs could not be measured
            model.device,
            host_device or cpu_device(),
            threads or default_threads(model.device),
            bandwidth,
            host_bytes,
        )
        for part in (pool, host, link):
            if part is not None:
                stack.enter_context(closing(part))
        geometry = model.geometry(budget_bytes // model.bank.expert_bytes)
        forecasts = stack.enter_context(closing(Forecasts(predictor, model, geometry)))
        exact = numerics == "exact"
        if exact:
            check_exact(model, host.inside)
        runner = _layer_by_layer(
            model, chosen, budget_bytes, host, link, forecasts, costs, measure, pool, exact
        )
        if nothing_to_decide:
            runner.preload()
        on_accelerator = pool is None and model.partition is None and InStepCache.is_faster_on(model.device)
        decided = isinstance(policy, Guard) and alternates and not policy_is_obeyed and not exact
        made = alternating(runner) if decided and on_accelerator and not nothing_to_decide else runner
        stack.pop_all()  # from now on the runner closes them
        return made


def _layer_by_layer(
    model: Model,
    policy: PolicyBase,
    budget_bytes: int,
    host: HostExperts,
    link: Transfers,
    forecasts: Forecasts,
    costs: HardwareProfile | None,
    measure: Measure,
    pool: HostPool | None,
    exact: bool,
) -> LayerByLayer:
    """Builds a layer-by-layer runner from its parts, and divides the device's memory among them."""
    # The predictor's memory is taken off the budget first; experts get the rest.
    make: Callable[..., LayerByLayer] | None = None
    left, size, staged = forecasts.beside(budget_bytes), model.bank.expert_bytes, 0
    if model.device.platform != "cpu" and not isinstance(policy, Resident):
        # Experts are copied beside the slots, and then written into them.
        staged = staged_beside(left // size, size)
        left -= staged * size
    alone, partition = model.partition is None, model.partition
    in_a_step = isinstance(policy, InStep) and alone and pool is None and not exact
    if in_a_step and InStepCache.is_faster_on(model.device):
        make, slots = in_step(model, left)
        left -= slots * model.config.num_moe_layers * size
        if make is not None:
            policy = Streaming()
    residency = Residency(left, size)
    geometry = model.geometry(residency.slots)
    if costs is None and policy.uses_costs:
        near = {} if partition is None or len(partition.local) < 2 else {"neighbours": others_of(partition)}
        costs = measure(model.on_one(), host, link, residency.slots, **near)
    planned = costs
    if partition is not None:
        geometry = of_part(geometry, partition.each)
        planned = None if costs is None else sharing_host(costs, len(partition.local))
    state = forecasts.explained(budget_bytes, lambda: policy.init(geometry, planned))
    if 0 < budget_bytes < model.bank.expert_bytes:
        logger.warning(
            "device_budget is %s bytes, and one expert takes %s: none will be on the device",
            f"{budget_bytes:,}",
            f"{model.bank.expert_bytes:,}",
        )
    link.most_staged = staged or None  # from now on: what measures the link takes more at once
    in_memory = pool is None and isinstance(policy, Resident)
    resident = partition is None and in_memory and host.inside is not None and host.inside.target is not None
    with ExitStack() as opened:
        if partition is not None:
            links = [opened.enter_context(closing(each)) for each in links_to(partition, model.bank, link)]
            make = functools.partial(ExpertParallel, [(state, Residency(left, size), each) for each in links])
        runner = make or (ResidentOnCpu if resident else LayerByLayer)
        made = runner(model, policy, state, residency, link, host, forecasts, costs, pool, exact=exact)
        opened.pop_all()  # the runner closes them
        return made


def warn_of_single_programs(policy: PolicyBase, numerics: str) -> None:
    """Says where devices that share a model do not do what was asked for."""
    for asked, name in (
        (isinstance(policy, InStep), "policy='in-step'"),
        (numerics == "fast", "numerics='fast'"),
    ):
        if asked:
            warnings.warn(
                f"{name} is for a model on one device: several run it layer by layer, as other settings do",
                RuntimeWarning,
                stacklevel=2,
            )


def others_of(partition: Partition) -> list[jax.Device]:
    """Returns this process's devices beside its first one."""
    return [partition.devices[position] for position in partition.local[1:]]


def links_to(partition: Partition, bank: ExpertBank, first: Transfers) -> Iterator[Transfers]:
    """Makes the links to this process's other devices, like that to its first one."""
    held = partition.held.start
    for position in partition.local[1:]:
        own = partition.part(position)
        part = bank.part(range(own.start - held, own.stop - held))
        link = Transfers(part, partition.devices[position], first.bandwidth)
        link.most_staged = first.most_staged
        yield link


def staged_beside(slots: int, expert_bytes: int) -> int:
    """Returns how many of a budget's experts are set aside for copies that are not in slots yet.

    >>> staged_beside(2500, 9 * 2**20), staged_beside(60, 336 * 2**20), staged_beside(3, 2**20)
    (4, 2, 0)
    """
    wanted = min(MOST_STAGED, max(2, -(-2 * AHEAD_BYTES // expert_bytes)))
    return min(wanted, slots // 4)


def in_step(model: Model, budget_bytes: int) -> tuple[Callable[..., LayerByLayer] | None, int]:
    """Returns what makes a runner with the cache inside the step, and the slots of a layer.

    They are None and 0, with a warning, where nothing fills slots inside a step.

    Raises:
        ValueError: if the budget holds too few experts.
    """
    slots = slots_beside(model.geometry(budget_bytes // model.bank.expert_bytes))
    try:
        fill = fill_for(model.device)
    except Unavailable as error:
        warnings.warn(
            "policy 'in-step' plans decode steps layer by layer, as it cannot keep its cache inside them: "
            f"{error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, 0
    return functools.partial(InStepCache, slots, fill), slots
