"""What a model is (`ModelConfig`) and how it is to be run (`OffloadConfig`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layerscope_jax.scheduling.baselines import make_policy
from layerscope_jax.scheduling.costs import HardwareProfile

if TYPE_CHECKING:
    from layerscope_jax.machine_profile import MachineProfile
    from layerscope_jax.prediction import History, Predictor
    from layerscope_jax.scheduling.plan import Policy

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def is_integer(value: Any) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def parse_bytes(size: str | int, what: str = "size") -> int:
    """Bytes from `"8GiB"`, `"1.5 GB"`, `"4096"` or an int.

    Args:
        size: a number of bytes, or a number with one of the units B, KB, MB, GB, TB (powers of 1000),
            KiB, MiB, GiB, TiB (powers of 1024).
        what: the setting's name, for the error message.

    Raises:
        ValueError: if `size` is negative, not a size, or past what 64 bits count.

    >>> parse_bytes("1.5GiB"), parse_bytes("2 MB"), parse_bytes(4096)
    (1610612736, 2000000, 4096)
    """
    found = -1
    if is_integer(size):
        found = int(size)
    elif isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", size)
        if match is not None and match[2] in _UNITS:
            found = int(Decimal(match[1]) * _UNITS[match[2]])
    if found < 0:
        raise ValueError(f"{what} must be a size such as '8GiB', '500 MB' or a number of bytes, got {size!r}")
    if found >= 2**63:
        raise ValueError(f"{what} must be less than 2**63 bytes, got {str(size)[:40]}")
    return found


def parse_pace(link_bandwidth: str | int) -> int:
    """Bytes a second, more than none.

    Raises:
        ValueError: for anything else.
    """
    found = parse_bytes(link_bandwidth, "link_bandwidth")
    if found == 0:
        raise ValueError("link_bandwidth must be more than 0 bytes a second; None leaves it unpaced")
    return found


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a mixture-of-experts decoder, whatever family it comes from.

    Read one from a Hugging Face `config.json` with `layerscope_jax.models.config_from_hf`.

    Attributes:
        family: which weight names and HF architecture it belongs to: "olmoe", "mixtral" or "qwen3_moe".
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim: V, D, L, H, H_kv, D_head.
        num_experts, experts_per_token, expert_hidden: E, K, F.
        normalize_top_k: whether the K router weights of a token are scaled to sum to one.
        qk_norm: RMS norm of queries and keys: none, over each head, or over all heads together.
        qkv_clip: queries, keys and values are clipped to [-qkv_clip, qkv_clip] where given.
        attention_bias: whether the four attention projections have biases.
        sliding_window: how many latest positions a token attends to (itself included), or None for all.
        rope_theta: base of the rotary embedding.
        max_positions: the longest sequence the model is made for.
        norm_eps: epsilon of every RMS norm.
        tie_embeddings: whether the output head is the embedding.
        stop_tokens: ids that end a generation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_hidden: int
    normalize_top_k: bool
    qk_norm: Literal["none", "head", "all"] = "none"
    qkv_clip: float | None = None
    attention_bias: bool = False
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    max_positions: int = 4096
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must lie in 1..num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of one expert's three matrices, by name, in the order they cross the link."""
        hidden, inner = self.hidden_size, self.expert_hidden
        return {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}

    def expert_bytes(self, itemsize: int) -> int:
        """Bytes of one expert at `itemsize` bytes a number."""
        return 3 * self.hidden_size * self.expert_hidden * itemsize


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """How experts are placed, moved and computed.

    Attributes:
        device_budget: bytes of device memory for experts, copies on their way and what the predictor keeps
            there counted: "2GiB", an int, or None for as much as all experts take (everything resident).
        policy: a name from `layerscope_jax.POLICIES`, or a `Policy` object. "auto" is PreSched, watched by
            the clock and cut back where it does not pay on this machine. Where the budget holds every expert
            there is nothing to decide and all are resident, whatever the name; only "host-only" and
            policy objects are obeyed even there.
        link_bandwidth: bytes a second ("500MB") that copies to the device are paced to, or None for as fast
            as they go. The copies are real either way: it lets a machine without a slow link be measured as
            if it had one.
        numerics: "exact": logits are bit for bit the same under every budget, policy and plan, as long as one
            backend computes. "fast" differs where everything is resident on an accelerator: each step is
            one jitted function there, without Python between its layers, which XLA fuses in its own way, so
            that logits agree to rounding and two tokens that score nearly the same may change places. On a
            CPU the two are the same.
        profile: times of this machine, for policies that weigh costs: a file that `layerscope calibrate`
            wrote, a `MachineProfile` (both refused if they are of another machine or model) or bare times;
            measured roughly when needed if None.
        predictor: what forecasts the experts of coming layers, for policies that prefetch: a name from
            `layerscope_jax.PREDICTORS`, a loaded one (`predictor.load(folder)`), or None: nothing, but the
            next layers' routers ("gate") for policy "auto". No token depends on it. What a trained one keeps
            on the device is taken off `device_budget`; the others keep nothing. Where every expert is
            resident none is run.
        host_threads: threads that compute experts on this machine's CPU. If None: as many as there are cores,
            less one where there is an accelerator, which another thread feeds.
        prefill_chunk: tokens of a prefill step at most, padding counted. Short prompts share a step; a longer
            one is prefilled in several, each appending to its caches. Memory of a step grows with it: the
            experts' rows take chunk * K * D numbers, the scores of attention chunk * H * context (float32).
            So does the speed: each step passes all layers, and what is not resident is copied, or read by
            the host, anew in each of them.
    """

    device_budget: str | int | None = None
    policy: str | Policy = "auto"
    link_bandwidth: str | int | None = None
    numerics: Literal["exact", "fast"] = "exact"
    profile: HardwareProfile | MachineProfile | str | Path | None = field(default=None, repr=False)
    predictor: str | Predictor | History | None = field(default=None, repr=False)
    host_threads: int | None = None
    prefill_chunk: int = 4096

    def __post_init__(self) -> None:
        # Not before they are needed: both know of models, which are made of this file.
        from layerscope_jax.machine_profile import MachineProfile
        from layerscope_jax.prediction import make_predictor

        problems = []

        def check(call: Callable[..., object], *arguments: Any) -> None:
            try:
                call(*arguments)
            except ValueError as error:
                problems.append(str(error))

        def expect(name: str, fits: bool, expected: str) -> None:
            if not fits:
                problems.append(f"{name} must be {expected}, got {repr(getattr(self, name))[:60]}")

        if self.device_budget is not None:
            check(parse_bytes, self.device_budget, "device_budget")
        check(make_policy, self.policy)
        if self.link_bandwidth is not None:
            check(parse_pace, self.link_bandwidth)
        numerics, profile, threads = self.numerics, self.profile, self.host_threads
        expect("numerics", isinstance(numerics, str) and numerics in ("exact", "fast"), "'exact' or 'fast'")
        known = isinstance(profile, HardwareProfile | MachineProfile | str | Path)
        expect("profile", profile is None or known, "a file, a MachineProfile, a HardwareProfile or None")
        if self.predictor is not None:
            check(make_predictor, self.predictor)
        counted = threads is None or (is_integer(threads) and threads >= 1)
        expect("host_threads", counted, "1 or more")
        chunk = self.prefill_chunk
        expect("prefill_chunk", is_integer(chunk) and chunk >= 16, "16 tokens or more")
        if problems:
            raise ValueError("; ".join(problems))
