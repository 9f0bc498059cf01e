"""Results of running a policy (`Outcome`): one record for runs of an engine and for simulations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerscope_jax.offload.pool import DiskStats
    from layerscope_jax.runtime.statistics import Meter


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Statistics that a run and a simulation both report, so that one table can hold both.

    Attributes:
        policy: name of the policy; "resident" if every expert fits.
        predictor: name of the predictor whose forecasts the policy used; None without a predictor.
        budget_bytes: device memory (bytes) allowed for experts and predictor; the hit rates hold for it.
        peak_expert_bytes: peak device memory (bytes) of resident experts and copies in flight.
        total_s: total time (s), by the wall clock or the simulator's clock.
        ttft_s: time to first token (s), mean over requests; 0 if nothing was prefilled.
        tpot_s: time per output token (s): mean time of a decode step; 0 if there was none.
        device_share, host_share, link_share: busy time of each, divided by the total time.
        hit_rate: fraction of active experts that were resident when their layer was planned.
        token_hit_rate: the same, with each expert weighted by its tokens.
        bytes_demand, bytes_prefetch, bytes_moved: bytes sent over the link by on-demand loads, by prefetches,
            and by both together.
        bytes_wasted: bytes that were prefetched and never used.
        forecast_recall: fraction of the active experts of decode steps that were forecast one layer ahead: of
            n active experts, those among the n with the most expected tokens; None without a forecast.
        prefetch_on_time: fraction of the used prefetched experts that had arrived when their layer was
            planned; None if none was used.
        share_of_bound: lower bound on the time under any policy, by the machine's costs, divided by the time
            taken; None if not asked for. See `layerscope_jax.runtime.lower_bound`, which takes every expert
            to be in host memory.
        disk_share: busy time of the disk divided by the total time; 0 if every expert is in host memory, as
            for the other figures of the disk.
        host_hit_rate: fraction of the experts that layers needed from host memory, to compute or to copy them
            on demand, that were there when the layer was planned; None if no expert is on the disk.
        bytes_read, bytes_read_ahead: bytes read from the disk, and those of them that no layer waited for.
        bytes_read_wasted: bytes that were read ahead and not used before they made way for others.
        disk_wait_s: time (s) in which a layer waited for experts that were not in host memory.
    """

    policy: str
    predictor: str | None
    budget_bytes: int
    peak_expert_bytes: int
    total_s: float
    ttft_s: float
    tpot_s: float
    device_share: float
    host_share: float
    link_share: float
    hit_rate: float
    token_hit_rate: float
    bytes_demand: int
    bytes_prefetch: int
    bytes_moved: int
    bytes_wasted: int
    forecast_recall: float | None
    prefetch_on_time: float | None
    share_of_bound: float | None
    disk_share: float = 0.0
    host_hit_rate: float | None = None
    bytes_read: int = 0
    bytes_read_ahead: int = 0
    bytes_read_wasted: int = 0
    disk_wait_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def counted(meter: Meter, *, demand_bytes: int, prefetch_bytes: int, wasted_bytes: int) -> dict[str, Any]:
    """Returns the fields of an `Outcome` that are computed from counts, by name.

    Args:
        meter: counts of the layers.
        demand_bytes, prefetch_bytes: bytes sent over the link.
        wasted_bytes: bytes prefetched and never used.
    """
    used_prefetches = meter.on_time + meter.late
    return {
        "hit_rate": meter.expert_hits / meter.experts if meter.experts else 1.0,
        "token_hit_rate": meter.token_hits / meter.tokens if meter.tokens else 1.0,
        "bytes_demand": demand_bytes,
        "bytes_prefetch": prefetch_bytes,
        "bytes_moved": demand_bytes + prefetch_bytes,
        "bytes_wasted": wasted_bytes,
        "forecast_recall": meter.foreseen / meter.foreseeable if meter.foreseeable else None,
        "prefetch_on_time": meter.on_time / used_prefetches if used_prefetches else None,
    }


def busy(total: float, *, device: float, host: float, link: float) -> dict[str, Any]:
    """Returns the busy shares of an `Outcome`, from times that are all in the same unit.

    >>> busy(4.0, device=1.0, host=4.000000001, link=0.0)  # sums are rounded
    {'device_share': 0.25, 'host_share': 1.0, 'link_share': 0.0}
    """
    parts = {"device": device, "host": host, "link": link}
    return {f"{name}_share": min(1.0, part / total) if total else 0.0 for name, part in parts.items()}


def read(disk: DiskStats, expert_bytes: int, total: float) -> dict[str, Any]:
    """Returns the fields of an `Outcome` about the disk, by name.

    Args:
        disk: counts of the disk.
        expert_bytes: size (bytes) of an expert.
        total: total time, in the unit of the disk's busy time.
    """
    needed = disk.hits + disk.misses
    return {
        "disk_share": min(1.0, disk.busy_s / total) if total else 0.0,
        "host_hit_rate": disk.hits / needed if needed else None,
        "bytes_read": disk.demand_bytes + disk.ahead_bytes,
        "bytes_read_ahead": disk.ahead_bytes,
        "bytes_read_wasted": disk.wasted * expert_bytes,
        "disk_wait_s": disk.wait_s,
    }
