"""Runs a model whose experts several devices share: each has its own budget, link, residency and plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.models.decoder import Between
from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.partition import of_device
from layerscope_jax.offload.residency import Residency
from layerscope_jax.offload.split_rows import SplitRows, exchanged_bytes
from layerscope_jax.runtime.computing import BothSides
from layerscope_jax.runtime.dense import StepInputs
from layerscope_jax.runtime.device_side import DeviceSide
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.lower_bound import least_decode_s
from layerscope_jax.runtime.processes import spans_processes
from layerscope_jax.runtime.warmup import Rehearsal
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan, Observation, Phase


class ParallelRehearsal(Rehearsal):
    """`Rehearsal` of the dense parts on each device; experts' programs are compiled when they are needed."""

    runner: ExpertParallel

    def _run(self, *inputs: Any) -> Any:
        self.runner.settle_if_needed()
        try:
            return self.runner.dense.through(self._layer, self.runner._nothing, *inputs)
        except BaseException:
            self.runner.settle()
            raise

    def _layer(
        self, layer: int, step: StepInputs, state: Between, caches: list[Any]
    ) -> tuple[Between, list[Any]]:
        runner = self.runner
        looks_ahead = runner.forecasts.in_layer is not None
        attended = runner.dense.attend(layer, step, state, caches, looks_ahead)
        hidden, _, experts, weights, caches, *_ = attended
        rows: list[Any] = [
            side.experts.take(experts.size, hidden.shape[-1], hidden.dtype) for side in runner.sides
        ]
        outputs = runner.joined(rows, experts)
        for side, row in zip(runner.sides, rows, strict=True):
            side.experts.give_back(row)
        return Between(hidden, outputs, weights), caches


