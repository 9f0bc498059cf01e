"""How a model is to be run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.registry import make_policy
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.units import is_integer, parse_bytes, parse_pace

if TYPE_CHECKING:
    from layerscope_jax.prediction.predictors import History, Predictor
    from layerscope_jax.profiling.machine_profile import MachineProfile
    from layerscope_jax.scheduling.plan import Policy


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
        emulated_link_bandwidth: bytes a second ("500MB") that copies to the device are paced to, or
            None for as fast as they go. The copies are real either way: it lets a machine without a slow
            link be measured as if it had one.
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
        prefill_chunk_size: tokens of a prefill step at most, padding counted. Short prompts share a step; a
            longer one is prefilled in several, each appending to its caches. Memory of a step grows with it:
            the experts' rows take chunk * K * D numbers, the scores of attention chunk * H * context
            (float32). So does the speed: each step passes all layers, and what is not resident is copied, or
            read by the host, anew in each of them.
        max_num_seqs: requests that run at once at most; others wait until some end. Caches and rows are made
            for as many as there are.
    """

    device_budget: str | int | None = None
    policy: str | Policy = "auto"
    emulated_link_bandwidth: str | int | None = None
    numerics: Literal["exact", "fast"] = "exact"
    profile: HardwareProfile | MachineProfile | str | Path | None = field(default=None, repr=False)
    predictor: str | Predictor | History | None = field(default=None, repr=False)
    host_threads: int | None = None
    prefill_chunk_size: int = 4096
    max_num_seqs: int = 32

    def __post_init__(self) -> None:
        # Not before they are needed: both know of models, which are made of this file.
        from layerscope_jax.prediction.predictors import make_predictor
        from layerscope_jax.profiling.machine_profile import MachineProfile

        problems = Problems()
        check = problems.check

        def expect(name: str, fits: bool, expected: str) -> None:
            problems.expect(fits, name, expected, getattr(self, name))

        if self.device_budget is not None:
            check(parse_bytes, self.device_budget, "device_budget")
        check(make_policy, self.policy)
        if self.emulated_link_bandwidth is not None:
            check(parse_pace, self.emulated_link_bandwidth)
        numerics, profile, threads = self.numerics, self.profile, self.host_threads
        expect("numerics", isinstance(numerics, str) and numerics in ("exact", "fast"), "'exact' or 'fast'")
        known = isinstance(profile, HardwareProfile | MachineProfile | str | Path)
        expect("profile", profile is None or known, "a file, a MachineProfile, a HardwareProfile or None")
        if self.predictor is not None:
            check(make_predictor, self.predictor)
        counted = threads is None or (is_integer(threads) and threads >= 1)
        expect("host_threads", counted, "1 or more")
        chunk = self.prefill_chunk_size
        expect("prefill_chunk_size", is_integer(chunk) and chunk >= 16, "16 tokens or more")
        most = self.max_num_seqs
        expect("max_num_seqs", is_integer(most) and most >= 1, "1 or more")
        problems.raise_any()
