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
"""Largest index of a step, a layer or an expert in a file of plans."""

READS = frozenset(["read", "read_ahead"])
"""Fields of plans that are recorded only if experts are on the disk."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything that a policy is shown when it plans one layer of one step.

    Attributes:
        step: index of the forward pass within one call of `generate`: 0 for the call's first prefill, then
            counting through the decode steps and later prefills.
        layer: index of the layer about to be computed, among those with routed experts.
        phase: "prefill" or "decode".
        demand: number of tokens routed to each active expert of this layer, by expert.
        resident: experts in device memory, of all layers.
        in_flight: experts whose copy to the device is queued or has begun.
        forecast: `[W][E]` expected tokens of each expert in the W layers after this one, continuing after the
            last layer with the first layers of the next step; empty without a predictor.
        elapsed_ms: measured time (ms) from the previous plan to this one, or to the end of the previous
            plan's step if that came first; 0 if not known.
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
    """The decision for one layer of one step; a record that can be saved, compared and replayed.

    Attributes:
        step, layer: the step and the layer that are planned.
        device: active experts to compute on the device.
        host: active experts to compute on the host; each active expert is in exactly one of `device` and
            `host`.
        evict: experts to evict from the device before anything is loaded.
        load: on-demand loads: experts of `device` that must be copied now, in the order in which they are
            needed.
        prefetch: experts to copy ahead of time, whenever no on-demand load is waiting, most valuable first.
        read: experts that must be read from the disk before the host can compute or the link can copy them,
            in that order of need. Policies leave this and `read_ahead` empty: they are added to every plan
            (`layerscope_jax.scheduling.reads`) of a model whose experts are on the disk.
        read_ahead: experts to read ahead of time, whenever nothing else is to be read, most valuable first.
    """

    step: int
    layer: int
    device: tuple[int, ...] = ()
    host: tuple[int, ...] = ()
    evict: tuple[ExpertId, ...] = ()
    load: tuple[ExpertId, ...] = ()
    prefetch: tuple[ExpertId, ...] = ()
    read: tuple[ExpertId, ...] = ()
    read_ahead: tuple[ExpertId, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as a record, without `read` and `read_ahead` if both are empty."""
        record = asdict(self)
        if not (self.read or self.read_ahead):
            del record["read"], record["read_ahead"]
        return record

    @classmethod
    def from_json(cls, record: Any) -> LayerPlan:
        """Returns the plan in a record that `to_json` made.

        Raises:
            ValueError: if the record is not such a plan; says what was expected.
        """
        names = [field.name for field in fields(cls) if field.name not in READS]
        if not isinstance(record, dict) or record.keys() - READS != set(names):
            raise ValueError(f"expected an object with {', '.join(names)}")

        def numbers(values: Any, what: str) -> tuple[int, ...]:
            if not isinstance(values, list | tuple):
                raise ValueError(f"{what} must be a list, got {str(values)[:40]!r}")
            wrong = [value for value in values if type(value) is not int or not 0 <= value <= MOST]
            if wrong:
                raise ValueError(f"{what} must hold whole numbers in 0..{MOST}, got {str(wrong[0])[:40]!r}")
            return tuple(values)

        def ids(key: str) -> tuple[ExpertId, ...]:
            pairs = record.get(key, ())
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
            read=ids("read"),
            read_ahead=ids("read_ahead"),
        )