class ExpertParallel(LayerByLayer):
    """Runs layers as `LayerByLayer`, each device of this process with the experts that it owns.

    Every device computes attention and router of every token, and so knows the whole routing. It plans for
    its own experts alone, computes them or has the host compute them, and then all rows are exchanged: in the
    program of the next layer, which adds them up as one device would. Other processes do the same with their
    devices, in the same order; they meet in those programs and exchange nothing else.

    Args:
        sides: of this process's devices after the first: policy state, residency and link of each.
        *others: those of `LayerByLayer`; state, residency and link are the first device's.
    """

    mode = "expert-parallel"
    rehearsed_by = ParallelRehearsal

    def __init__(self, sides: Sequence[tuple[Any, Residency, Transfers]], *others: Any, exact: bool = False):
        super().__init__(*others, exact=exact)
        assert self.model.partition is not None
        self.partition = self.model.partition
        self.sides += [self._side(number, *parts) for number, parts in enumerate(sides, 1)]
        for side in self.sides:
            side.experts.passes_rows_on = False  # rows of all devices are exchanged
            side.experts.spread = self.model.config.num_experts
        more = [BothSides(side.experts, self.host_experts, side.tier) for side in self.sides[1:]]
        self._parts = [self.experts, *more]
        self._zeros: dict[int, SplitRows] = {}
        self._host_rows: dict[int, np.ndarray] = {}

    def joined(self, rows: Sequence[Any], chosen: jax.Array) -> SplitRows:
        """Returns rows of each of this process's devices, for the program that exchanges them."""
        return SplitRows(self.partition.joined(rows), chosen, self.partition.each)

    def _nothing(self, total: int, width: int, dtype: np.dtype) -> Any:
        if total not in self._zeros:
            rows = [side.experts.nothing(total, width, dtype) for side in self.sides]
            choices = self.model.config.experts_per_token
            chosen = np.zeros((total // choices, choices), np.int32)
            self._zeros = {total: self.joined(rows, self.partition.replicate(chosen))}
        return self._zeros[total]

    def _layer(
        self, layer: int, step: StepInputs, state: Between, caches: list[Any]
    ) -> tuple[Between, list[Any]]:
        hidden, inputs, experts, weights, caches, expected, words = self.dense.attend(
            layer, step, state, caches, self._looks_ahead(step)
        )
        if words is not None:
            words.copy_to_host_async()
        total, width, dtype = experts.size, hidden.shape[-1], hidden.dtype
        outputs, local = [], []
        for side in self.sides:
            # Devices that are this CPU all read what its first one has, which alone is waited for.
            device = self.model.device if side.experts.waits else side.device
            rows: Any = side.experts.take(total, width, dtype)
            mine, chosen_there, places = (of_device(a, device) for a in (inputs, experts, step.positions))
            outputs.append(side.experts.begin(rows, mine, chosen_there, places, layer))
            local.append(mine)
        chosen, forecast, held = self._read_back(layer, experts, expected, inputs, weights, words)
        held = local[0] if held is inputs else held
        assigned = Assignments(chosen, step.active)
        seen, plans = self._decide_all(layer, step.phase, assigned, forecast)
        self._compute(outputs, local, held, assigned, plans, layer)
        self.forecasts.learn(seen, inputs, chosen, weights, step.active)
        size, choices = np.dtype(dtype).itemsize, experts.shape[1]
        self.account.meter.exchanged_bytes += exchanged_bytes(
            len(experts), choices, width, size, len(self.partition.devices)
        )
        return Between(hidden, self.joined(outputs, experts), weights), caches

    def _decide_all(
        self, layer: int, phase: Phase, rows: Assignments, expected: np.ndarray | None
    ) -> tuple[Observation, list[LayerPlan]]:
        """Asks the policy for each device's plan, counts them as one, and carries out evictions and copies.

        Returns:
            What is known of the whole layer, and the plans, in the numbers of each device.
        """
        account = self.account
        forecast = self.forecasts.read(layer, expected, sum(rows.demand.values()))
        resident: set[ExpertId] = set()
        idle: set[ExpertId] = set()
        plans = []
        for side in self.sides:
            own = side.own
            mine = {e - own.start: n for e, n in rows.demand.items() if e in own}
            ahead = [row[own.start : own.stop] for row in forecast]

            def enter(seen: Observation, plan: LayerPlan, prefetched: Any, start: int = own.start) -> None:
                for expert in seen.demand:
                    here, whole = ExpertId(layer, expert), ExpertId(layer, start + expert)
                    resident.update([whole] if here in seen.resident else [])
                    idle.update([whole] if here in prefetched else [])

            plans.append(side.decisions.plan(account.steps, layer, phase, mine, ahead, enter)[1])
        seen = Observation(
            step=account.steps,
            layer=layer,
            phase=phase,
            demand={e: n for e, n in rows.demand.items() if e in self.partition.held},
            resident=resident,
            in_flight=(),
            forecast=forecast,
        )
        account.enter(seen, together(plans, [side.own.start for side in self.sides]), idle)
        for side, plan in zip(self.sides, plans, strict=True):
            side.tier.follow(plan)
        return seen, plans

    def _compute(
        self,
        outputs: list[Any],
        inputs: Sequence[jax.Array],
        held: Any,
        rows: Assignments,
        plans: Sequence[LayerPlan],
        layer: int,
    ) -> None:
        """Computes a layer's experts on all devices and the host; `outputs` become those with their rows."""
        meter, host, sides = self.account.meter, self.host_experts, self.sides
        mine = rows.part(self.partition.held)
        parts = [rows.part(side.own) for side in sides]
        host_ids = [s.within.start + e for s, plan in zip(sides, plans, strict=True) for e in plan.host]
        waits = sides[0].experts.waits
        job = None
        if host_ids:
            host_rows = self._rows_of_host(outputs[0])
            if not waits:
                job = host.start(host_rows, layer, held, mine, host_ids)
        begun = []
        for number, part in enumerate(self._parts):
            outputs[number], *_ = found = part.ready(
                outputs[number], inputs[number], parts[number], plans[number], meter
            )
            begun.append(found)
        if host_ids and job is None:
            host.compute(host_rows, layer, held, mine, host_ids)
        for number, part in enumerate(self._parts):
            _, done, since, missing = begun[number]
            outputs[number], done, since = part.arriving(
                outputs[number], inputs[number], parts[number], layer, missing, done, since, meter
            )
            self._since = since
        if job is not None:
            job.result()
        for number, side in enumerate(sides):
            plan = plans[number]
            if plan.host:
                outputs[number] = self._placed(side, outputs[number], host_rows, parts[number], plan)
            side.experts.give_back(outputs[number])

    def _rows_of_host(self, outputs: Any) -> np.ndarray:
        """Returns the array [T * K + 1, D] to which the host writes the rows of all devices."""
        if len(outputs) not in self._host_rows:
            self._host_rows = {len(outputs): np.zeros(outputs.shape, outputs.dtype)}
        return self._host_rows[len(outputs)]

    def _placed(
        self, side: DeviceSide, outputs: Any, host_rows: np.ndarray, rows: Assignments, plan: LayerPlan
    ) -> Any:
        if side.experts.waits:  # in this machine's memory
            for expert in plan.host:
                taken = rows.slots(expert)
                outputs[taken] = host_rows[taken]
            return outputs
        return side.experts.place(outputs, host_rows, rows, plan.host)

    def _least_s(self, decoded: list[dict[int, int]], costs: HardwareProfile) -> float | None:
        if spans_processes(self.partition):
            return None  # this one does not know what the others' experts had to compute
        return least_decode_s(decoded, self.geometry, costs, len(self.partition.devices))

    def settle(self) -> None:
        super().settle()
        self._host_rows.clear()


def together(plans: Sequence[LayerPlan], firsts: Sequence[int]) -> LayerPlan:
    """Returns the plans of several devices as one, in the numbers of the model.

    >>> together([LayerPlan(step=0, layer=1, device=(0,)), LayerPlan(step=0, layer=1, host=(2,))], [0, 4])
    LayerPlan(step=0, layer=1, device=(0,), host=(6,), evict=(), load=(), prefetch=(), read=(), read_ahead=())
    """
    pairs = list(zip(plans, firsts, strict=True))

    def ids(name: str) -> tuple[ExpertId, ...]:
        return tuple(
            ExpertId(layer, first + expert) for plan, first in pairs for layer, expert in getattr(plan, name)
        )

    return LayerPlan(
        step=plans[0].step,
        layer=plans[0].layer,
        device=tuple(first + expert for plan, first in pairs for expert in plan.device),
        host=tuple(first + expert for plan, first in pairs for expert in plan.host),
        evict=ids("evict"),
        load=ids("load"),
        prefetch=ids("prefetch"),
    )
