"""Statistics of a run, and the counts from which they are computed."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from layerscope_jax.runtime.outcome import Outcome
from layerscope_jax.scheduling.plan import ExpertId, Observation


@dataclass
class Meter:
    """Counts of layers, experts, tokens and prefetches since the last reset.

    `forecast` has the tokens [E] expected of the layer after the last one counted; empty without a forecast.
    """

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
    exchanged_bytes: int = 0
    forecast: Sequence[float] = ()

    def count(self, seen: Observation, idle_prefetches: Set[ExpertId]) -> None:
        """Counts one layer's demand, and how much of it was resident and forecast when the layer was planned.

        Args:
            seen: the observation from which the layer was planned.
            idle_prefetches: experts whose prefetch has arrived or is in flight, and was not used yet.
        """
        layer, resident = seen.layer, seen.resident  # a plain pair equals an `ExpertId` and is made faster
        hits = [n for expert, n in seen.demand.items() if (layer, expert) in resident]
        self.layers += 1
        self.experts += len(seen.demand)
        self.expert_hits += len(hits)
        self.tokens += sum(seen.demand.values())
        self.token_hits += sum(hits)
        if idle_prefetches:  # costs nothing where nothing prefetches
            prefetched = [expert for expert in seen.demand if (layer, expert) in idle_prefetches]
            arrived = sum([(layer, expert) in resident for expert in prefetched])
            self.on_time, self.late = self.on_time + arrived, self.late + len(prefetched) - arrived
        if self.forecast and seen.phase == "decode":
            likeliest = sorted(range(len(self.forecast)), key=self.forecast.__getitem__, reverse=True)
            self.foreseen += len(seen.demand.keys() & set(likeliest[: len(seen.demand)]))
            self.foreseeable += len(seen.demand)
        self.forecast = seen.forecast[0] if seen.forecast else ()

    def count_resident(self, layers: int, experts: int, tokens: int) -> None:
        """Counts layers whose experts were all resident, with their active experts and routed tokens."""
        self.layers += layers
        self.experts, self.expert_hits = self.experts + experts, self.expert_hits + experts
        self.tokens, self.token_hits = self.tokens + tokens, self.token_hits + tokens


@dataclass
class Times:
    """Times measured while generating, and the prompt tokens that they cover.

    Attributes:
        prompt_tokens: prompt tokens of the prefilled requests.
        cached_tokens: those of them that a prefix cache held, and that were not computed.
        first_token_s: time (s) to the first token of each request, from the start of the call, including any
            wait for a slot.
        decode_s: time (s) of each decode step, in which every running request gets one token; prefills
            between decode steps are not included.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunStats(Outcome):
    """Statistics of one call: an `Outcome` by the wall clock, and figures that only an engine can report.

    Calls that overlap share steps. What is counted or timed by step, layer, expert or byte then covers all
    calls, from this call's beginning to its end; prompts, tokens and times to first token are this call's.
    Time to first token starts with the call, so waiting for a slot is included. In a decode step each running
    request gets one token; prefills between decode steps are not included. The share of the bound covers the
    decode steps only.

    Attributes:
        mode: "whole" (each step is one jitted function), "layers" (layer by layer), "decode" (all experts
            resident on a CPU: each decode step is one jitted function), "in-step" (each decode step is one
            jitted function, which copies what is missing) or "expert-parallel" (layer by layer, on devices
            that share the experts).
        predictor_bytes: device memory (bytes) of the predictor, taken off the budget before any expert.
        prompts, prompt_tokens, new_tokens: number of prompts, of their tokens, and of generated tokens.
        cached_tokens: prompt tokens that a prefix cache held, and that were not computed.
        bytes_exchanged: bytes that devices that share the experts sent each other, all together, as a ring
            would (`layerscope_jax.offload.split_rows`); 0 for one device.
        tokens_per_s: new tokens per second of total time.
        ways: for policy "auto", the fraction of layers run in each of its ways, by phase; of decode steps
            also that of those which kept the cache inside. None for other policies.
        budget_cuts: how often the engine took experts off the device because its memory had run out, so far;
            `budget_bytes` is what is left to them.
        padding: fraction of computed expert rows that were padding.
        dispatches: number of calls that computed experts, on device and host together.
        format: name of the format of the experts (`layerscope_jax.formats`).
        dense_format: format of the matrices of dense layers: the dtype of activations, or "int8".
        dense_bytes: device memory (bytes) of everything of the model but its experts.
        kernels: fraction of those experts by what computed them: "amx", "pairs" and "loops" (built in, on a
            CPU), registered kernels, and "xla", the reference; None if no expert was computed outside a
            jitted step or layer.
        dense_kernels: kernel of each other part of a decode step: the "products" with dense weights, the
            "attention", the "sums" over experts and the "delta_memory" of gated DeltaNet, where there is any.
        kernel_fallbacks: reasons why kernels could not compute work that they support, in this process.
    """

    mode: str
    predictor_bytes: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    ways: dict[str, dict[str, float]] | None
    budget_cuts: int
    padding: float
    dispatches: int
    format: str
    dense_format: str
    dense_bytes: int
    kernels: dict[str, float] | None
    dense_kernels: dict[str, str]
    kernel_fallbacks: tuple[str, ...]
    cached_tokens: int = 0
    bytes_exchanged: int = 0