class Policy(Protocol):
    """Decides where each active expert is computed, and which experts are copied and evicted.

    Both methods are pure: they use no clock, no arrays and no device. The state belongs to the policy; the
    engine only passes it from one call of `plan` to the next.

    A class derived from `PolicyBase` can do more than plan, such as decline forecasts or report statistics.

    Attributes:
        name: name in statistics and tables.
        uses_costs: whether `init` needs a measured `HardwareProfile`.
    """

    name: str
    uses_costs: bool

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> Any:
        """Returns the initial state.

        Args:
            geometry: numbers of layers and experts, and how many experts the budget holds.
            profile: measured costs of the machine; may be None if `uses_costs` is false.

        Raises:
            ValueError: if the budget is too small for this policy.
        """

    def plan(self, state: Any, seen: Observation) -> tuple[Any, LayerPlan]:
        """Returns the next state and the plan for one layer of one step.

        Args:
            state: what `init` or the previous call of `plan` returned.
            seen: what is known about the layer.
        """


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
            f"plan() of policy {policy.name!r} must return (state, LayerPlan), got {str(answer)[:80]!r} for "
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
        slots: number of experts that the device budget holds.
        known: the experts that exist; None skips that check.
        policy: name of the policy, for messages.

    Raises:
        ValueError: if the plan names anything but experts, computes an active expert not exactly once,
            computes an expert on the device that is neither resident nor loaded, evicts an expert that is
            needed or absent, copies an expert that is present or does not exist, names an expert twice, or
            would put more than `slots` experts on the device or in flight.
    """
    where = f"plan for step {plan.step}, layer {plan.layer}"
    if policy is not None:
        where += f", by policy {policy!r}"
    try:
        _check(plan, seen, slots, known, where)
    except (TypeError, AttributeError) as error:  # the plan holds values that are not experts
        raise ValueError(f"{where}: {EXPECTED}, got {str(plan)[:200]}") from error


WHOLE = frozenset([int, *(np.dtype(code).type for code in "bhilqBHILQ")])
EXPECTED = "expected tuples of expert numbers (device, host) and of ExpertIds (evict, load, prefetch)"


def _check(
    plan: LayerPlan, seen: Observation, slots: int, known: Container[ExpertId] | None, where: str
) -> None:
    def refuse(what: str, experts: Iterable) -> None:
        named = sorted(experts)
        if named:
            raise ValueError(f"{where}: {what}: {named}")

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

    # Only experts that the plan names are looked up, because the sets of resident experts may be large. Plans
    # that move nothing return early, because this runs in every layer.
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
    """Repeats recorded plans: computes each expert on the side that computed it in the recording.

    Each call of `generate` replays the recorded call from its beginning; prompts, settings and budget must be
    those of the recording. Where experts are computed is always repeated. Copies and evictions are repeated
    as far as the device holds the same experts as in the recording: an expert that is present is not copied
    again, and if room is short, experts that the layer does not need are evicted. So a replay from the same
    residency (for example, if recording and replay are both the first call of a new engine) gives equal
    plans, provided that prefetches arrive at the same times. If an expert that is to be evicted, or must make
    room, is still in flight, the layer waits for it: the speed of copies never decides whether there is room.

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
                "expected recorded plans, got none; if every expert fits, there are no plans to record: "
                "record with a smaller device_budget"
            )

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> int:
        for plan in self.plans.values():
            moved = (*plan.evict, *plan.load, *plan.prefetch)
            layers = [plan.layer, *(expert.layer for expert in moved)]
            experts = [*plan.device, *plan.host, *(expert.expert for expert in moved)]
            if max(layers) >= geometry.num_layers or max(experts, default=0) >= geometry.num_experts:
                raise ValueError(
                    f"the recorded plans are of another model: the plan for step {plan.step}, layer "
                    f"{plan.layer} names layer {max(layers)} and expert {max(experts, default=0)}, but this "
                    f"model's layers are 0..{geometry.num_layers - 1}, its experts "
                    f"0..{geometry.num_experts - 1}; replay with the model of the recording"
                )
        return geometry.slots

    def awaits_link(self, state: int, seen: Observation) -> bool:
        """Returns whether an expert in flight is to be evicted, or leaves no room for needed experts."""
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
                "replay with the prompts and settings of the recording"
            )
        occupied = {*seen.resident, *seen.in_flight}
        needed = [ExpertId(seen.layer, expert) for expert in recorded.device]
        load = [e for e in dict.fromkeys((*recorded.load, *needed)) if e not in occupied]
        evict = [e for e in recorded.evict if e in seen.resident]
        room = state - len(occupied) + len(evict) - len(load)
        if room < 0:
            spare = set(seen.resident).difference(needed, evict)
            evict += sorted(spare, key=lambda e: (e in recorded.prefetch, e))[:-room]
            room = 0
        occupied.difference_update(evict)
        prefetch = [e for e in recorded.prefetch if e not in occupied][:room]
        return state, replace(
            recorded,
            evict=tuple(evict),
            load=tuple(load),
            prefetch=tuple(prefetch),
            read=(),
            read_ahead=(),
        )
