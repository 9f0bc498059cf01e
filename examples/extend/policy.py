"""A policy of your own, in one file: first in, first out.

Import this module, or install the folder (`pip install examples/extend`), and `fifo` is a policy like the
others: in `OffloadConfig(policy="fifo")`, in the simulator and, once installed, on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerscope_jax import ExpertId, Geometry, HardwareProfile, LayerPlan, Observation, register_policy
from layerscope_jax.scheduling.demand import answer, busiest_first, need_a_layer, present


@dataclass(frozen=True)
class Arrivals:
    """What the policy remembers: the experts on the device in the order in which they were loaded."""

    slots: int
    order: tuple[ExpertId, ...] = ()


@register_policy
class FIFO:
    """Copies each missing expert when it is needed; the expert that was loaded first is evicted first."""

    name = "fifo"
    uses_costs = False  # `init` needs no measured HardwareProfile
    uses_forecasts = False  # `plan` does not look at `Observation.forecast`

    def init(self, geometry: Geometry, profile: HardwareProfile | None) -> Arrivals:
        """Returns the first state; refuses a budget that cannot hold one layer's experts."""
        need_a_layer(geometry, self.name)
        return Arrivals(geometry.slots)

    def plan(self, state: Arrivals, seen: Observation) -> tuple[Arrivals, LayerPlan]:
        """Decides one layer of one step."""
        needed = [ExpertId(seen.layer, expert) for expert in busiest_first(seen)]
        load = [expert for expert in needed if not present(expert, seen)]
        known = [expert for expert in state.order if expert in seen.resident]
        order = sorted(set(seen.resident).difference(known)) + known

        too_many = len(seen.resident) + len(seen.in_flight) + len(load) - state.slots
        evict = [expert for expert in order if expert not in needed][: max(0, too_many)]
        load = load[: len(load) - max(0, too_many - len(evict))]  # the host computes what finds no room
        device = [expert.expert for expert in needed if present(expert, seen) or expert in load]

        order = [expert for expert in order if expert not in evict] + load
        return Arrivals(state.slots, tuple(order)), answer(seen, device, evict=evict, load=load)
