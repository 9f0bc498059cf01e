"""What a run did, in the field's terms."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from layerscope_jax.runtime.outcome import Outcome
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
class RunStats(Outcome):
    """Statistics of one call: an `Outcome` by the wall clock, and what only an engine can tell.

    Where calls overlap they share steps, and what is counted and timed by steps, layers, experts and bytes is
    that of all, from the call's beginning to its end; prompts, tokens and times to first token are its own.
    Time to first token is counted from the start of the call, so that waiting for a slot counts. In a decode
    step each running request gets one token; prefills of newcomers in between are in none. The share of the
    bound is that of the decode steps.

    Attributes:
        mode: "whole" (each step one jitted function), "layers" (layer by layer) or "decode" (resident on a
            CPU: decode steps are one jitted function).
        predictor_bytes: what the predictor kept on the device, taken off the budget before any expert.
        prompts, prompt_tokens, new_tokens: how much was done.
        tokens_per_s: new tokens by total time.
        ways: parts of the layers' turns that policy "auto" ran in each of its ways, by phase; None of others.
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

    mode: str
    predictor_bytes: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    ways: dict[str, dict[str, float]] | None
    padding: float
    dispatches: int
    format: str
    kernels: dict[str, float] | None
    dense_kernels: dict[str, str]
    kernel_fallbacks: tuple[str, ...]
