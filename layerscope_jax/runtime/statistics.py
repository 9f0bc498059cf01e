"""What a run did, in the field's terms."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from layerscope_jax.scheduling.plan import ExpertId, Observation


@dataclass
class Meter:
    """Counts of the engine's own, since the last reset."""

    device_busy_s: float = 0.0
    layers: int = 0
    experts: int = 0
    expert_hits: int = 0
    tokens: int = 0
    token_hits: int = 0
    foreseen: int = 0
    foreseeable: int = 0
    on_time: int = 0
    late: int = 0
    _forecast: Sequence[float] = ()

    def count(self, seen: Observation, idle_prefetches: Set[ExpertId]) -> None:
        """Counts one layer's demand: how much of it was resident, and foreseen, when the layer was planned.

        Args:
            seen: when it was planned.
            idle_prefetches: experts that have come, or are coming, as a prefetch not yet used.
        """
        layer, resident = seen.layer, seen.resident  # plain pairs equal `ExpertId`s, and are made faster
        hits = [n for expert, n in seen.demand.items() if (layer, expert) in resident]
        self.layers += 1
        self.experts += len(seen.demand)
        self.expert_hits += len(hits)
        self.tokens += sum(seen.demand.values())
        self.token_hits += sum(hits)
        if idle_prefetches:  # costs nothing where nothing prefetches
            wanted = [expert for expert in seen.demand if (layer, expert) in idle_prefetches]
            here = sum([(layer, expert) in resident for expert in wanted])
            self.on_time, self.late = self.on_time + here, self.late + len(wanted) - here
        if self._forecast and seen.phase == "decode":
            likeliest = sorted(range(len(self._forecast)), key=self._forecast.__getitem__, reverse=True)
            self.foreseen += len(seen.demand.keys() & set(likeliest[: len(seen.demand)]))
            self.foreseeable += len(seen.demand)
        self._forecast = seen.forecast[0] if seen.forecast else ()

    def count_resident(self, layers: int, experts: int, tokens: int) -> None:
        """Counts layers whose experts were all resident, and so many of them wanted."""
        self.layers += layers
        self.experts, self.expert_hits = self.experts + experts, self.expert_hits + experts
        self.tokens, self.token_hits = self.tokens + tokens, self.token_hits + tokens


@dataclass
class Times:
    """Measured while generating.

    Attributes:
        prompt_tokens: of the requests that were prefilled.
        first_token_s: of each request: from the start of the call, so waiting for a slot counts.
        decode_s: of each decode step, in which every running request gets one token. Prefills between decode
            steps are in none of them.
    """

    prompt_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """Statistics of one call.

    Where calls overlap they share steps, and what is counted and timed by steps, layers, experts and bytes is
    that of all, from the call's beginning to its end; prompts, tokens and times to first token are its own.

    Attributes:
        policy: what decided ("resident" where everything fits).
        mode: "whole" (each step one jitted function), "layers" (layer by layer) or "decode" (resident on a
            CPU: decode steps are one jitted function).
        budget_bytes: device memory allowed for experts and predictor; every hit rate is at this budget.
        peak_expert_bytes: most ever taken by resident experts and copies on their way.
        predictor_bytes: what the predictor kept on the device, taken off the budget before any expert.
        prompts, prompt_tokens, new_tokens: how much was done.
        total_s: wall time of the call.
        ttft_s: time to first token, mean over requests: each from the start of the call, so that waiting for
            a slot counts.
        tpot_s: time per output token: mean time of a decode step (each running request gets one token in it);
            prefills of newcomers in between are not in it.
        tokens_per_s: new tokens by total time.
        device_share, host_share, link_share: busy time of each by total time.
        hit_rate: active experts that were resident when their layer was planned, by active experts.
        token_hit_rate: the same, each expert counted by its tokens.
        bytes_demand, bytes_prefetch, bytes_moved: sent over the link.
        bytes_wasted: prefetched and never used.
        predictor: what forecast, if anything did.
        forecast_recall: in decode steps, where n experts were active: those of them among the n that were
            expected most tokens for, one layer before; None without a forecast.
        prefetch_on_time: prefetched experts that were used and had arrived when their layer was planned, by
            all that were used; None where none was.
        ways: parts of the layers' turns that policy "auto" ran in each of its ways, by phase; None of others.
        share_of_bound: least time that the costs allow any policy for the decode steps, by what they took;
            None if not asked for. See `layerscope_jax.runtime.lower_bound`.
        padding: computed expert rows that were padding, by all computed rows.
        dispatches: calls that computed experts, device and host together.
        format: how experts lie in memory, by its name (`layerscope_jax.formats`).
        kernels: parts of these experts by what computed them: "amx", "pairs" and "loops" (our own, on
            a CPU), kernels that were registered, and "xla", the reference; None where no expert was computed
            apart from its layer.
        dense_kernels: what computes the rest of a decode step: its "products" with dense weights, its
            "attention" and the "sums" over experts.
        kernel_fallbacks: why kernels that suit some work were not used for it in this process.
    """

    policy: str
    mode: str
    budget_bytes: int
    peak_expert_bytes: int
    predictor_bytes: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    total_s: float
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    device_share: float
    host_share: float
    link_share: float
    hit_rate: float
    token_hit_rate: float
    bytes_demand: int
    bytes_prefetch: int
    bytes_moved: int
    bytes_wasted: int
    predictor: str | None
    forecast_recall: float | None
    prefetch_on_time: float | None
    ways: dict[str, dict[str, float]] | None
    share_of_bound: float | None
    padding: float
    dispatches: int
    format: str
    kernels: dict[str, float] | None
    dense_kernels: dict[str, str]
    kernel_fallbacks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
