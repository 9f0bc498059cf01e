"""Records of scheduling: what a policy sees (`Observation`) and what it decides (`LayerPlan`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.geometry import ExpertId, Geometry
from layerscope_jax.scheduling.policy import PolicyBase

Phase = Literal["prefill", "decode"]

MOST = 2**31 - 1
"""Largest number of a step, a layer or an expert in a file of plans."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything that a policy is shown when it plans one layer of one step.

    Attributes:
        step: number of the forward pass within one call of `generate`: 0 for its first prefill, then on
            through the decode steps and the prefills of later batches.
        layer: the layer about to be computed.
        phase: "prefill" or "decode".
        demand: expert -> tokens routed to it, for the active experts of this layer.
        resident: experts in device memory, of all layers.
        in_flight: experts whose copy to the device is queued or has begun.
        forecast: [W][E] expected tokens of each expert in the W layers after this one, the first layers of
            the next step following the last; empty without a predictor.
        elapsed_ms: measured from the plan before to this one, or to the end of its step; 0 if not known.
    """

    step: int
    layer: int
    phase: Phase
    demand: Mapping[int, int]
    resident: Collection[ExpertId]
    in_flight: Collection[ExpertId]
    forecast: Sequence[Sequence[float]] = ()
    elapsed_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer's decision. Saved, compared and replayed as it is.

    Attributes:
        step, layer: the step and the layer that it is for.
        device: active experts computed on the device.
        host: active experts computed by the host; with `device`, each active expert exactly once.
        evict: experts that leave the device before anything is loaded.
        load: on-demand loads: experts of `device` that must be copied now, first needed first.
        prefetch: experts of later layers to copy when no demand waits, most valuable first.
    """

    step: int
    layer: int
    device: tuple[int, ...] = ()
    host: tuple[int, ...] = ()
    evict: tuple[ExpertId, ...] = ()
    load: tuple[ExpertId, ...] = ()
    prefetch: tuple[ExpertId, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any) -> LayerPlan:
        """Reads what `to_json` gave.

        Raises:
            ValueError: if it is something else, with what was expected.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(record, dict) or record.keys() != set(names):
            raise ValueError(f"expected an object with {', '.join(names)}")

        def numbers(values: Any, what: str) -> tuple[int, ...]:
            if not isinstance(values, list | tuple):
                raise ValueError(f"{what} must be a list, got {str(values)[:40]!r}")
            wrong = [value for value in values if type(value) is not int or not 0 <= value <= MOST]
            if wrong:
                raise ValueError(f"{what} must hold whole numbers in 0..{MOST}, got {str(wrong[0])[:40]!r}")
            return tuple(values)

        def ids(key: str) -> tuple[ExpertId, ...]:
            pairs = record[key]
            if not isinstance(pairs, list | tuple) or not all(
                isinstance(pair, list | tuple) for pair in pairs
            ):
                raise ValueError(f"{key} must be a list of [layer, expert], got {str(pairs)[:40]!r}")
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError(f"{key} must be a list of [layer, expert], got {str(pairs)[:40]!r}")
            return tuple(ExpertId(*numbers(pair, key)) for pair in pairs)

        step, layer = numbers([record["step"], record["layer"]], "step and layer")
        return cls(
            step=step,
            layer=layer,
            device=numbers(record["device"], "device"),
            host=numbers(record["host"], "host"),
            evict=ids("evict"),
            load=ids("load"),
            prefetch=ids("prefetch"),
        )


class Policy(Protocol):
    """Decides where each active expert is computed and what is moved. Pure: no clock, no arrays, no device.

    The state is the policy's own; the engine only passes it from one call to the next.

    A class derived from `PolicyBase` can say more: when it wants forecasts, what it reports, and so on.

    Attributes:
        name: in statistics and tables.
        uses_costs: whether `init` needs a measured `HardwareProfile`.
    """

    name: str
    uses_costs: bool

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> Any:
        """Returns the first state. Raises ValueError if the budget is too small for this policy."""

    def plan(self, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
        """Decides one layer of one step."""


def ask(policy: Policy | PolicyBase, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
    """Returns a policy's new state and its plan, which `check_plan` has yet to check.

    Raises:
        ValueError: if the policy returns something else. Its own exceptions pass through, with a note of the
            step and layer.
    """
    try:
        answer = policy.plan(state, seen)
    except Exception as error:
        error.add_note(f"in plan() of policy {policy.name!r}, for step {seen.step}, layer {seen.layer}")
        raise
    if type(answer) is not tuple or len(answer) != 2 or not isinstance(answer[1], LayerPlan):
        raise ValueError(
            f"plan() of policy {policy.name!r} must give (state, LayerPlan), got {str(answer)[:80]!r} for "
            f"step {seen.step}, layer {seen.layer}"
        )
    return answer


def check_plan(
    plan: LayerPlan,
    seen: Observation,
    slots: int,
    known: Container[ExpertId] | None = None,
    policy: str | None = None,
) -> None:
    """Refuses a plan that could not give the right output or would not fit the budget.

    Args:
        plan: the plan.
        seen: the observation that it was made from.
        slots: how many experts the device budget holds.
        known: the experts that exist; None skips that check.
        policy: name of the policy, for messages.

    Raises:
        ValueError: if it holds other things than experts, an active expert is not computed exactly once, a
            device expert is neither resident nor loaded, something needed or absent is evicted, something
            present or unknown is copied, an expert is named twice, or more than `slots` experts would be on
            the device or on their way.
    """
    where = f"plan for step {plan.step}, layer {plan.layer}"
    if policy is not None:
        where += f", by policy {policy!r}"
    try:
        _check(plan, seen, slots, known, where)
    except (TypeError, AttributeError) as error:  # of what cannot be in a set, or is none
        raise ValueError(f"{where}: {EXPECTED}, got {str(plan)[:200]}") from error


WHOLE = frozenset([int, *(np.dtype(code).type for code in "bhilqBHILQ")])
EXPECTED = "expected tuples of expert numbers (device, host) and of ExpertIds (evict, load, prefetch)"


def _check(
    plan: LayerPlan, seen: Observation, slots: int, known: Container[ExpertId] | None, where: str
) -> None:
    def refuse(what: str, experts: Iterable) -> None:
        found = sorted(experts)
        if found:
            raise ValueError(f"{where}: {what}: {found}")

    if (plan.step, plan.layer) != (seen.step, seen.layer):
        raise ValueError(f"{where} was given for step {seen.step}, layer {seen.layer}")
    chosen = {*plan.device, *plan.host}
    if not {*map(type, plan.device), *map(type, plan.host)} <= WHOLE:  # 1.0 and True are equal to 1
        raise TypeError
    if chosen != seen.demand.keys():
        refuse("active experts computed nowhere", seen.demand.keys() - chosen)
        refuse("experts computed without demand", chosen - seen.demand.keys())
    if len(chosen) < len(plan.device) + len(plan.host):
        refuse("experts computed more than once", Counter(plan.device + plan.host) - Counter(chosen))

    # Only what the plan names is looked up: the sets of resident experts may be large. This is done in every
    # layer, so a plan that moves nothing is through soon.
    layer, resident, in_flight = plan.layer, seen.resident, seen.in_flight
    if not (plan.evict or plan.load or plan.prefetch):
        absent = [e for e in plan.device if (layer, e) not in resident and (layer, e) not in in_flight]
        refuse("computed on the device, but neither present nor loaded", [ExpertId(layer, e) for e in absent])
        if len(resident) + len(in_flight) <= slots:
            return
    if not all(type(e) is ExpertId for e in (*plan.evict, *plan.load, *plan.prefetch)):
        raise TypeError
    evicted, loaded, prefetched = set(plan.evict), set(plan.load), set(plan.prefetch)
    device = {ExpertId(layer, e) for e in plan.device}

    def present(expert: ExpertId) -> bool:
        return (expert in seen.resident and expert not in evicted) or expert in seen.in_flight

    refuse("evicted, though not resident", (e for e in evicted if e not in seen.resident))
    refuse("evicted, though computed on the device in this layer", evicted & device)
    refuse("loaded, though not computed on the device in this layer", loaded - device)
    refuse("loaded, though present", (e for e in loaded if present(e)))
    refuse("prefetched, though present", (e for e in prefetched if present(e) or e in loaded))
    refuse(
        "computed on the device, but neither present nor loaded",
        (e for e in device - loaded if not present(e)),
    )
    if known is not None:
        refuse("prefetched, though the model has no such expert", (e for e in prefetched if e not in known))
    refuse("evicted twice", Counter(plan.evict) - Counter(evicted))
    refuse("copied twice", Counter(plan.load + plan.prefetch) - Counter(loaded | prefetched))
    needed = len(seen.resident) + len(seen.in_flight) - len(evicted) + len(loaded) + len(prefetched)
    if needed > slots:
        raise ValueError(f"{where}: needs room for {needed} experts, the budget holds {slots}")


class Replay(PolicyBase):
    """Repeats recorded plans: each expert is computed where it was, whatever policy decided that.

    Each call of `generate` replays the recorded one from its beginning; prompts, settings and budget must be
    those of the recording. What is computed where is repeated always. What moves is repeated as far as the
    device holds what it held then: what is there is not copied again, and where room is short, experts that
    the layer does not need leave. So a replay from the same residency (the first call of a new engine, of a
    recording of such a call) gives equal plans, provided that prefetches arrive as they did. Where one is
    late that had made room by now, the layer waits for it: how fast copies are never decides whether there is
    room.

    >>> plan = LayerPlan(step=0, layer=0, device=(2,), load=(ExpertId(0, 2),))
    >>> seen = Observation(step=0, layer=0, phase="prefill", demand={2: 1}, resident=(), in_flight=())
    >>> replay, slots = Replay([plan]), 4
    >>> replay.plan(slots, seen)[1] == plan
    True
    >>> replay.plan(slots, replace(seen, resident={ExpertId(0, 2)}))[1].load
    ()
    """

    name = "replay"
    uses_forecasts = False

    def __init__(self, plans: Iterable[LayerPlan]):
        self.plans = {(plan.step, plan.layer): plan for plan in plans}
        if not self.plans:
            raise ValueError(
                "expected recorded plans, got none; where every expert fits nothing is decided, "
                "record within a smaller device_budget"
            )

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> int:
        for plan in self.plans.values():
            moved = (*plan.evict, *plan.load, *plan.prefetch)
            layers = [plan.layer, *(expert.layer for expert in moved)]
            experts = [*plan.device, *plan.host, *(expert.expert for expert in moved)]
            if max(layers) >= geometry.num_layers or max(experts, default=0) >= geometry.num_experts:
                raise ValueError(
                    f"the recorded plans are of another model: that for step {plan.step}, layer {plan.layer} "
                    f"has layer {max(layers)} and expert {max(experts, default=0)}, this model's are "
                    f"0..{geometry.num_layers - 1} and 0..{geometry.num_experts - 1}"
                )
        return geometry.slots

    def awaits_link(self, state: int, seen: Observation) -> bool:
        """Whether something is on its way that is to leave, or that there is no room beside."""
        recorded = self.plans.get((seen.step, seen.layer))
        if recorded is None or not seen.in_flight:
            return False
        coming = set(seen.in_flight)
        needed = {ExpertId(seen.layer, expert) for expert in recorded.device}
        return len(coming | needed) > state or not coming.isdisjoint(recorded.evict)

    def plan(self, state: int, seen: Observation) -> tuple[int, LayerPlan]:
        recorded = self.plans.get((seen.step, seen.layer))
        if recorded is None:
            raise ValueError(
                f"the recorded plans end before step {seen.step}, layer {seen.layer}; "
                "replay the prompts and settings that they were recorded with"
            )
        here = {*seen.resident, *seen.in_flight}
        needed = [ExpertId(seen.layer, expert) for expert in recorded.device]
        load = [e for e in dict.fromkeys((*recorded.load, *needed)) if e not in here]
        evict = [e for e in recorded.evict if e in seen.resident]
        room = state - len(here) + len(evict) - len(load)
        if room < 0:
            spare = set(seen.resident).difference(needed, evict)
            evict += sorted(spare, key=lambda e: (e in recorded.prefetch, e))[:-room]
            room = 0
        here.difference_update(evict)
        prefetch = [e for e in recorded.prefetch if e not in here][:room]
        return state, replace(recorded, evict=tuple(evict), load=tuple(load), prefetch=tuple(prefetch))
