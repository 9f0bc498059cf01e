"""Adds to a plan what its experts need from the disk, and what to read ahead for the coming layers.

Policies decide between device and host as if every expert were in host memory. What that asks of the disk
follows from their plan and from what host memory holds, so that every policy works over a disk unchanged.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from math import inf, log2

from layerscope_jax.scheduling.geometry import ExpertId
from layerscope_jax.scheduling.plan import LayerPlan, Observation

Forecast = Sequence[Sequence[float]]

LIKELY = 0.5
"""Expected tokens from which on an expert is read ahead. Reads ahead take turns with those that layers wait
for, so that one which is used less often than not costs more than it gains (`benchmarks/bench_disk.py`)."""


def with_reads(
    plan: LayerPlan,
    seen: Observation,
    in_memory: Container[ExpertId],
    forecast: Forecast,
    num_layers: int,
    room: int,
) -> LayerPlan:
    """Returns a plan with `read` and `read_ahead`.

    Experts are read ahead layer by layer, nearest first; of each layer at most as many as this layer has
    active experts, those with the most expected tokens, if these are likely. Experts that are in memory
    already are listed too, because they must not make way for others.

    Args:
        plan: a plan that `check_plan` accepts.
        seen: the observation that it was made from.
        in_memory: experts that are in host memory or being read.
        forecast: [W][E] expected tokens in the W layers after this one, as in `Observation`; it may be of
            another predictor than the policy's.
        num_layers: L, number of MoE layers.
        room: number of experts that host memory holds.

    >>> plan = LayerPlan(step=0, layer=0, host=(0, 2))
    >>> seen = Observation(step=0, layer=0, phase="decode", demand={0: 1, 2: 1}, resident=(), in_flight=())
    >>> more = with_reads(plan, seen, {ExpertId(0, 0)}, [[0.0, 0.5, 0.9]], num_layers=2, room=4)
    >>> more.read, more.read_ahead
    ((ExpertId(layer=0, expert=2),), (ExpertId(layer=1, expert=2), ExpertId(layer=1, expert=1)))
    """
    layer = plan.layer
    needed = dict.fromkeys(plan.load)
    needed |= dict.fromkeys([ExpertId(layer, expert) for expert in plan.host])
    needed |= dict.fromkeys(plan.prefetch)
    read = [expert for expert in needed if expert not in in_memory]
    ahead: list[ExpertId] = []
    room -= len(needed)
    evicted = set(plan.evict)
    for horizon, row in enumerate(forecast, 1):
        if room <= 0:
            break
        target = (layer + horizon) % num_layers
        if target == layer:  # a full turn: nothing more is known of the layers after it
            break
        likely = [number for number, tokens in enumerate(row) if tokens >= LIKELY]
        for number in sorted(likely, key=lambda number: (-row[number], number))[: len(seen.demand)]:
            expert = ExpertId(target, number)
            on_device = (expert in seen.resident and expert not in evicted) or expert in seen.in_flight
            if on_device or expert in needed:
                continue
            ahead.append(expert)
            room -= 1
            if room <= 0:
                break
    return replace(plan, read=tuple(read), read_ahead=tuple(ahead))


HALF_LIFE = 64.0
"""Steps after which a use of an expert counts half."""


class Uses:
    """Tells which expert of several to give up first: the one used least, where recent uses count more.

    The decode steps of a model go through its layers in turn, so the expert unused for longest, which most
    caches give up, is often one of the next layer.

    Args:
        num_layers: L, number of MoE layers.

    >>> uses, (a, b) = Uses(num_layers=1), [ExpertId(0, 0), ExpertId(0, 1)]
    >>> for used in ([a], [a], [b]): uses.count(used)
    >>> uses.worth(a) > uses.worth(b) > uses.worth(ExpertId(0, 2))
    True
    """

    def __init__(self, num_layers: int):
        self._worth: dict[ExpertId, float] = {}
        self._now = 0.0  # in half-lives
        self._tick = 1.0 / (HALF_LIFE * num_layers)

    def count(self, experts: Iterable[ExpertId]) -> None:
        """Counts the experts that a layer used."""
        self._now = now = self._now + self._tick
        for expert in experts:
            # log2 of the decayed count, plus the time: the order of these does not change while time passes.
            before = self._worth.get(expert)
            self._worth[expert] = now if before is None else now + log2(1.0 + 2.0 ** (before - now))

    def worth(self, expert: ExpertId | None) -> float:
        """Returns a number that is the higher the later an expert should be given up."""
        return self._worth.get(expert, -inf) if expert is not None else -inf
