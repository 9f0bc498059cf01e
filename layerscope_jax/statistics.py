"""What a run did, in the field's terms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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

    def count(self, seen: Observation) -> None:
        """Counts one layer's demand and how much of it was resident when the layer was planned."""
        hits = [n for expert, n in seen.demand.items() if ExpertId(seen.layer, expert) in seen.resident]
        self.layers += 1
        self.experts += len(seen.demand)
        self.expert_hits += len(hits)
        self.tokens += sum(seen.demand.values())
        self.token_hits += sum(hits)


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """Statistics of one `generate` call.

    Attributes:
        policy: what decided ("resident" where everything fits).
        mode: "whole" (each step one jitted function) or "layers" (layer by layer).
        budget_bytes: device memory allowed for experts; every hit rate is at this budget.
        peak_expert_bytes: most ever taken by resident experts and copies on their way.
        prompts, prompt_tokens, new_tokens: how much was done.
        total_s: wall time of the call.
        ttft_s: time to first token: from the start of a batch to its first tokens, mean over batches.
        tpot_s: time per output token: mean time of a decode step (each request gets one token in it).
        tokens_per_s: new tokens by total time.
        device_share, host_share, link_share: busy time of each by total time.
        hit_rate: active experts that were resident when their layer was planned, by active experts.
        token_hit_rate: the same, each expert counted by its tokens.
        bytes_demand, bytes_prefetch, bytes_moved: sent over the link.
        bytes_wasted: prefetched and never used.
        padding: computed expert rows that were padding, by all computed rows.
        dispatches: calls that computed experts, device and host together.
    """

    policy: str
    mode: str
    budget_bytes: int
    peak_expert_bytes: int
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
    padding: float
    dispatches: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
