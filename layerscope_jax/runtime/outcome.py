"""What a policy came to (`Outcome`): one record for runs of an engine and for simulations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerscope_jax.runtime.statistics import Meter


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run and a simulation both can tell, so that one table may hold both.

    Attributes:
        policy: what decided ("resident" where everything fits).
        predictor: whose forecasts the policy was given; None for nobody's.
        budget_bytes: device memory allowed for experts and predictor; every hit rate is at this budget.
        peak_expert_bytes: most ever taken by resident experts and copies on their way.
        total_s: time of everything, on the clock that it ran by.
        ttft_s: time to first token, mean over requests; 0 if nothing was prefilled.
        tpot_s: time per output token: mean time of a decode step; 0 if there was none.
        device_share, host_share, link_share: busy time of each by total time.
        hit_rate: active experts that were resident when their layer was planned, by active experts.
        token_hit_rate: the same, each expert counted by its tokens.
        bytes_demand, bytes_prefetch, bytes_moved: sent over the link: on demand, ahead of it, together.
        bytes_wasted: prefetched and never used.
        forecast_recall: in decode steps, where n experts were active: those of them among the n that were
            expected most tokens for, one layer before; None without a forecast.
        prefetch_on_time: prefetched experts that were used and had arrived when their layer was planned, by
            all that were used; None where none was.
        share_of_bound: least time that the costs allow any policy, by what was taken; None if not asked for.
            See `layerscope_jax.runtime.lower_bound`.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def counted(meter: Meter, *, demand_bytes: int, prefetch_bytes: int, wasted_bytes: int) -> dict[str, Any]:
    """The fields of an `Outcome` that counts give, by name.

    Args:
        meter: of the layers.
        demand_bytes, prefetch_bytes: sent over the link.
        wasted_bytes: prefetched and never used.
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
    """The busy shares of an `Outcome`, from times in any one unit.

    >>> busy(4.0, device=1.0, host=4.000000001, link=0.0)  # sums are rounded
    {'device_share': 0.25, 'host_share': 1.0, 'link_share': 0.0}
    """
    parts = {"device": device, "host": host, "link": link}
    return {f"{name}_share": min(1.0, part / total) if total else 0.0 for name, part in parts.items()}
