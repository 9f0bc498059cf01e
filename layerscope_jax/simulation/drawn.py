"""Draws a simulated run into a timeline, in the lanes and words of a measured one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from layerscope_jax.runtime.timeline import Timeline
from layerscope_jax.scheduling.geometry import ExpertId, Geometry
from layerscope_jax.support.spans import NO_LAYER, Moved


class Drawn:
    """Enters the parts of a simulated run, whose times are in milliseconds, into a timeline.

    Args:
        timeline: the timeline.
        geometry: geometry of the model.
    """

    def __init__(self, timeline: Timeline, geometry: Geometry):
        self.timeline = timeline
        self._parts = geometry.arrays_per_expert
        self._expert_bytes = geometry.expert_bytes

    def add(
        self,
        lane: str,
        kind: str,
        began: float,
        ended: float,
        layer: int = NO_LAYER,
        experts: Sequence[int] = (),
    ) -> None:
        """Adds a span, unless it takes no time."""
        if ended > began:
            what = tuple(experts) or None
            self.timeline.add(lane, kind, 1e-3 * began, 1e-3 * ended, layer, what, len(experts))

    def experts(
        self,
        layer: int,
        experts: Sequence[int],
        missing: Collection[ExpertId],
        began: float,
        ended: float,
    ) -> None:
        """Adds a span of experts of the device, but those that are missing."""
        self.add("device", "experts", began, ended, layer, [e for e in experts if (layer, e) not in missing])

    def copy(self, expert: ExpertId, demanded: bool, left: int, began: float, ended: float) -> None:
        """Adds a span of the link; see `Link.told`."""
        part = self._parts - left
        moved = Moved(expert.expert, self._expert_bytes // self._parts, part, self._parts)
        kind = "demand" if demanded else "prefetch"
        self.timeline.add("link", kind, 1e-3 * began, 1e-3 * ended, expert.layer, moved)

    def read(self, expert: ExpertId, urgent: bool, began: float, ended: float) -> None:
        """Adds a span of the disk; see `Disk.told`."""
        moved, kind = Moved(expert.expert, self._expert_bytes), "read" if urgent else "read ahead"
        self.timeline.add("disk", kind, 1e-3 * began, 1e-3 * ended, expert.layer, moved)
